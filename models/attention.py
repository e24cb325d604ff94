"""Multi-head attention on projected heads, with the statistics that a pruner asks for.

Shapes: B batch, H heads, Q queries, N keys, D width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.alignment import Valid
from madtp.importance import AttentionStatistics
from madtp.pruning import TokenPruner


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def attend(
    query: Tensor, key: Tensor, value: Tensor, valid: Valid = None, dropout: float = 0.0, pruner: TokenPruner | None = None
) -> tuple[Tensor, AttentionStatistics | None]:
    """softmax(Q K^T / sqrt(D)) V over the valid keys; with a pruner also the statistics that it needs of a self-attention.

    query (B, H, Q, D), key and value (B, H, N, D), valid (B, N) bool or None -> (B, H, Q, D), statistics or None
    """
    mask = None if valid is None else valid[:, None, None, :]
    # Fused attention keeps no map. Its backward pass in bf16 on a CPU takes several times as long as the plain products.
    fused = pruner is None and not (torch.is_grad_enabled() and query.device.type == "cpu")
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    attention = scores.softmax(dim=-1)
    out = F.dropout(attention, dropout).to(value.dtype) @ value
    if pruner is None:
        return out, None
    with torch.no_grad():
        return out, pruner.statistics(attention, out, valid)
