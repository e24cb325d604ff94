"""Token importance score, TIS (paper, Eq. 4-6), of the prunable tokens: prefix tokens and padding are left out.

B batch, H heads, N prunable tokens, K learnable tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from madtp.packing import Valid
from madtp.selection import EPS


@dataclass
class AttentionStatistics:
    """The figures of a self-attention that the importance score uses; None where no term needs them.

    class_attention: (B, N) attention of the class token to each token, heads weighted by the norm of their output there
    columns: (B, N) one figure per column of the attention map (`paper_columns`, or `released.released_columns`)
    keys: (B, N, D) mean of the keys over heads, by which ToMe matches tokens
    """

    class_attention: Tensor | None = None
    columns: Tensor | None = None
    keys: Tensor | None = None

    def term(self, name: str) -> Tensor:
        """Returns the figures of the term "cls" or "self", (B, N)."""
        found = {"cls": self.class_attention, "self": self.columns}.get(name)
        if found is None:
            raise ValueError(f"attention was computed without the statistics of the term {name!r}")
        return found


def class_attention(class_row: Tensor, head_outputs: Tensor) -> Tensor:
    """Sums the class token's attention over heads, each weighted by its share of the output norm at the token (S_cls).

    Args:
        class_row: (B, H, N) attention from the class token.
        head_outputs: (B, H, N, D) outputs before the projection.
    Returns:
        (B, N)
    """
    norms = head_outputs.float().transpose(1, 2).norm(dim=-1).transpose(1, 2)  # (B, H, N), read in memory order
    return (class_row.float() * norms / (norms.sum(dim=1, keepdim=True) + EPS)).sum(dim=1)


def paper_columns(
    attention: Tensor, valid: Valid = None, num_prefix_tokens: int = 0, weights: Tensor | None = None
) -> Tensor:
    """Returns the largest attention that any query pays to each token in any head (Eq. 5). (B, H, N, N) -> (B, N - P).

    Args:
        valid: (B, N - P).
        num_prefix_tokens: P tokens in front that are left out, as queries and as tokens.
        weights: (N - P,) of the queries.
    """
    largest = attention.amax(dim=1)  # one dimension at a time: far faster than both at once
    # Prefix tokens are left out only now: an exported model would copy what is sliced off the whole map.
    largest = largest[:, num_prefix_tokens:, num_prefix_tokens:]
    if weights is not None:
        largest = largest * weights.unsqueeze(1)
    if valid is not None:
        largest = largest * valid.unsqueeze(2)
    return largest.amax(dim=1).float()


def normalise(score: Tensor, valid: Valid = None) -> Tensor:
    """Scales a score to sum 1 over the valid tokens, 0 elsewhere. (B, N) -> (B, N)."""
    if valid is not None:
        score = score.masked_fill(~valid, 0.0)
    return score / (score.sum(dim=-1, keepdim=True) + EPS)


def token_importance(
    statistics: AttentionStatistics, attention: Tensor | None, terms: tuple[str, ...], valid: Valid = None
) -> Tensor:
    """Returns TIS, the mean of those of S_cls, S_self and S_token that `terms` names (Eq. 4).

    Args:
        attention: (B, K, N) A_token; None without the term "token".
        terms: some of "cls", "self" and "token".
    Returns:
        (B, N), sums to 1 over the valid tokens.
    """
    scores = [statistics.term(term) if term != "token" or attention is None else attention.amax(dim=1) for term in terms]  # Eq. 6
    return torch.stack([normalise(score, valid) for score in scores]).mean(dim=0)
