"""The search for the temperature that meets a GFLOPs target, on made-up GFLOPs functions."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from madtp.budget import COARSE_GRID, UnreachableTarget, calibrate
from madtp.rule import PruneSetting

DENSE = 130.0
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def share(temperature: float, centre: float, steepness: float) -> float:
    """0 ... 1, an S over the logarithm of the temperature."""
    return 1 / (1 + math.exp(-steepness * (math.log10(max(temperature, 1e-9)) - centre)))


def curve(centre=1.0, steepness=2.0, low=0.2, high=0.9, sign=1, noise=0.0, step=0.0):
    """GFLOPs between `low` and `high` of dense, rising (sign 1) or falling (-1); noise that looks random, and steps."""

    def measure(setting: PruneSetting) -> float:
        s = share(setting.temperature, centre, steepness)
        value = low + (high - low) * (s if sign > 0 else 1 - s)
        value += noise * math.sin(1e4 * setting.temperature)
        return DENSE * (math.floor(value / step) * step if step else value)

    return measure


@quick
@given(st.floats(-0.5, 3.5), st.floats(1, 6), st.sampled_from([1, -1]), st.floats(0.3, 0.8))
def test_a_target_in_the_range_is_met(centre, steepness, sign, target):
    measure = curve(centre, steepness, sign=sign)
    span = sorted(measure(PruneSetting(t)) for t in (COARSE_GRID[0], COARSE_GRID[-1]))
    target *= DENSE
    if not span[0] < target < span[1]:
        return
    found = calibrate(measure, target)
    assert found.gflops == measure(found.setting)
    assert abs(found.gflops - target) <= 0.005 * target
    assert found.setting.prune_from == 0 and found.evaluations <= 31


@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
@pytest.mark.parametrize("target", [0.35, 0.5, 0.7])
def test_noise_and_steps_are_no_obstacle(sign, target):
    """Trained models behave like this: every pruned token is a step, and the curve is not quite monotone."""
    measure = curve(sign=sign, noise=0.001, step=0.002)
    found = calibrate(measure, target * DENSE)
    assert abs(measure(found.setting) - target * DENSE) <= 0.005 * target * DENSE


def test_a_hump_still_has_a_crossing():
    """Not monotone at all: what matters is that a bracket holds a crossing."""

    def measure(setting):
        return DENSE * (0.3 + 0.5 * math.exp(-((math.log10(setting.temperature) - 1.2) ** 2)))

    assert abs(measure(calibrate(measure, 0.5 * DENSE).setting) - 0.5 * DENSE) <= 0.0025 * DENSE


@pytest.mark.parametrize("target", [0.1, 0.95])
def test_a_target_out_of_reach_names_what_can_be_reached(target):
    measure = curve()
    values = [measure(PruneSetting(t)) for t in COARSE_GRID]
    with pytest.raises(UnreachableTarget) as error:
        calibrate(measure, target * DENSE)
    assert (error.value.low, error.value.high) == (min(values), max(values))
    for number in (target * DENSE, min(values), max(values)):
        assert f"{number:.4f}" in str(error.value)


def later(depth: int = 10):
    """Each block that does not prune is whole."""
    early = curve()
    return lambda s: DENSE * s.prune_from / depth + early(s) * (1 - s.prune_from / depth)


def test_a_gentle_target_is_met_by_pruning_later_and_no_later_than_needed():
    measure = later()
    found = calibrate(measure, 0.95 * DENSE, max_prune_from=9)
    assert abs(found.gflops - 0.95 * DENSE) <= 0.005 * 0.95 * DENSE
    most = [max(measure(PruneSetting(t, first)) for t in COARSE_GRID) for first in range(10)]
    assert found.setting.prune_from == next(first for first, value in enumerate(most) if value > 0.95 * DENSE * 0.995) > 0


def test_a_gentle_target_out_of_reach_of_the_last_block_names_the_whole_span():
    measure = later()
    with pytest.raises(UnreachableTarget) as error:
        calibrate(measure, 0.99 * DENSE, max_prune_from=3)
    assert error.value.high == max(measure(PruneSetting(t, 3)) for t in COARSE_GRID)
    assert error.value.low == measure(PruneSetting(COARSE_GRID[0], 0))


def test_a_target_below_the_range_is_not_looked_for_in_later_blocks():
    asked = []

    def measure(setting):
        asked.append(setting.prune_from)
        return later()(setting)

    with pytest.raises(UnreachableTarget):
        calibrate(measure, 0.05 * DENSE, max_prune_from=9)
    assert set(asked) == {0} and len(asked) == len(COARSE_GRID)


def test_an_earlier_answer_saves_measurements():
    cold = calibrate(curve(), 0.5 * DENSE)
    assert calibrate(curve(), 0.5 * DENSE, start=cold.setting).evaluations == 1
    drifted = calibrate(curve(centre=1.05), 0.5 * DENSE, start=cold.setting)
    assert drifted.evaluations <= 6 < cold.evaluations
    assert abs(drifted.gflops - 0.5 * DENSE) <= 0.0025 * DENSE


def test_an_earlier_answer_far_away_does_not_mislead():
    found = calibrate(curve(), 0.5 * DENSE, start=PruneSetting(1e4))
    assert abs(found.gflops - 0.5 * DENSE) <= 0.0025 * DENSE


def test_a_setting_is_measured_once():
    asked = []
    calibrate(lambda s: asked.append(s) or curve()(s), 0.5 * DENSE, start=PruneSetting(3.0))
    assert len(asked) == len(set(asked))


def test_a_harder_target_prunes_in_earlier_blocks_again():
    """The target falls while it is ramped: an answer that pruned late must not bar the blocks before."""
    gentle = calibrate(later(), 0.95 * DENSE, max_prune_from=9)
    found = calibrate(later(), 0.4 * DENSE, start=gentle.setting, max_prune_from=9)
    assert abs(found.gflops - 0.4 * DENSE) <= 0.002 * DENSE
    assert found.setting.prune_from == 0 < gentle.setting.prune_from


def test_a_target_in_a_gap_between_two_first_blocks_names_a_span_without_it():
    """From block 0 on pruning spans 20 to 40 % of dense, from block 1 on 60 to 80 %: 50 % cannot be met."""

    def measure(setting: PruneSetting) -> float:
        return curve(low=0.2, high=0.4)(setting) + 0.4 * DENSE * setting.prune_from

    with pytest.raises(UnreachableTarget) as error:
        calibrate(measure, 0.5 * DENSE, max_prune_from=1)
    assert not error.value.low < 0.5 * DENSE < error.value.high
    assert error.value.nearest.gflops / DENSE == pytest.approx(0.4 if error.value.high < 0.5 * DENSE else 0.6, abs=0.01)
