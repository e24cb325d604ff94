"""Retrieval over a split: features of all pictures and captions, the best candidates in both directions, and their matching.

Each process encodes its share of pictures and captions once for their features, and pictures once more for the matching, so that no
picture's tokens are kept. I images, T texts, L text tokens, E channels of the common space, P pairs.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from data.captions import Split
from engine.train import progress
from engine.workers import side_by_side
from madtp.blocks import Guidance
from madtp.packing import select
from utils import Run, all_reduce_sum, gather_objects

SIMILARITIES = 2**24  # that are in memory at a time
PAIRS = 256  # that are matched at a time
PREDICTED = 10  # targets of each query that a run writes down


@dataclass
class Ranking:
    """For each query the numbers of its best targets and their scores, best first, (Q, k)."""

    candidates: Tensor
    scores: Tensor


def encode_images(model: nn.Module, split: Split, guidance: Guidance, run: Run) -> Tensor:
    """The normalised features of all images, (I, E) float32 on the CPU."""

    def encoded(batch: dict) -> Tensor:
        return model.encode_image(batch["image"].to(run.device, non_blocking=True), guidance).feature.cpu()

    features = list(side_by_side(encoded, progress(split.images, "pictures", run), run.device, model))
    return torch.stack(in_order(features))


def encode_texts(model: nn.Module, split: Split, guidance: Guidance, run: Run) -> tuple[Tensor, list[Tensor]]:
    """The normalised features of all texts, (T, E) float32 on the CPU, and the token ids of each without padding."""

    def encoded(batch: dict) -> tuple[Tensor, list[Tensor]]:
        text = [batch[name].to(run.device, non_blocking=True) for name in ("input_ids", "attention_mask")]
        tokens = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        return model.encode_text(*text, guidance).feature.cpu(), tokens

    batches = list(side_by_side(encoded, progress(split.texts, "captions", run), run.device, model))
    features, tokens = [features for features, _ in batches], [tokens for _, tokens in batches]
    return torch.stack(in_order(features)), in_order(tokens)


def in_order(batches: list) -> list:
    """The entries of the batches of all processes, in the order of the data set: a process's share is every n-th entry."""
    shares = [[entry for batch in share for entry in batch] for share in gather_objects(batches)]
    whole: list = [None] * sum(map(len, shares))
    for rank, share in enumerate(shares):
        whole[rank :: len(shares)] = share
    return whole


