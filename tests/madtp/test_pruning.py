"""Threshold, keep rule, gather and merge against slow loops; and what pruning must never let in or change."""

from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from madtp.alignment import token_attention
from madtp.attention.statistics import map_statistics, packed_statistics
from madtp.importance import AttentionStatistics, normalise, token_importance
from madtp.packing import Packed, pack
from madtp.pruning import PruneSetting, PruningRule, TokenPruner
from madtp.selection import best_tokens, gather_and_merge, keep_counts, sparsemax, threshold

WIDTH, LEARNABLE, HEADS = 6, 4, 3
quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)
scores = st.floats(-30, 30, width=32)


def exact_sparsemax(z: list[float]) -> list[float]:
    """The projection onto the simplex by trying every support: exact, and nothing like the code under test."""
    values = [Fraction(v) for v in z]
    for size in range(1, len(z) + 1):
        for support in combinations(range(len(z)), size):
            tau = (sum(values[i] for i in support) - 1) / size
            if all((v > tau) == (i in support) for i, v in enumerate(values)):
                return [float(max(v - tau, Fraction(0))) for v in values]
    raise AssertionError("a projection always exists")


def mask_of(lengths: list[int]) -> Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@quick
@given(st.lists(st.tuples(scores, st.booleans()), min_size=1, max_size=6).filter(lambda row: any(valid for _, valid in row)))
def test_sparsemax_is_the_projection_onto_the_simplex(row):
    z = torch.tensor([value for value, _ in row])
    valid = torch.tensor([valid for _, valid in row])
    result = sparsemax(z, valid)
    assert float(result.sum()) == pytest.approx(1, abs=1e-5)
    assert not result[~valid].any()
    assert result[valid].tolist() == pytest.approx(exact_sparsemax(z[valid].tolist()), abs=2e-5)
    assert torch.equal(sparsemax(z[valid]), result[valid])


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


@quick
@given(scores, scores)
def test_sparsemax_of_two(a, b):
    first = min(1.0, max(0.0, (a - b + 1) / 2))
    assert sparsemax(torch.tensor([[a, b]])).tolist()[0] == pytest.approx([first, 1 - first], abs=1e-5)


def test_sparsemax_ends_where_rounding_would_step_to_and_fro():
    row = (torch.tensor([-6, -1, -6, 0, -3, -5, -5, 0, 0, 0, -1, -6, -2, -1, 0]) * 3 - 4) / 15  # some entries lie on tau, almost
    assert sparsemax(row).tolist() == pytest.approx([0.2 if value == row.max() else 0.0 for value in row], abs=1e-6)


def test_sparsemax_of_equals_is_uniform_and_of_one_is_one():
    assert sparsemax(torch.full((2, 4), 7.0)).tolist() == [[0.25] * 4] * 2
    assert sparsemax(torch.tensor([[-1e30]])).tolist() == [[1.0]]


class Sample:
    """Random inputs of a pruner: what the tokens of a block and its self-attention might look like, padding full of rubbish."""

    def __init__(self, lengths: list[int], seed: int = 0):
        generator = torch.Generator().manual_seed(seed)
        number, longest = len(lengths), max(lengths)
        self.inside = mask_of(lengths)  # (B, N), without the class token
        self.valid = torch.cat([torch.ones(number, 1, dtype=torch.bool), self.inside], dim=1)
        logits = torch.randn(number, HEADS, 1 + longest, 1 + longest, generator=generator) * 2
        self.attention = logits.masked_fill(~self.valid[:, None, None, :], float("-inf")).softmax(dim=-1)
        self.x, self.outputs = (
            torch.randn(number, *shape, generator=generator) for shape in ((1 + longest, WIDTH), (HEADS, 1 + longest, 2))
        )
        self.inputs = torch.randn(number, 1 + longest, WIDTH, generator=generator)
        self.learnable = torch.randn(LEARNABLE, WIDTH, generator=generator)
        for tensor in (self.x, self.inputs, self.outputs.transpose(1, 2)):
            tensor[~self.valid] = 1e6
        self.attention = torch.where(self.valid[:, None, :, None], self.attention, torch.tensor(0.5))  # rows of padding

    def alone(self, index: int) -> "Sample":
        """The same sample as a batch of one without padding."""
        one = object.__new__(Sample)
        number = int(self.valid[index].sum())
        one.inside, one.valid, one.learnable = (
            self.inside[index : index + 1, : number - 1],
            self.valid[index : index + 1, :number],
            self.learnable,
        )
        one.x, one.inputs = self.x[index : index + 1, :number], self.inputs[index : index + 1, :number]
        one.outputs = self.outputs[index : index + 1, :, :number]
        one.attention = self.attention[index : index + 1, :, :number, :number]
        return one

    def run(self, rule: PruningRule, temperature: float):
        """prune's answer: tokens, valid, kept."""
        pruner = TokenPruner(WIDTH, LEARNABLE, WIDTH, rule)
        with torch.no_grad():
            aligned, _ = pruner.align(self.inputs, self.valid, self.learnable, features=False)
            statistics = map_statistics(self.attention, self.outputs, self.valid, rule)
            return pruner.prune(self.x, self.valid, aligned, statistics, temperature)


