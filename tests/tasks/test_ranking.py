"""Ranking a split: the order that a plain loop over all pairs gives, whatever the sizes, and a model that stays as it is."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from data.captions import Split
from madtp.blocks import Guidance
from madtp.rule import OFF, PruneSetting, PruningRule
from tasks import ranking
from tasks.ranking import best_candidates, predictions, rank
from tests import tiny
from utils import Run

RUN = Run(torch.device("cpu"))
SETTING = PruneSetting(3.0)
LENGTHS = [5, 9, 7, 6, 11, 4, 8, 5, 10, 7, 6]  # of the captions of
IMAGE_OF_TEXT = [0, 0, 0, 1, 2, 2, 3, 3, 3, 4, 4]  # five pictures
KINDS = pytest.mark.parametrize("kind", tiny.PAIR_MODELS)


def split(kind: str, batch: int) -> tuple[Split, torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Loaders in batches that may not divide the split; and all pictures and captions as they are."""
    _, ids, mask = tiny.pairs(kind, LENGTHS)
    images = tiny.images(5)[:, 0]
    widest = [max(LENGTHS[start : start + batch]) for start in range(0, len(LENGTHS), batch)]
    texts = [
        {"input_ids": one[:, :width], "attention_mask": other[:, :width]}
        for one, other, width in zip(ids.split(batch), mask.split(batch), widest, strict=True)
    ]
    whole = Split([{"image": part} for part in images.split(batch)], texts, [], IMAGE_OF_TEXT, [], [f"{i}.jpg" for i in range(5)])
    return whole, images, [(ids[i : i + 1, :n], mask[i : i + 1, :n]) for i, n in enumerate(LENGTHS)]


def by_a_plain_loop(model, images, texts, setting, number, matching):
    """The candidates of each picture and of each caption with their scores, every pair looked at alone."""
    encoded = [model.encode_image(image[None], Guidance(setting)) for image in images]
    words = [model.encode_text(*text, Guidance(setting)) for text in texts]
    similarity = [[float(image.feature[0] @ word.feature[0]) for word in words] for image in encoded]

    def score(image: int, text: int) -> float:
        if not matching:
            return similarity[image][text]
        one = encoded[image].tokens, encoded[image].layout
        return similarity[image][text] + float(model.match(*texts[text], one, setting)[0][0, 1])

    def best(similarities: list[float], scored) -> list[tuple[float, int]]:
        candidates = sorted(range(len(similarities)), key=lambda i: -similarities[i])[:number]
        return sorted(((scored(i), i) for i in candidates), reverse=True)

    by_image = [best(similarity[i], lambda text, i=i: score(i, text)) for i in range(len(images))]
    by_text = [best([row[text] for row in similarity], lambda image, text=text: score(image, text)) for text in range(len(texts))]
    return by_image, by_text


CASES = [("blip", True), ("blip", False), ("clip", False)]


@pytest.mark.parametrize(("kind", "matching"), CASES)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("batch", "number", "at_once"), [(2, 3, 2), (5, 100, 256), (11, 1, 256)])
@torch.no_grad()
def test_the_order_is_that_of_a_plain_loop_over_all_pairs(kind, matching, packed, batch, number, at_once, monkeypatch):
    """Includes more candidates than targets, and pictures whose candidates do not fit one pass of the matching head."""
    monkeypatch.setattr(ranking, "PAIRS", at_once)
    monkeypatch.setattr(ranking, "SIMILARITIES", 25)
    model = tiny.PAIR_MODELS[kind](PruningRule(keep="instance"))
    loaders, images, texts = split(kind, batch)
    found = rank(model, loaders, Guidance(SETTING, packed=packed), RUN, number, matching)
    expected = by_a_plain_loop(model, images, texts, SETTING, number, matching)
    for here, wanted in zip(found, expected, strict=True):
        assert here.candidates.tolist() == [[target for _, target in row] for row in wanted]
        scores = torch.tensor([[score for score, _ in row] for row in wanted])
        torch.testing.assert_close(here.scores, scores, atol=3e-5, rtol=1e-5)
    assert found[0].candidates.shape == (5, min(number, 11)) and found[1].candidates.shape == (11, min(number, 5))


@torch.no_grad()
def test_the_matching_changes_the_order():
    """So that the comparison above compares different things."""
    model, (loaders, _, _) = tiny.retrieval(PruningRule(keep="instance")), split("blip", 5)
    plain, matched = (rank(model, loaders, Guidance(SETTING, packed=True), RUN, 5, matching) for matching in (False, True))
    assert plain[0].candidates.tolist() != matched[0].candidates.tolist()
    assert plain[1].candidates.sort().values.tolist() == matched[1].candidates.sort().values.tolist()


@torch.no_grad()
def test_every_candidate_pair_is_matched_once(monkeypatch):
    model, (loaders, _, _) = tiny.retrieval(), split("blip", 2)
    matched, match = [], model.match

    def counted(ids, mask, image, setting):
        matched.append(len(ids))
        return match(ids, mask, image, setting)

    monkeypatch.setattr(model, "match", counted)
    by_image, by_text = rank(model, loaders, Guidance(OFF, packed=False), RUN, 2, matching=True)
    pairs = {(i, int(text)) for i, row in enumerate(by_image.candidates) for text in row}
    pairs |= {(int(image), i) for i, row in enumerate(by_text.candidates) for image in row}
    assert sum(matched) == len(pairs) and len(matched) == len({image for image, _ in pairs})


