"""The token importance score, TIS (paper, Eq. 4-6), of the prunable tokens: class token and padding left out.

Shapes: B batch, H heads, N prunable tokens, K learnable tokens. Position 0 of an attention map is the class token.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.alignment import Valid

EPS = 1e-8


@dataclass
class AttentionStatistics:
    """What pruning needs of a block's self-attention; None where no term asks for it.

    class_attention: (B, N) the class token's attention to each token, heads weighted by the norm of their output there
    columns: (B, N) one figure for each column of the map (see `paper_columns` and released.`released_columns`)
    """

    class_attention: Tensor | None
    columns: Tensor | None


def class_attention(class_row: Tensor, head_outputs: Tensor) -> Tensor:
    """Attention of the class token to token k, per head weighted by that head's share of the output norm at k, summed over heads.

    class_row: (B, H, N) attention from the class token; head_outputs: (B, H, N, D) outputs before the projection -> (B, N)
    """
    norms = head_outputs.float().transpose(1, 2).norm(dim=-1).transpose(1, 2)  # (B, H, N), read as it lies in memory
    return (class_row.float() * norms / (norms.sum(dim=1, keepdim=True) + EPS)).sum(dim=1)


def paper_columns(attention: Tensor, valid: Valid = None) -> Tensor:
    """The largest attention that any query pays to token k in any head (Eq. 5). (B, H, N, N) -> (B, N)."""
    largest = attention.amax(dim=1)  # one dimension at a time: far faster than both at once
    if valid is not None:
        largest = largest * valid.unsqueeze(2)
    return largest.amax(dim=1).float()


def normalise(score: Tensor, valid: Valid = None) -> Tensor:
    """(B, N) -> (B, N) that sums to 1 over the valid tokens and is 0 elsewhere."""
    if valid is not None:
        score = score.masked_fill(~valid, 0.0)
    return score / (score.sum(dim=-1, keepdim=True) + EPS)


def token_importance(statistics: AttentionStatistics, attention: Tensor, terms: tuple[str, ...], valid: Valid = None) -> Tensor:
    """TIS = mean of S_cls, S_self and S_token, of those that are named in `terms` (Eq. 4).

    attention: (B, K, N) A_token -> (B, N), sums to 1 over the valid tokens
    """
    scores = {
        "cls": lambda: statistics.class_attention,
        "self": lambda: statistics.columns,
        "token": lambda: attention.amax(dim=1),  # Eq. 6
    }
    return torch.stack([normalise(scores[term](), valid) for term in terms]).mean(dim=0)