def importance_by_loops(sample: Sample, terms: tuple[str, ...]) -> Tensor:
    """Eq. 4-6 token by token."""
    result = torch.zeros(sample.inside.shape)
    for b in range(len(sample.x)):
        tokens = [k for k in range(1, sample.valid.shape[1]) if sample.valid[b, k]]
        raw = {"cls": [], "self": [], "token": []}
        for k in tokens:
            norms = [float(sample.outputs[b, h, k].norm()) for h in range(HEADS)]
            raw["cls"].append(sum(float(sample.attention[b, h, 0, k]) * norms[h] / sum(norms) for h in range(HEADS)))
            raw["self"].append(max(float(sample.attention[b, h, q, k]) for h in range(HEADS) for q in tokens))
            best = 0.0
            for learnable in sample.learnable:
                row = torch.tensor([float(learnable @ sample.inputs[b, j]) / WIDTH**0.5 for j in tokens]).softmax(dim=0)
                best = max(best, float(row[tokens.index(k)]))
            raw["token"].append(best)
        for k, *_ in zip(tokens, strict=True):
            shares = [raw[term][tokens.index(k)] / sum(raw[term]) for term in terms]
            result[b, k - 1] = sum(shares) / len(terms)
    return result


def parts(sample: Sample) -> tuple[Tensor, AttentionStatistics]:
    """A_token and the attention's statistics."""
    attention, _ = TokenPruner(WIDTH, LEARNABLE, WIDTH, PruningRule()).align(sample.inputs, sample.valid, sample.learnable, False)
    return attention, map_statistics(sample.attention, sample.outputs, sample.valid, PruningRule())


@pytest.mark.parametrize("terms", [("cls",), ("self",), ("token",), ("cls", "token"), ("cls", "self", "token")], ids="+".join)
def test_importance_is_the_mean_of_the_normalised_scores_of_the_real_tokens(terms):
    sample = Sample([5, 2, 4])
    attention, statistics = parts(sample)
    importance = token_importance(statistics, attention, terms, sample.inside)
    torch.testing.assert_close(importance, importance_by_loops(sample, terms), atol=1e-6, rtol=1e-5)
    assert importance.sum(dim=1).tolist() == pytest.approx([1, 1, 1], abs=1e-5)
    assert not importance[~sample.inside].any()


def test_a_score_is_shared_out_among_the_real_tokens():
    shares = normalise(torch.tensor([[1.0, 3.0, 99.0], [0.0, 0.0, 0.0]]), torch.tensor([[True, True, False]] * 2))
    assert shares.tolist() == [pytest.approx([0.25, 0.75, 0]), [0, 0, 0]]


def test_the_three_scores_differ():
    attention, statistics = parts(Sample([5]))
    each = [token_importance(statistics, attention, (term,)) for term in ("cls", "self", "token")]
    assert all((a - b).abs().max() > 0.01 for a, b in combinations(each, 2))


@pytest.mark.parametrize("temperature", [0.0, 0.7, 5.0, 300.0])
def test_the_threshold_is_the_least_sparse_mean_of_the_importance(temperature):
    sample = Sample([5, 2, 4], seed=1)
    attention, statistics = parts(sample)
    importance = token_importance(statistics, attention, ("cls", "self", "token"), sample.inside)
    theta = threshold(attention, importance, temperature, sample.inside)
    for b, number in enumerate([5, 2, 4]):
        rows = [exact_sparsemax((temperature * attention[b, k, :number]).tolist()) for k in range(LEARNABLE)]
        means = [sum(w * i for w, i in zip(row, importance[b, :number].tolist(), strict=True)) for row in rows]
        assert float(theta[b]) == pytest.approx(min(means), abs=1e-6)


def test_at_temperature_zero_the_threshold_is_the_mean_importance():
    sample = Sample([6, 3], seed=2)
    attention, statistics = parts(sample)
    importance = token_importance(statistics, attention, ("cls", "self", "token"), sample.inside)
    assert threshold(attention, importance, 0.0, sample.inside).tolist() == pytest.approx([1 / 6, 1 / 3], abs=1e-6)
    kept = sample.run(PruningRule(keep="instance"), 0.0)[2]
    expected = (importance > 1 / torch.tensor([[6.0], [3.0]])) & sample.inside
    assert torch.equal(kept[0], expected[0]) and 0 < int(kept[0].sum()) < 5  # three tokens may stay whole: not compared