def best_candidates(queries: Tensor, targets: Tensor, number: int, device: torch.device) -> Ranking:
    """The `number` most similar targets of each query. (Q, E), (N, E); on the CPU but for the products."""
    targets = targets.to(device)
    at_a_time = max(1, SIMILARITIES // len(targets))
    with torch.autocast(device.type, enabled=False):  # in bfloat16 hundreds of targets would be equally similar
        best = [_first(part.to(device) @ targets.t(), number) for part in queries.split(at_a_time)]
    values, indices = (torch.cat(parts) for parts in zip(*best, strict=True))
    return Ranking(indices, values)


def _first(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The `number` highest scores (Q, n) and their places, on the CPU."""
    values, indices = _sorted(scores)
    return values[:, :number].cpu(), indices[:, :number].cpu()


def _sorted(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Each row, the best first; of equals the earlier one, and what is no number last."""
    return scores.masked_fill(scores.isnan(), -torch.inf).sort(dim=1, descending=True, stable=True)


def rerank(
    model: nn.Module, split: Split, tokens: list[Tensor], by_image: Ranking, by_text: Ranking, guidance: Guidance, run: Run,
) -> tuple[Ranking, Ranking]:  # fmt: skip
    """Both rankings by similarity plus the matching head's logit. A pair that is a candidate either way is matched once, and with
    all texts of its image at a time, so that an image's keys and values are computed once."""
    texts = len(tokens)
    keys = torch.cat([_keys_of(by_image, texts, False).flatten(), _keys_of(by_text, texts, True).flatten()]).unique()
    bounds = torch.searchsorted(keys, torch.arange(len(by_image.candidates) + 1) * texts).tolist()
    logits = torch.zeros(len(keys))

    def placed() -> Iterator[tuple[Tensor, range]]:
        """Yields the pictures of each batch with their places in the split."""
        place = run.rank
        for batch in progress(split.images, "matching", run):
            places = range(place, place + len(batch["image"]) * run.world_size, run.world_size)
            place = places.stop
            yield batch["image"], places

    def matched(given: tuple[Tensor, range]) -> None:
        pictures, places = given
        image = model.encode_image(pictures.to(run.device, non_blocking=True), guidance)
        for numbers, parts in _matching_passes([range(bounds[i], bounds[i + 1]) for i in places], guidance.packed):
            some, layout = select(image.tokens, image.layout, torch.tensor(numbers, device=run.device))
            if guidance.packed:
                layout = replace(layout, readers=tuple(map(len, parts)))
            wanted = torch.cat([torch.arange(part.start, part.stop) for part in parts])
            text = _padded([tokens[i] for i in (keys[wanted] % texts).tolist()], run.device)
            found, _ = model.match(*text, (some, layout), guidance.setting)
            logits[wanted] = found[:, 1].float().cpu()  # each batch has pairs of its own

    for _ in side_by_side(matched, placed(), run.device, model):
        pass
    logits = all_reduce_sum(logits.to(run.device)).cpu()
    return tuple(
        _reordered(ranking, logits[torch.searchsorted(keys, _keys_of(ranking, texts, of_texts))])
        for ranking, of_texts in ((by_image, False), (by_text, True))
    )


def _matching_passes(pairs: list[range], several: bool) -> Iterator[tuple[list[int], list[range]]]:
    """Given the pairs of each image: images that are matched in one pass, and which pairs of each. A pass holds as many as fit, or
    one image unless there may be `several`; those of one image are parted where they fit no pass."""
    numbers: list[int] = []
    parts: list[range] = []
    for number, own in enumerate(pairs):
        for start in range(0, len(own), PAIRS):
            part = own[start : start + PAIRS]
            if parts and not (several and sum(map(len, parts)) + len(part) <= PAIRS):
                yield numbers, parts
                numbers, parts = [], []
            numbers.append(number)
            parts.append(part)
    if parts:
        yield numbers, parts


def _keys_of(ranking: Ranking, texts: int, of_texts: bool) -> Tensor:
    """Each candidate pair as image * T + text, (Q, k)."""
    queries = torch.arange(len(ranking.candidates)).unsqueeze(1)
    return ranking.candidates * texts + queries if of_texts else queries * texts + ranking.candidates


def _padded(tokens: list[Tensor], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask (S, L)."""
    mask = nn.utils.rnn.pad_sequence([torch.ones_like(ids) for ids in tokens], batch_first=True)
    return nn.utils.rnn.pad_sequence(tokens, batch_first=True).to(device), mask.to(device)


def _reordered(ranking: Ranking, logits: Tensor) -> Ranking:
    scores, order = _sorted(ranking.scores + logits)
    return Ranking(ranking.candidates.gather(1, order), scores)


def rank(
    model: nn.Module, split: Split, guidance: Guidance, run: Run, number: int, matching: bool
) -> tuple[Ranking, Ranking]:
    """For each image its best `number` texts, and for each text its best images; with `matching`, ranked anew by the matching head.

    The same on every process.
    """
    images = encode_images(model, split, guidance, run)
    texts, tokens = encode_texts(model, split, guidance, run)
    by_image = best_candidates(images, texts, number, run.device)
    by_text = best_candidates(texts, images, number, run.device)
    return rerank(model, split, tokens, by_image, by_text, guidance, run) if matching else (by_image, by_text)


def predictions(by_image: Ranking, by_text: Ranking, names: list[str]) -> dict[str, dict]:
    """The best captions of each picture, as numbers, and the best pictures of each caption, as paths."""
    texts = by_image.candidates[:, :PREDICTED].tolist()
    images = by_text.candidates[:, :PREDICTED].tolist()
    return {
        "captions": dict(zip(names, texts, strict=True)),
        "pictures": {str(text): [names[image] for image in found] for text, found in enumerate(images)},
    }
