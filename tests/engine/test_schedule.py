"""The plan of sparse weights and pruned tokens: what is removed and masked in which epoch, and what loses least."""

import pytest
import torch
from torch import nn

from configs.schema import NlvrConfig
from engine.schedule import Option, WeightPlan
from madtp.flops import multiplied
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.masks import Pattern, SparseWeights
from utils import UserError

DENSE = 10.0


ATTENTION, MLP = "tower.blocks.0.attn.qkv.weight", "tower.blocks.0.mlp.fc1.weight"
SAVED = {ATTENTION: 1.0, MLP: 2.0}  # GFLOPs that a sparse weight saves, of DENSE


def sparse_model() -> SparseWeights:
    return SparseWeights({name: nn.Parameter(torch.randn(4, 8)) for name in SAVED}, Pattern(2, 4))


def cost(sparse: SparseWeights | None, setting: PruneSetting) -> float:
    """The share of tokens that stays is the temperature."""
    weights = sparse.weights if sparse else {}
    saved = sum(SAVED[name] for name, weight in weights.items() if multiplied(weight) < weight.numel())
    return (DENSE - saved) * (1.0 if setting.temperature is None else setting.temperature)


def plan(p: float = 0.6, sparse: SparseWeights | None = None, **keys) -> WeightPlan:
    config = NlvrConfig(p=p, sparsity_type="2:4" if sparse else "", **{"max_epoch": 6, **keys})
    return WeightPlan(config, sparse, lambda setting: cost(sparse, setting), lambda names, setting: sparse.select(names), DENSE)


@pytest.mark.parametrize(
    ("epochs", "ramp_epochs", "shares"),
    [
        (6, None, [0.3, 0.6, 0.6, 0.6, 0.6, 0.6]),  # a third of the epochs
        (4, 4, [0.15, 0.3, 0.45, 0.6]),
        (3, 1, [0.6, 0.6, 0.6]),
        (3, 0, [0.6, 0.6, 0.6]),
        (1, None, [0.6]),
    ],
)
def test_the_share_to_remove_is_reached_in_equal_steps(epochs, ramp_epochs, shares):
    tokens = plan(max_epoch=epochs, ramp_epochs=ramp_epochs)
    assert [tokens.removal(epoch) for epoch in range(epochs)] == pytest.approx(shares)


@pytest.mark.parametrize(
    ("order", "shares", "masked"),
    [
        ("together", [0.45, 0.6, 0.6, 0.6], [True, True, True, True]),  # weights alone: 0.3
        ("weights_first", [0.3, 0.3, 0.45, 0.6], [True, True, True, True]),
        ("tokens_first", [0.45, 0.6, 0.6, 0.6], [False, False, True, True]),
    ],
)
def test_the_orders_differ_in_what_goes_when(order, shares, masked):
    sparse = sparse_model()
    planned = plan(sparse=sparse, order=order)
    assert [planned.removal(epoch) for epoch in range(4)] == pytest.approx(shares)
    for epoch, expected in enumerate(masked):
        planned.enter(epoch, OFF)
        assert bool(sparse.masks) == expected
        assert planned.settled(epoch) == expected
        with planned.counting(epoch):  # whoever goes first, both are counted
            assert cost(sparse, OFF) == 7.0


def test_masks_are_refreshed_while_the_tokens_ramp_and_then_fixed():
    sparse = sparse_model()
    planned = plan(sparse=sparse, mask_schedule="refresh")
    weight = sparse.weights[MLP]
    seen = []
    for epoch in range(4):
        planned.enter(epoch, OFF)
        seen.append(sparse.masks[MLP].clone())
        assert planned.settled(epoch) == (epoch >= 2)
        weight.data.mul_(0.01)  # what was dropped is larger now
    assert not torch.equal(seen[0], seen[1]) and torch.equal(seen[2], seen[3])


def test_weights_that_meet_p_alone_leave_the_tokens_whole_and_say_so(caplog):
    caplog.set_level("INFO")
    planned = plan(p=0.25, sparse=sparse_model())
    assert {planned.removal(epoch) for epoch in range(6)} == {0.25}
    assert "token pruning is off" in caplog.text


def test_weights_alone_that_cannot_meet_p_are_refused():
    with pytest.raises(UserError, match=r"p = 0.6 is out of reach: the weights alone remove 0.300"):
        plan(sparse=sparse_model(), method="none")


def test_adaptive_takes_each_step_by_what_loses_least_per_gflop():
    """Masking the MLP is free, masking attention ruins the score; tokens lose a little."""
    sparse = sparse_model()
    planned = plan(sparse=sparse, order="adaptive")

    def score(setting: PruneSetting) -> float:
        return 90 - 50 * (ATTENTION in sparse.masks) - (0 if setting.temperature is None else 5)

    def meet(target: float) -> tuple[PruneSetting, float]:
        setting = PruneSetting(target / cost(sparse, OFF))
        return setting, cost(sparse, setting)

    before = sparse.weights[ATTENTION].clone()
    setting = planned.choose(5.0, OFF, lambda setting: cost(sparse, setting), meet, score)
    assert set(sparse.masks) == {MLP} and cost(sparse, setting) == pytest.approx(5.0)
    assert torch.equal(sparse.weights[ATTENTION], before)  # tried, and taken back


