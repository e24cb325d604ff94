"""Threshold, keep rule, gather and merge against slow loops, padded and packed."""

from fractions import Fraction
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from madtp.importance import token_importance
from madtp.packing import pack
from madtp.selection import best_tokens, gather_and_merge, keep_counts, packed_gather_and_merge, sparsemax, threshold
from tests.madtp.cases import LEARNABLE, Sample, gathered_by_loops, mask_of, parts

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


@quick
@given(st.lists(st.integers(1, 7), min_size=1, max_size=5), st.booleans(), st.randoms(use_true_random=False))
def test_packed_tokens_are_gathered_and_merged_as_padded_ones(lengths, merge, random):
    valid = mask_of([1 + n for n in lengths])
    x = torch.randn(*valid.shape, 3, generator=torch.Generator().manual_seed(len(lengths)))
    inside = valid[:, 1:]
    kept = inside & torch.tensor([[random.random() < 0.5 for _ in row] for row in inside])
    importance = torch.rand(inside.shape, generator=torch.Generator().manual_seed(1)) * inside
    expected, expected_valid = gather_and_merge(x[:, 1:], inside, importance, kept, merge)
    flat, layout = packed_gather_and_merge(*pack(x, valid), importance, kept, merge)
    tokens = [torch.cat([x[i, :1], expected[i][expected_valid[i]]]) for i in range(len(x))]
    assert layout.lengths == tuple(map(len, tokens))
    torch.testing.assert_close(flat, torch.cat(tokens))
