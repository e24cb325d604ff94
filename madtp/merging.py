"""ToMe, token merging by bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023), a baseline.

B batch, N tokens without prefix tokens, C channels, D channels of a head's key.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def most_similar_pairs(keys: Tensor, counts: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Matches tokens at odd positions with tokens at even positions, counted from 0, and chooses the most similar pairs.

    With a class token in front, which takes part in no pair, these are the paper's sets A and B.

    Args:
        keys: (B, N, D) mean of each token's keys over heads.
        counts: (B,) pairs to choose, at most half of a sample's tokens.
        valid: (B, N) False is padding.
    Returns:
        merged (B, N) bool, the tokens of A that are merged, and partner (B, N), the position of the token that each is added to,
        its own for the others
    """
    keys = F.normalize(keys.float(), dim=-1)
    similarity = keys[:, 1::2] @ keys[:, 0::2].transpose(1, 2)
    similarity = similarity.masked_fill(~valid[:, None, 0::2], float("-inf"))
    best, which = similarity.max(dim=2)
    best = best.masked_fill(~valid[:, 1::2], float("-inf"))
    order = best.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
    merged, partner = torch.zeros_like(valid), torch.arange(valid.shape[1], device=valid.device).repeat(len(valid), 1)
    merged[:, 1::2] = rank < counts.unsqueeze(1)
    partner[:, 1::2] = torch.where(merged[:, 1::2], 2 * which, partner[:, 1::2])
    return merged, partner


def merge_pairs(x: Tensor, sizes: Tensor, merged: Tensor, partner: Tensor) -> tuple[Tensor, Tensor]:
    """Adds each merged token to its partner, which becomes their mean weighted by size. Merged tokens keep their place.

    Args:
        x: (B, N, C).
        sizes: (B, N) number of input tokens that each token stands for.
        merged, partner: from `most_similar_pairs`.
    Returns:
        (B, N, C) and the sizes (B, N).
    """
    together = torch.zeros_like(sizes).scatter_add(1, partner, sizes)
    weighted = torch.zeros_like(x).scatter_add(1, partner.unsqueeze(-1).expand_as(x), x * sizes.unsqueeze(-1).to(x.dtype))
    means = weighted / together.clamp(min=1).unsqueeze(-1).to(x.dtype)
    untouched = merged | (together == sizes)  # to the last bit
    return torch.where(untouched.unsqueeze(-1), x, means), torch.where(merged, sizes, together)


def matching_flops(tokens: Tensor, dim: int) -> Tensor:
    """Counts the multiply-adds of the similarities of `tokens` (B,) tokens, whose keys have `dim` channels."""
    return (tokens // 2) * (tokens - tokens // 2) * dim