def test_adaptive_meets_the_step_with_tokens_when_masked_weights_save_less_than_was_counted():
    """Masks move the scores: more tokens stay than before."""
    sparse = sparse_model()

    def dearer(setting: PruneSetting) -> float:
        return cost(sparse, setting) + 0.5 * len(sparse.masks)

    def score(setting: PruneSetting) -> float:
        return 90 - (0 if setting.temperature is None else 5)

    def meet(target: float) -> tuple[PruneSetting, float]:
        return PruneSetting(target / dearer(OFF)), target

    setting = plan(sparse=sparse, order="adaptive").choose(7.0, OFF, dearer, meet, score)
    assert set(sparse.masks) == {ATTENTION, MLP} and not sparse.changing
    assert setting == PruneSetting(7.0 / 8.0)


def test_adaptive_scores_nothing_where_the_target_is_met_already():
    planned = plan(sparse=sparse_model(), order="adaptive")

    def never(*_) -> None:
        raise AssertionError("was validated")

    assert planned.choose(10.0, OFF, lambda setting: cost(planned.sparse, setting), never, never) is OFF


def test_of_options_that_lose_nothing_the_largest_is_cheapest():
    small, large, losing = Option(1.0, -1.0), Option(3.0, -0.5), Option(5.0, 1.0)
    assert sorted([small, losing, large], key=lambda option: option.price) == [large, small, losing]


def test_weights_are_masked_under_the_setting_that_prunes_then():
    seen, sparse = [], sparse_model()
    planned = plan(sparse=sparse, order="tokens_first")
    planned.mask = lambda names, setting: seen.append((set(names), setting)) or sparse.select(names)
    settings = [PruneSetting(float(epoch)) for epoch in range(4)]
    assert [planned.enter(epoch, setting) for epoch, setting in enumerate(settings)] == [False, False, True, False]
    assert seen == [({ATTENTION, MLP}, settings[2])]


def test_adaptive_leaves_the_tokens_alone_where_weights_meet_p():
    sparse = sparse_model()
    planned = plan(p=0.25, sparse=sparse, order="adaptive")  # weights alone: 0.3

    def never(target: float) -> tuple[PruneSetting, float]:
        raise AssertionError("tokens were pruned")

    def score(setting: PruneSetting) -> float:
        return 90.0 - 50 * len(sparse.masks)

    assert planned.choose(7.5, OFF, lambda setting: cost(sparse, setting), never, score) is OFF
    assert set(sparse.masks) == {ATTENTION, MLP}


@pytest.mark.parametrize(
    ("keys", "epoch"),
    [
        ({"order": "tokens_first", "max_epoch": 2}, 3),
        ({"order": "adaptive", "max_epoch": 2}, 3),
        ({"order": "weights_first", "max_epoch": 3}, 4),
        ({"mask_schedule": "refresh", "max_epoch": 2}, 3),
        ({"order": "together", "max_epoch": 1}, 2),
    ],
)
def test_too_few_epochs_are_refused_before_any_is_trained(keys, epoch):
    with pytest.raises(UserError, match=f"the ramp ends in epoch {epoch}, but max_epoch is {keys['max_epoch']}"):
        plan(sparse=sparse_model(), ramp_epochs=2, **keys)
    plan(sparse=sparse_model(), ramp_epochs=2, **{**keys, "max_epoch": epoch})


@pytest.mark.parametrize("p", [0.45, 0.6, 0.85, 0.9])
def test_what_is_removed_in_the_end_is_p_to_the_bit(p):
    for saved in torch.rand(50).tolist():
        planned = plan(p=p, ramp_epochs=1)
        planned.sparse, planned.removed_by_weights = sparse_model(), saved * p
        assert planned.removal(0) == p


def test_the_modalities_are_aligned_before_anything_is_removed():
    tokens = plan(align_epochs=2, ramp_epochs=2)
    assert [tokens.removal(epoch) for epoch in range(6)] == pytest.approx([0, 0, 0.3, 0.6, 0.6, 0.6])
    sparse = sparse_model()
    both = plan(sparse=sparse, align_epochs=2, ramp_epochs=2, order="tokens_first")
    assert [both.removal(epoch) for epoch in range(4)] == pytest.approx([0, 0, 0.45, 0.6])
    for epoch, masked in enumerate([False, False, False, False, True]):
        both.enter(epoch, OFF)
        assert bool(sparse.masks) == masked == both.settled(epoch)
        with both.counting(epoch):
            assert cost(sparse, OFF) == (DENSE if epoch < 2 else 7.0)


def test_epochs_of_alignment_leave_the_ramp_too_few():
    plan(max_epoch=3, ramp_epochs=2, align_epochs=1)
    with pytest.raises(UserError, match="after align_epochs: 2 the ramp ends in epoch 4, but max_epoch is 3"):
        plan(max_epoch=3, ramp_epochs=2, align_epochs=2)
