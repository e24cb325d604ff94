"""Training for a range of budgets: which settings an epoch's steps have."""

from collections import Counter

import pytest

from configs.schema import NlvrConfig
from engine.elastic import POINTS, Budgets
from madtp.rule import OFF, PruneSetting

DENSE = 10.0
MIDDLE = PruneSetting(5.0)


def entered(share: float = 1.0, **settings) -> tuple[Budgets, list[tuple[float, PruneSetting]]]:
    """Budgets of an epoch whose temperature is the target, and the calls of `meet`."""
    calls = []

    def meet(target: float, start: PruneSetting) -> PruneSetting:
        calls.append((target, start))
        return PruneSetting(target)

    budgets = Budgets(NlvrConfig(**settings))
    budgets.enter(MIDDLE, share, DENSE, meet)
    return budgets, calls


def test_one_budget_needs_no_search_and_has_one_setting():
    budgets, calls = entered()
    assert not calls and {budgets.at(step) for step in range(9)} == {MIDDLE}


def test_steps_alternate_between_the_ends_and_points_between():
    budgets, calls = entered(train_budget=(0.2, 0.8))
    targets = [10 * (1 - p) for p in (0.2, 0.35, 0.5, 0.65, 0.8)]
    assert [target for target, _ in calls] == pytest.approx(targets) and len(targets) == POINTS
    assert [start for _, start in calls] == [OFF, *(PruneSetting(target) for target, _ in calls[:-1])]
    steps = [budgets.at(step).temperature for step in range(300)]
    assert all(value == pytest.approx(2.0) for value in steps[0::3]) and all(value == pytest.approx(8.0) for value in steps[2::3])
    between = Counter(round(value, 6) for value in steps[1::3])
    assert set(between) == {6.5, 5.0, 3.5} and min(between.values()) > 15
    again, _ = entered(train_budget=(0.2, 0.8))
    assert steps == [again.at(step).temperature for step in range(300)]  # so that a resumed run goes on alike


def test_the_ramp_approaches_the_whole_range():
    _, calls = entered(share=0.5, train_budget=(0.2, 0.8))
    assert [target for target, _ in calls] == pytest.approx([10 * (1 - p / 2) for p in (0.2, 0.35, 0.5, 0.65, 0.8)])


def test_unpruned_epochs_stay_unpruned():
    budgets, calls = entered(share=0.0, train_budget=(0.2, 0.8))
    assert not calls and budgets.at(0) is MIDDLE  # whatever the epoch has


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_budget": (0.8, 0.3)}, "0 < first < second < 1"),
        ({"train_budget": (0.3, 0.4)}, "p = 0.5 must lie in the range of train_budget, 0.3 to 0.4"),
        ({"train_budget": (0.3, 0.8), "sparsity_type": "2:4"}, "for pruned tokens alone"),
    ],
)
def test_a_range_that_makes_no_sense_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        NlvrConfig(**settings)