@pytest.mark.parametrize(
    ("at_once", "passes"),
    [(256, [(8, 8, 3, 10, 4)]), (16, [(8, 8), (3, 10), (4,)]), (9, [(8,), (8,), (3,), (9,), (1, 4)])],
)
@torch.no_grad()
def test_packed_pictures_share_a_pass_and_are_parted_where_they_alone_exceed_it(at_once, passes, monkeypatch):
    model, matched = tiny.retrieval(), []
    match = model.match

    def watched(ids, mask, image, setting):
        matched.append(image[1].readers)
        return match(ids, mask, image, setting)

    monkeypatch.setattr(ranking, "PAIRS", at_once)
    monkeypatch.setattr(model, "match", watched)
    rank(model, split("blip", 5)[0], Guidance(OFF, packed=True), RUN, 3, matching=True)
    assert matched == passes


@torch.no_grad()
def test_similarities_are_told_apart_in_mixed_precision():
    torch.manual_seed(0)
    queries, targets = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (20, 400))
    expected = best_candidates(queries, targets, 10, RUN.device)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = best_candidates(queries, targets, 10, RUN.device)
    assert torch.equal(found.candidates, expected.candidates) and torch.equal(found.scores, expected.scores)


@KINDS
@torch.no_grad()
def test_ranking_changes_nothing_of_the_model(kind):
    model = tiny.PAIR_MODELS[kind](PruningRule(keep="instance"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rank(model, split(kind, 2)[0], Guidance(SETTING, packed=True), RUN, 3, matching=kind == "blip")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_predictions_name_the_best_ten_either_way():
    scores = torch.rand(12, 30, generator=torch.Generator().manual_seed(0))
    by_image, by_text = (ranking.Ranking(part.argsort(dim=1, descending=True), part) for part in (scores, scores.t()))
    written = predictions(by_image, by_text, [f"{i}.jpg" for i in range(12)])
    assert written["captions"]["3.jpg"] == by_image.candidates[3, :10].tolist()
    assert written["pictures"]["29"] == [f"{i}.jpg" for i in by_text.candidates[29, :10].tolist()]
    assert len(written["captions"]) == 12 and len(written["pictures"]) == 30


def test_of_equal_candidates_the_first_is_best_and_no_number_is_last():
    queries, targets = torch.eye(1, 2), torch.tensor([[0.5, 0.0], [torch.nan, 0.0], *[[1.0, 0.0]] * 300])
    found = best_candidates(queries, targets, 302, torch.device("cpu"))
    assert found.candidates[0].tolist() == [*range(2, 302), 0, 1]
    assert best_candidates(queries, targets, 5, torch.device("cpu")).candidates[0].tolist() == [2, 3, 4, 5, 6]


@torch.no_grad()
def test_a_candidate_whose_matching_is_no_number_is_last(monkeypatch):
    model, (loaders, _, _) = tiny.retrieval(), split("blip", 5)
    match = model.match

    def overflowing(ids, mask, image, setting):
        logits, record = match(ids, mask, image, setting)
        return logits.masked_fill(torch.arange(len(logits))[:, None] % 2 == 0, torch.nan), record

    monkeypatch.setattr(model, "match", overflowing)
    for found in rank(model, loaders, Guidance(OFF, packed=True), RUN, 4, matching=True):
        assert found.scores.isinf().any() and not found.scores.isnan().any()
        assert (found.scores.isinf().int().diff(dim=1) >= 0).all()


@torch.no_grad()
def test_pictures_are_forgotten_when_they_have_been_matched(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    model, (whole, _, _) = tiny.retrieval(PruningRule(keep="instance")), split("blip", 1)
    encode, alive, most = model.encode_image, [], 0

    def watched(*inputs, **options):
        nonlocal most
        encoded = encode(*inputs, **options)
        alive.append(weakref.ref(encoded.tokens))
        most = max(most, sum(one() is not None for one in alive))
        return encoded

    monkeypatch.setattr(model, "encode_image", watched)
    rank(model, whole, Guidance(SETTING, packed=True), RUN, 3, matching=True)
    assert len(alive) == 2 * 5 and most == 1


class _Sizes(TorchDispatchMode):
    """Notes the number of elements of the largest tensor that an operation returns."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        returned = out if isinstance(out, tuple | list) else [out]
        self.largest = max([self.largest, *(part.numel() for part in returned if isinstance(part, torch.Tensor))])
        return out


def largest_tensor(call: Callable[[], object]) -> int:
    with torch.no_grad(), _Sizes() as sizes:
        call()
    return sizes.largest


def test_similarities_of_all_with_all_are_never_in_memory_together(monkeypatch):
    monkeypatch.setattr(ranking, "SIMILARITIES", 8 * 2500)
    queries, targets = torch.randn(500, 4), torch.randn(2500, 4)
    assert largest_tensor(lambda: best_candidates(queries, targets, 3, RUN.device)) == 8 * 2500


def test_matching_a_longer_split_holds_no_larger_tensors(monkeypatch):
    """Only the numbers of candidate pairs grow with the split, and here they are few."""
    monkeypatch.setattr(ranking, "PAIRS", 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # of one thread the tensors are seen
    model, (whole, _, _) = tiny.retrieval(PruningRule(keep="instance")), split("blip", 2)
    thrice = Split(3 * whole.images, 3 * whole.texts, [], 3 * IMAGE_OF_TEXT, [], 3 * whole.names)
    guidance = Guidance(SETTING, packed=True)
    sizes = [largest_tensor(lambda part=part: rank(model, part, guidance, RUN, 3, True)) for part in (whole, thrice)]
    assert sizes[0] == sizes[1]
