"""The formulas of the authors' published code where they differ from the paper (`variant: released`).

They exist so that the authors' checkpoints reproduce their numbers: raw inner products as a score that may be negative, an
unnormalised class attention, a temperature that divides, padding that takes part in scores, and masks that do not follow their
tokens. The deviations outside of the pruner are switched by `reads_padding` (VQA) and `text_order` (CLIP, for comparing unpruned
texts).

B batch, H heads, N prunable tokens, C channels, K learnable tokens.
"""

import torch
from torch import Tensor

from madtp.importance import AttentionStatistics
from madtp.packing import Valid
from madtp.selection import EPS, merge_weights


def released_columns(attention: Tensor) -> Tensor:
    """Returns the maximum over heads, summed over queries. (B, H, N, N) -> (B, N)."""
    return attention.amax(dim=1).sum(dim=1).float()


def released_importance(statistics: AttentionStatistics, products: Tensor, terms: tuple[str, ...]) -> Tensor:
    """Returns the importance (B, N) from the raw inner products with the learnable tokens, `products` (B, K, N)."""
    token = products.float().amax(dim=1)
    columns = statistics.term("self")
    scores = {
        "cls": statistics.term("cls"),
        "self": columns / (columns.sum(dim=-1, keepdim=True) + EPS),
        "token": token / (token.sum(dim=-1, keepdim=True) + EPS),
    }
    return torch.stack([scores[term] for term in terms]).mean(dim=0)


def released_threshold(products: Tensor, importance: Tensor, temperature: float) -> Tensor:
    """Returns the minimum over the K rows of softmax(products / T) times importance. (B, K, N), (B, N) -> (B,)."""
    weights = torch.softmax(products.float() / temperature, dim=-1)
    return (weights @ importance.unsqueeze(-1)).squeeze(-1).amin(dim=1)


def released_order(importance: Tensor, keep: int, mask_follows: bool) -> tuple[Tensor, Tensor]:
    """Returns the source indices of kept tokens and mask in the order of the CUDA kernel of `topk(sorted=False)`.

    The kernel lists everything above the last selected value by index, then that value. BLIP's decoder-type encoder
    (`mask_follows`) selects one more than it keeps and uses one index list for both; the NLVR2 encoder keeps its tokens in the
    kernel's order and gathers the mask in descending order.

    Returns:
        tokens (B, keep) and mask (B, keep + 1) indices; the merged token's mask is that of the best pruned token.
    """
    descending = importance.argsort(dim=-1, descending=True, stable=True)
    ahead = keep if mask_follows else keep - 1
    last = descending[:, ahead : ahead + 1]
    kernel_order = torch.cat([descending[:, :ahead].sort(dim=-1).values, last], dim=-1)
    if mask_follows:
        return kernel_order[:, :keep], kernel_order
    return kernel_order, descending[:, : keep + 1]


def released_gather(
    x: Tensor, valid: Valid, importance: Tensor, kept: Tensor, count: int, mask_follows: bool
) -> tuple[Tensor, Valid]:
    """Gathers and merges as the authors do, `count` tokens of every sample: x (B, 1 + N, C) -> (B, 2 + count, C) and its mask."""
    tokens_from, mask_from = released_order(importance, count, mask_follows)
    tokens = x[:, 1:]
    out = tokens.gather(1, tokens_from.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
    merged = merge_weights(importance, ~kept).to(x.dtype).unsqueeze(1) @ tokens
    if valid is not None:
        valid = torch.cat([valid[:, :1], valid[:, 1:].gather(1, mask_from)], dim=1)
    return torch.cat([x[:, :1], out, merged], dim=1), valid
