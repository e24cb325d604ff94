"""Recalls against a loop over sorted targets and against figures made by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.retrieval import CUTS, recalls
from tasks.ranking import best_candidates

CPU = torch.device("cpu")


def naive_recalls(scores: list[list[float]], correct: list[list[bool]]) -> list[float]:
    """Percent of the rows with a correct column among the first; of equal scores the earlier is first."""
    found = []
    for cut in CUTS:
        hits = 0
        for row, right in zip(scores, correct, strict=True):
            order = sorted(range(len(row)), key=lambda index: -row[index])
            hits += any(right[index] for index in order[:cut])
        found.append(100 * hits / len(scores))
    return found


@st.composite
def tied_features(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Features of images and texts, small whole numbers so that many similarities are equal, and the image of each text."""
    number, texts = draw(st.integers(1, 9)), draw(st.integers(1, 14))
    row = st.lists(st.integers(-1, 1), min_size=3, max_size=3)
    images, captions = (draw(st.lists(row, min_size=n, max_size=n)) for n in (number, texts))
    owners = draw(st.lists(st.integers(0, number - 1), min_size=texts, max_size=texts))
    return torch.tensor(images).float(), torch.tensor(captions).float(), owners


@given(tied_features())
@settings(max_examples=200, deadline=None)
def test_recalls_of_a_ranking_are_those_of_sorting(drawn):
    images, texts, owners = drawn
    rankings = best_candidates(images, texts, max(CUTS), CPU), best_candidates(texts, images, max(CUTS), CPU)
    found = recalls(*(ranking.candidates for ranking in rankings), torch.tensor(owners))
    scores = images @ texts.t()
    by_image = naive_recalls(scores.tolist(), [[owner == image for owner in owners] for image in range(len(images))])
    by_text = naive_recalls(scores.t().tolist(), [[owner == image for image in range(len(images))] for owner in owners])
    assert [found[f"txt_r{cut}"] for cut in CUTS] == pytest.approx(by_image)
    assert [found[f"img_r{cut}"] for cut in CUTS] == pytest.approx(by_text)


def test_recalls_by_hand():
    """Four images find their texts in first, second, fifth and no place; the first two texts find theirs in tenth and eleventh."""
    image_of_text = torch.tensor([0, 1, 2, 3, *[3] * 8])
    texts = torch.full((4, 11), 4)
    texts[0, 0], texts[1, 1], texts[2, 4], texts[3] = 0, 1, 2, 0
    images = torch.full((12, 11), 3)
    images[0], images[1] = 9, 9
    images[0, 9], images[1, 10], images[2, 0] = 0, 1, 2
    found = recalls(texts, images, image_of_text)
    assert found == {
        **{"txt_r1": 25.0, "txt_r5": 75.0, "txt_r10": 75.0, "txt_r_mean": pytest.approx(175 / 3)},
        **{"img_r1": pytest.approx(1000 / 12), "img_r5": pytest.approx(1000 / 12), "img_r10": pytest.approx(1100 / 12)},
        "img_r_mean": pytest.approx(3100 / 36),
        "r_mean": pytest.approx((175 / 3 + 3100 / 36) / 2),
    }


def test_recalls_of_candidates_are_those_of_their_order():
    texts, images = torch.tensor([[3, 0, 2], [1, 2, 3]]), torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])  # text t is image t // 2's
    found = recalls(texts, images, torch.tensor([0, 0, 1, 1]))
    assert (found["txt_r1"], found["txt_r5"], found["img_r1"], found["img_r5"]) == (0, 100, 50, 100)
