"""Ranks and recalls, against a loop over sorted targets and against figures made by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics import retrieval
from metrics.retrieval import MISS, best_ranks, candidate_recalls, recalls


def naive_ranks(scores: list[list[float]], query_ids: list[int], target_ids: list[list[int]]) -> list[int]:
    ranks = []
    for row, wanted, targets in zip(scores, query_ids, target_ids, strict=True):
        order = sorted(range(len(row)), key=lambda index: -row[index])  # stable: of equal ones the earlier
        ranks.append(next((rank for rank, index in enumerate(order) if targets[index] == wanted), MISS))
    return ranks


@st.composite
def tied_rankings(draw: st.DrawFn) -> tuple[list[list[float]], list[int], list[list[int]]]:
    queries, targets = draw(st.integers(1, 6)), draw(st.integers(1, 7))
    rows = {"min_size": targets, "max_size": targets}
    columns = {"min_size": queries, "max_size": queries}
    values = st.sampled_from([-float("inf"), -1.0, 0.0, 0.5])
    scores = draw(st.lists(st.lists(values, **rows), **columns))
    ids = st.integers(0, 3)
    return scores, draw(st.lists(ids, **columns)), draw(st.lists(st.lists(ids, **rows), **columns))


@given(tied_rankings(), st.sampled_from([1, 10, 1000]))
@settings(max_examples=200, deadline=None)
def test_ranks_are_those_of_sorting_whatever_the_chunks(ranking, cells):
    scores, query_ids, target_ids = ranking
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "CELLS", cells)
        ranks = best_ranks(*(torch.tensor(part) for part in ranking))
        shared = best_ranks(torch.tensor(scores), torch.tensor(query_ids), torch.tensor(target_ids[0]))
    assert ranks.tolist() == naive_ranks(scores, query_ids, target_ids)
    assert shared.tolist() == naive_ranks(scores, query_ids, [target_ids[0]] * len(scores))


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.8], [0.2, 0.5, 0.5], [0.3, 0.3, 0.3]])
    assert best_ranks(scores, torch.tensor([7, 7, 9]), torch.tensor([5, 7, 7])).tolist() == [1, 0, MISS]


def test_all_targets_as_candidates_rank_as_they_are():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(9, 12, generator=generator)
    query_ids, target_ids = torch.arange(9), torch.randint(0, 9, (12,), generator=generator)
    best, order = scores.topk(12, dim=1)
    assert torch.equal(best_ranks(best, query_ids, target_ids[order]), best_ranks(scores, query_ids, target_ids))


def test_a_model_that_says_nan_finds_nothing_for_it():
    scores = torch.tensor([[0.5, float("nan"), 0.1]])
    assert best_ranks(scores, torch.tensor([1]), torch.arange(3)).tolist() == [2]


def test_recalls_by_hand():
    found = recalls(torch.tensor([0, 1, 4, MISS]), torch.tensor([9, 10]))
    assert found == {
        **{"txt_r1": 25.0, "txt_r5": 75.0, "txt_r10": 75.0, "txt_r_mean": pytest.approx(175 / 3)},
        **{"img_r1": 0.0, "img_r5": 0.0, "img_r10": 50.0, "img_r_mean": pytest.approx(50 / 3)},
        "r_mean": pytest.approx(37.5),
    }


def test_recalls_of_candidates_are_those_of_their_order():
    texts, images = torch.tensor([[3, 0, 2], [1, 2, 3]]), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])  # text t is image t // 2's
    found = candidate_recalls(texts, images, torch.tensor([0, 0, 1, 1]))
    assert (found["txt_r1"], found["txt_r5"], found["img_r1"], found["img_r5"]) == (0, 100, 50, 100)