@pytest.mark.parametrize(
    ("keep", "wanted", "available", "counts"),
    [
        ("max", [2, 5, 3], [9, 9, 9], [5, 5, 5]),
        ("mean", [2, 5, 3], [9, 9, 9], [3, 3, 3]),
        ("instance", [2, 5, 3], [9, 9, 9], [2, 5, 3]),
        ("instance", [7, 8, 9], [9, 9, 9], [7, 9, 9]),  # fewer than two would go
        ("instance", [0, 1, 0], [9, 9, 2], [9, 1, 2]),  # none would stay
        ("max", [0, 0, 0], [9, 9, 9], [9, 9, 9]),
        ("max", [2, 5, 3], [9, 6, 4], [5, 6, 4]),  # a short sample stays whole
        ("mean", [1, 1, 7], [9, 4, 9], [3, 4, 3]),
    ],
)
def test_what_a_batchs_counts_become(keep, wanted, available, counts):
    assert keep_counts(torch.tensor(wanted), torch.tensor(available), keep).tolist() == counts


def test_the_best_tokens_are_kept_of_equals_the_earlier_and_never_padding():
    importance = torch.tensor([[0.1, 0.4, 0.4, 0.1, 0.9], [0.2, 0.2, 0.2, 0.2, 0.2]])
    valid = mask_of([4, 5])
    kept = best_tokens(importance, torch.tensor([2, 3]), valid)
    assert kept.tolist() == [[False, True, True, False, False], [True, True, True, False, False]]
    assert best_tokens(importance, torch.tensor([3, 0]), valid).tolist() == [[True, True, True, False, False], [False] * 5]


def gathered_by_loops(x: Tensor, valid: Tensor, importance: Tensor, kept: Tensor, merge: bool) -> list[list[list[float]]]:
    """Each sample's tokens after pruning, as long as it is."""
    samples = []
    for b in range(len(x)):
        tokens = [x[b, k].tolist() for k in range(x.shape[1]) if kept[b, k]]
        gone = [k for k in range(x.shape[1]) if valid[b, k] and not kept[b, k]]
        if merge and gone:
            weight = sum(float(importance[b, k]) for k in gone)
            tokens.append([sum(float(importance[b, k] * x[b, k, c]) for k in gone) / weight for c in range(x.shape[2])])
        samples.append(tokens)
    return samples


@quick
@given(
    st.lists(st.lists(st.sampled_from("kgp"), min_size=5, max_size=5), min_size=1, max_size=4), st.booleans(), st.integers(0, 99)
)
def test_kept_tokens_keep_their_order_and_the_merged_one_comes_last(states, merge, seed):
    """k is kept, g goes, p is padding, which may stand anywhere: earlier blocks leave none inside, but nothing relies on it."""
    assume(any("k" in row for row in states))
    generator = torch.Generator().manual_seed(seed)
    kept, valid = (torch.tensor([[state in wanted for state in row] for row in states]) for wanted in ("k", "kg"))
    x = torch.where(valid.unsqueeze(-1), torch.randn(*kept.shape, 3, generator=generator), torch.tensor(1e6))
    importance = torch.where(valid, torch.rand(kept.shape, generator=generator) + 0.1, torch.tensor(0.0))
    out, out_valid = gather_and_merge(x, valid, importance, kept, merge)
    expected = gathered_by_loops(x, valid, importance, kept, merge)
    assert out.shape[1] == max(map(len, expected))
    for tokens, mask, wanted in zip(out, out_valid, expected, strict=True):
        assert mask.tolist() == [position < len(wanted) for position in range(len(mask))]
        torch.testing.assert_close(tokens[mask], torch.tensor(wanted).view(-1, 3), atol=1e-5, rtol=1e-5)


def test_without_a_mask_every_token_is_real():
    x, kept = torch.randn(2, 4, 3), torch.tensor([[True, False, False, True]] * 2)
    importance = torch.rand(2, 4)
    with_mask = gather_and_merge(x, torch.ones(2, 4, dtype=torch.bool), importance, kept, True)
    assert all(map(torch.equal, gather_and_merge(x, None, importance, kept, True), with_mask))


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
    assert [setting.at(block) for block in range(5)] == [None, None, None, 2.0, 2.0]
    assert PruneSetting().at(0) is None and PruneSetting(0.0).at(0) == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "dpt"}, "method must be one of dtp, random, got 'dpt'"),
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
