"""Recall of image-text retrieval: scores in, percent out."""

import torch

# Q queries, N targets of each

MISS = torch.iinfo(torch.long).max  # the rank of what was not found at all
CUTS = (1, 5, 10)
CELLS = 2**20  # scores looked at together: some tens of MB of temporary memory


def best_ranks(scores: torch.Tensor, query_ids: torch.Tensor, target_ids: torch.Tensor) -> torch.Tensor:
    """The rank (Q,) of the best correct target of each query, from 0; MISS where none is correct.

    Targets are ranked by `scores` (Q, N), the highest first, of equal ones the earlier, NaN last. A target is correct when
    its id is the query's: `query_ids` (Q,); `target_ids` (N,), or (Q, N) where each query has candidates of its own.
    """
    rows = max(1, CELLS // scores.shape[1])
    ranks = []
    for start in range(0, len(scores), rows):
        part = slice(start, start + rows)
        targets = target_ids if target_ids.ndim == 1 else target_ids[part]
        ranks.append(_best_ranks(scores[part], query_ids[part, None] == targets))
    return torch.cat(ranks)


def _best_ranks(scores: torch.Tensor, correct: torch.Tensor) -> torch.Tensor:
    """The rank (Q,) of the best of the targets that are `correct` (Q, N)."""
    scores = scores.float().masked_fill(scores.isnan(), -torch.inf)  # no comparison holds for NaN: it would rank first
    best = scores.masked_fill(~correct, -torch.inf).amax(1, keepdim=True)
    equal = scores == best
    first = (equal & correct).int().argmax(1, keepdim=True)
    earlier = torch.arange(scores.shape[1], device=scores.device) < first
    ranks = ((scores > best) | (equal & earlier)).sum(1)
    return ranks.masked_fill(~correct.any(1), MISS)


def recalls(ranks_text: torch.Tensor, ranks_image: torch.Tensor) -> dict[str, float]:
    """Percent of the queries with a correct target among the first 1, 5 and 10, and the means, under BLIP's names.

    `ranks_text` are those of texts, which pictures were the queries for (txt_*); `ranks_image` the other way round (img_*).
    """
    found = {}
    for name, ranks in (("txt", ranks_text), ("img", ranks_image)):
        shares = [100 * (ranks < cut).double().mean().item() for cut in CUTS]
        found.update({f"{name}_r{cut}": share for cut, share in zip(CUTS, shares, strict=True)})
        found[f"{name}_r_mean"] = sum(shares) / len(shares)
    return {**found, "r_mean": (found["txt_r_mean"] + found["img_r_mean"]) / 2}


def candidate_recalls(texts: torch.Tensor, images: torch.Tensor, image_of_text: torch.Tensor) -> dict[str, float]:
    """As `recalls`, of the best texts of each image (I, k) and the best images of each text (T, k), as numbers, best first.

    image_of_text: (T,) the number of each text's image
    """
    found = []
    for candidates, own, theirs in ((texts, torch.arange(len(texts)), image_of_text[texts]), (images, image_of_text, images)):
        falling = torch.arange(candidates.shape[1], 0, -1).expand(candidates.shape)
        found.append(best_ranks(falling, own, theirs))
    return recalls(*found)
