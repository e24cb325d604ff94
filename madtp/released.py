"""`variant: released`: what the authors' published code computes where it differs from the paper.

It exists so that their checkpoints give their numbers. Its formulas live in this file: the raw inner products as a score that may
be negative, the unnormalised class attention, the temperature that divides, padding that takes part in scores, and masks that do
not follow their tokens. `pruning` calls them and gathers in their order; what models do for it is switched by `mask_follows` (a
pruner), `reads_padding` (VQA) and `text_order` (CLIP, to compare unpruned texts).
"""

import torch
from torch import Tensor

from madtp.importance import EPS, AttentionStatistics


def released_columns(attention: Tensor) -> Tensor:
    """Maximum over heads, summed over queries. (B, H, N, N) -> (B, N)."""
    return attention.amax(dim=1).sum(dim=1).float()


def released_importance(statistics: AttentionStatistics, products: Tensor, terms: tuple[str, ...]) -> Tensor:
    """products: (B, K, N) raw inner products with the learnable tokens -> (B, N)."""
    token = products.float().amax(dim=1)
    scores = {
        "cls": statistics.class_attention,
        "self": statistics.columns / (statistics.columns.sum(dim=-1, keepdim=True) + EPS),
        "token": token / (token.sum(dim=-1, keepdim=True) + EPS),
    }
    return torch.stack([scores[term] for term in terms]).mean(dim=0)


def released_threshold(products: Tensor, importance: Tensor, temperature: float) -> Tensor:
    """Minimum over learnable tokens of softmax(products / T) against the importance. (B, K, N), (B, N) -> (B,)."""
    weights = torch.softmax(products.float() / temperature, dim=-1)
    return (weights @ importance.unsqueeze(-1)).squeeze(-1).amin(dim=1)


def released_order(importance: Tensor, keep: int, mask_follows: bool) -> tuple[Tensor, Tensor]:
    """Where kept tokens and the mask come from, in the order in which the CUDA kernel of `topk(sorted=False)` gives them.

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
