"""The token importance score against loops over tokens, heads and learnable tokens."""

from itertools import combinations

import pytest
import torch

from madtp.importance import normalise, token_importance
from tests.madtp.cases import Sample, importance_by_loops, parts


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
