"""The attention statistics that a pruning rule asks for, from the attention map or, packed on a GPU, without it.

B batch, H heads, N tokens with P prefix tokens first, D channels of a head, T tokens of a packed batch.
"""

import torch
from torch import Tensor

from madtp import released
from madtp.attention.chunked import attend_in_chunks, class_row, column_statistics
from madtp.importance import AttentionStatistics, class_attention, paper_columns
from madtp.packing import Packed, Valid
from madtp.rule import PruningRule


def map_statistics(
    attention: Tensor, head_outputs: Tensor, valid: Valid, rule: PruningRule, visible: Tensor | None = None
) -> AttentionStatistics:
    """Reads the statistics off an attention map. They are constants, but for a rule with `traces_attention`.

    Args:
        attention: (B, H, N, N) probabilities.
        head_outputs: (B, H, N, D).
        valid: (B, N).
        visible: (N,) number of tokens that each query sees in a causal attention, itself included.
    """
    prefix = rule.num_prefix_tokens
    with torch.set_grad_enabled(torch.is_grad_enabled() and rule.traces_attention):
        weights = None
        if visible is not None and rule.causal_scores != "plain":
            weights = _query_weights(visible[prefix:], rule.causal_scores)
        if rule.variant == "released":
            tokens = attention[:, :, prefix:, prefix:]
            columns = released.released_columns(tokens if weights is None else tokens * weights.unsqueeze(1))
        else:
            columns = paper_columns(attention, None if valid is None else valid[:, prefix:], prefix, weights)
        importance = class_attention(attention[:, :, 0, prefix:], head_outputs[:, :, prefix:]) if prefix else None
        return AttentionStatistics(importance, columns)


def _query_weights(visible: Tensor, causal_scores: str) -> Tensor:
    """Returns the weights (N,) of queries that see `visible` (N,) tokens, see `PruningRule`."""
    return (visible > 1).float() if causal_scores == "skip" else visible.float() / visible.max()


@torch.no_grad()
def attend_with_statistics(
    query: Tensor, key: Tensor, value: Tensor, valid: Valid, rule: PruningRule
) -> tuple[Tensor, AttentionStatistics]:
    """Returns attention and its statistics without materialising the map. (B, H, N, D) three times, (B, N) -> (B, H, N, D)."""
    prefix = rule.num_prefix_tokens
    out, row, columns = attend_in_chunks(query, key, value, valid, prefix)
    return out, AttentionStatistics(class_attention(row, out[:, :, prefix:]) if prefix else None, columns)


@torch.no_grad()
def packed_statistics(
    query: Tensor, key: Tensor, head_outputs: Tensor, log_norm: Tensor, layout: Packed, rule: PruningRule
) -> AttentionStatistics:
    """Recomputes the statistics of packed tokens from a fused kernel's log-sum-exp, in full precision.

    With a product in 16 bits, subtracting its norm would leave mostly rounding errors.

    Args:
        query, key, head_outputs: (T, H, D).
        log_norm: (T, H).
    """
    importance, columns, prefix = None, None, rule.num_prefix_tokens
    with torch.autocast(query.device.type, enabled=False):
        queries, keys, outputs, norms = (layout.pad(part).transpose(1, 2) for part in (query, key, head_outputs, log_norm))
        if "cls" in rule.scores:
            importance = class_attention(class_row(queries, keys, norms, prefix), outputs[:, :, prefix:])
        if "self" in rule.scores:
            try:
                from madtp.attention.triton import packed_column_statistics
            except ImportError:  # no Triton
                columns = column_statistics(queries, keys, norms, layout.valid, prefix)
            else:
                columns = packed_column_statistics(query, key, log_norm, layout, prefix)
    return AttentionStatistics(importance, columns)
