"""Attention statistics without materialising the attention map.

On a CPU the map is computed a few queries at a time, which stay in the cache, and the statistics are accumulated on the way. On a
GPU fused attention returns L_q, the log-sum-exp of each row, and an entry of the map is exp(q k / sqrt(D) - L_q) from a second
product. The maximum commutes with the exponential, so one exponential per column is enough for Eq. 5.

B batch, H heads, N tokens with P prefix tokens first (the class token at position 0 where there is one), D channels of a head.
Prefix rows and columns are left out of the column statistics.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from madtp.packing import Valid

CHUNK = {"cpu": 2**20, "cuda": 2**26}  # entries of the map computed at a time: on a CPU they stay in its cache


def attend_in_chunks(
    query: Tensor, key: Tensor, value: Tensor, valid: Valid, num_prefix_tokens: int = 1
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns attention, the first token's row of the map, and the largest entry of each column over queries and heads (Eq. 5).

    Args:
        query, key, value: (B, H, N, D).
        valid: (B, N), False is padding.
        num_prefix_tokens: P.
    Returns:
        (B, H, N, D), (B, H, N - P) and (B, N - P), the last two float32. Values at padding are undefined.
    """
    samples, heads, tokens, width = query.shape
    prefix, chunk = num_prefix_tokens, CHUNK[query.device.type]
    together = max(1, chunk // (heads * tokens**2))
    rows_at_once = max(1, chunk // (min(samples, together) * heads * tokens))
    out = torch.empty_like(query)
    row = query.new_empty(samples, heads, tokens - prefix, dtype=torch.float32)
    columns = query.new_zeros(samples, tokens - prefix, dtype=torch.float32)
    for first in range(0, samples, together):
        some = slice(first, first + together)
        keys, values = key[some].flatten(0, 1).transpose(1, 2), value[some].flatten(0, 1)
        queries = query[some].flatten(0, 1) * width**-0.5
        inside = None if valid is None else valid[some].unsqueeze(1).expand(-1, heads, -1).flatten(0, 1)
        for start in range(0, tokens, rows_at_once):
            stop = start + rows_at_once
            scores = queries[:, start:stop] @ keys
            if inside is not None:
                scores.masked_fill_(~inside.unsqueeze(1), torch.finfo(scores.dtype).min)
            attention = scores.softmax(dim=-1)
            if inside is not None:
                attention.mul_(inside[:, start:stop].unsqueeze(2))  # padding queries attend to nothing
            out[some, :, start:stop] = (attention @ values).unflatten(0, (-1, heads))
            if start == 0:
                row[some] = attention[:, 0, prefix:].unflatten(0, (-1, heads))
            attention = attention[:, max(0, prefix - start) :]
            if attention.shape[1] and tokens > prefix:
                largest = attention.amax(dim=1)[:, prefix:].unflatten(0, (-1, heads)).amax(dim=1)
                columns[some] = torch.maximum(columns[some], largest)
    return out, row, columns


def column_statistics(query: Tensor, key: Tensor, log_norm: Tensor, valid: Valid, num_prefix_tokens: int = 1) -> Tensor:
    """Returns the largest entry of each column of the attention map over queries and heads (Eq. 5), from a second product.

    Memory grows with N alone.

    Args:
        query, key: (B, H, N, D).
        log_norm: (B, H, N) log-sum-exp of each row of q k / sqrt(D) over the valid keys.
        valid: (B, N). Padding queries are left out; values at padding keys are undefined.
        num_prefix_tokens: P.
    Returns:
        (B, N - P) float32.
    """
    norm = (log_norm if valid is None else log_norm.masked_fill(~valid[:, None], float("inf"))).unsqueeze(-1)
    figures = []
    for queries, keys, norms in zip(*(part[:, :, num_prefix_tokens:] for part in (query, key, norm)), strict=True):
        largest = [logits.amax(dim=0).amax(dim=0) for logits in _logits(queries, keys, norms, CHUNK[query.device.type])]
        figures.append(torch.stack(largest).amax(dim=0).exp())
    return torch.stack(figures)


def _logits(query: Tensor, key: Tensor, norm: Tensor, chunk: int) -> Iterator[Tensor]:
    """Yields log A (H, R, N), float32, for R queries at a time. query, key (H, N, D), norm (H, N, 1)."""
    query, key = query.float() * query.shape[-1] ** -0.5, key.float().transpose(1, 2)
    step = max(1, chunk // max(1, len(query) * key.shape[2]))
    for queries, norms in zip(query.split(step, dim=1), norm.split(step, dim=1), strict=True):
        yield (queries @ key).sub_(norms)


def class_row(query: Tensor, key: Tensor, log_norm: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Returns the first token's attention to each token behind the prefix, (B, H, N - P) float32."""
    first = query[:, :, :1].float() * query.shape[-1] ** -0.5
    logits = key[:, :, num_prefix_tokens:].float() @ first.transpose(-2, -1)
    return (logits.squeeze(3) - log_norm[:, :, :1]).exp()
