"""A pruner whole: its decisions against loops, and the inputs that must never change them."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from madtp.alignment import token_attention
from madtp.attention.statistics import packed_statistics
from madtp.importance import AttentionStatistics, token_importance
from madtp.packing import Packed, pack
from madtp.pruning import TokenPruner
from madtp.rule import PruneSetting, PruningRule
from madtp.selection import threshold
from tests.madtp.cases import HEADS, LEARNABLE, WIDTH, Sample, gathered_by_loops, importance_by_loops, parts

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_mixed_precision_rounds_neither_the_threshold_nor_the_merged_token(packed):
    torch.manual_seed(0)
    pruner = TokenPruner(WIDTH, LEARNABLE, WIDTH, PruningRule(keep="instance"))
    x, attention = torch.randn(5, 41, WIDTH), token_attention(torch.randn(5, LEARNABLE, 40), WIDTH)
    layout = None
    if packed:
        x, layout = pack(x, None)
    statistics = AttentionStatistics(torch.rand(5, 40), torch.rand(5, 40))
    expected, _, kept = pruner.prune(x, layout, attention, statistics, 300.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _, kept_too = pruner.prune(x, layout, attention, statistics, 300.0)
    assert torch.equal(kept, kept_too) and torch.equal(found, expected)


def test_mixed_precision_does_not_round_the_class_tokens_attention():
    """Its logits are products from which a norm is subtracted."""
    torch.manual_seed(0)
    rule = PruningRule(terms=("cls",))
    layout = Packed.of([7, 5], torch.device("cpu"))
    query, key, out = (4 * torch.randn(12, HEADS, 8) for _ in range(3))
    expected = packed_statistics(query, key, out, torch.zeros(12, HEADS), layout, rule)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = packed_statistics(query, key, out, torch.zeros(12, HEADS), layout, rule)
    assert torch.equal(found.class_attention, expected.class_attention)


def test_at_temperature_zero_the_threshold_is_the_mean_importance():
    sample = Sample([6, 3], seed=2)
    attention, statistics = parts(sample)
    importance = token_importance(statistics, attention, ("cls", "self", "token"), sample.inside)
    assert threshold(attention, importance, 0.0, sample.inside).tolist() == pytest.approx([1 / 6, 1 / 3], abs=1e-6)
    kept = sample.run(PruningRule(keep="instance"), 0.0)[2]
    expected = (importance > 1 / torch.tensor([[6.0], [3.0]])) & sample.inside
    assert torch.equal(kept[0], expected[0]) and 0 < int(kept[0].sum()) < 5  # three tokens may stay whole: not compared


@pytest.mark.parametrize("merge", [True, False])
def test_pruning_by_the_importance_and_threshold_of_the_paper(merge):
    """All of `prune` at once, by loops."""
    sample = Sample([9, 7, 5], seed=4)
    importance = importance_by_loops(sample, ("cls", "self", "token"))
    attention, _ = parts(sample)
    theta = threshold(attention, importance, 3.0, sample.inside)
    wanted = torch.tensor([[bool(i > t) for i in row] for row, t in zip(importance, theta, strict=True)]) & sample.inside
    x, valid, kept = sample.run(PruningRule(keep="instance", merge=merge), 3.0)
    assert torch.equal(kept, wanted) and len({int(n) for n in kept.sum(dim=1)}) > 1
    assert torch.equal(x[:, 0], sample.x[:, 0]) and valid[:, 0].all()  # the class token is protected
    expected = gathered_by_loops(sample.x[:, 1:], sample.inside, importance, kept, merge)
    for b, tokens in enumerate(expected):
        torch.testing.assert_close(x[b, 1:][valid[b, 1:]], torch.tensor(tokens), atol=1e-5, rtol=1e-4)


@quick
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 9999), st.sampled_from([0.0, 1.0, 4.0, 20.0, 500.0]))
def test_padding_and_batch_mates_never_change_an_answer_under_instance(lengths, seed, temperature):
    sample = Sample(lengths, seed)
    attention, statistics = parts(sample)
    importance = token_importance(statistics, attention, ("cls", "self", "token"), sample.inside)
    theta = threshold(attention, importance, temperature, sample.inside)
    assume(bool(((importance - theta[:, None]).abs()[sample.inside] > 1e-6).all()))  # rounding may decide what is closer
    x, valid, kept = sample.run(PruningRule(keep="instance"), temperature)
    for b, number in enumerate(lengths):
        alone, _, alone_kept = sample.alone(b).run(PruningRule(keep="instance"), temperature)
        assert torch.equal(kept[b, :number], alone_kept[0]) and not kept[b, number:].any()
        torch.testing.assert_close(x[b][valid[b]], alone[0], atol=1e-5, rtol=1e-5)


def test_batch_mates_do_change_an_answer_under_max():
    """So that the test above tests something."""
    sample = Sample([9, 9, 9], seed=4)
    kept = sample.run(PruningRule(keep="max"), 3.0)[2]
    alone = [sample.alone(b).run(PruningRule(keep="max"), 3.0)[2] for b in range(3)]
    assert len({int(one.sum()) for one in alone}) > 1
    assert kept.sum(dim=1).tolist() == [max(int(one.sum()) for one in alone)] * 3


@pytest.mark.parametrize(
    "rule", [PruningRule(), PruningRule(keep="instance"), PruningRule(method="random"), PruningRule(variant="released")], ids=str
)
def test_the_callers_tensors_stay_as_they_are(rule):
    sample = Sample([9, 7, 8], seed=5)
    before = {name: tensor.clone() for name, tensor in vars(sample).items()}
    pruned = sample.run(rule, 2.0)[0]
    assert pruned.shape[1] < sample.x.shape[1]
    assert all(torch.equal(tensor, before[name]) for name, tensor in vars(sample).items())


@pytest.mark.parametrize(("temperature", "count"), [(1.0, 50), (4.0, 80), (0.25, 20), (0.0, 100), (1e6, 100)])
def test_random_pruning_keeps_a_fraction(temperature, count):
    """T / (1 + T) of the tokens; all where none would stay or none go."""
    sample = Sample([100, 60], seed=6)
    rule = PruningRule(method="random", keep="instance")
    kept = [sample.run(rule, temperature)[2] for _ in range(2)]
    assert kept[0].sum(dim=1).tolist() == [count, round(count * 0.6)]
    assert not kept[0][1, 60:].any()
    assert torch.equal(*kept) == (count == 100)


def test_blocks_before_the_first_stay_whole():
    setting = PruneSetting(2.0, prune_from=3)
    assert [setting.at(block, PruningRule()) for block in range(5)] == [None, None, None, 2.0, 2.0]
    assert PruneSetting().at(0, PruningRule()) is None and PruneSetting(0.0).at(0, PruningRule()) == 0.0


def test_one_block_in_so_many_prunes_from_the_first_on():
    rule, setting = PruningRule(every=3), PruneSetting(2.0, prune_from=1)
    assert [block for block in range(9) if setting.at(block, rule) is not None] == [1, 4, 7]
    with pytest.raises(ValueError, match="every"):
        PruningRule(every=0)
    with pytest.raises(ValueError, match="every block"):
        PruningRule(variant="released", every=2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dpt"}, "method must be one of dtp, stp, tome, random, got 'dpt'"),
        ({"variant": "old"}, "variant must be one of paper, released, got 'old'"),
        ({"keep": "min"}, "keep must be one of max, mean, instance, got 'min'"),
        ({"terms": ()}, "terms must name some of cls, self, token"),
        ({"terms": ("cls", "eos")}, "terms must name some of cls, self, token"),
        ({"variant": "released", "keep": "instance"}, "variant 'released' knows"),
        ({"variant": "released", "merge": False}, "variant 'released' knows"),
        ({"variant": "released", "method": "random"}, "variant 'released' knows"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PruningRule(**settings)
