"""The column statistics of a self-attention without its map, from queries, keys and the softmax's normaliser.

An entry of the map is exp(q k / sqrt(D) - L_q) with L_q the log-sum-exp of its row, which fused attention has computed anyway.
The maximum commutes with the exponential, so only one exponential a column is left of the paper's form.

Shapes: B batch, H heads, N tokens with the class token first, D width of a head. The class token's row and column are left out.
"""

from collections.abc import Iterator
from functools import reduce
from itertools import chain

import torch
from torch import Tensor

from madtp.alignment import Valid

CHUNK = {"cpu": 2**21, "cuda": 2**26}  # entries of the map at a time: on a CPU they stay in its cache


def column_statistics(query: Tensor, key: Tensor, log_norm: Tensor, valid: Valid, summed: bool) -> Tensor:
    """One figure for each column of the attention map, in memory that grows with N alone.

    Args:
        query, key: (B, H, N, D).
        log_norm: (B, H, N) log-sum-exp of each row of q k / sqrt(D) over the valid keys.
        valid: (B, N). Queries that are padding are left out; the figures of keys that are padding mean nothing.
        summed: False: the largest entry of a column over queries and heads (Eq. 5); True: the sum over queries of the largest
            over heads, as the authors' code has it.
    Returns:
        (B, N - 1) float32.
    """
    if not summed:
        return row_and_columns(query, key, log_norm, valid)[1]
    parts = query[:, :, 1:], key[:, :, 1:], _without_padding(log_norm, valid)[:, :, 1:]
    chunk = CHUNK[query.device.type]
    return torch.cat([_sums_of_largest(*part, chunk) for part in zip(*(part.split(1) for part in parts), strict=True)])


def row_and_columns(query: Tensor, key: Tensor, log_norm: Tensor, valid: Valid) -> tuple[Tensor, Tensor]:
    """The class token's attention to each token (B, H, N - 1) and the largest entry of each column (B, N - 1), float32.

    One product gives both: the class token's row is the first of it. Arguments as of `column_statistics`.
    """
    samples, heads, tokens = log_norm.shape
    chunk = CHUNK[query.device.type]
    parts = [part.flatten(0, 1) for part in (query, key[:, :, 1:], _without_padding(log_norm, valid))]
    together = max(1, chunk // tokens**2)
    rows, largest = [], []
    for part in zip(*(part.split(together) for part in parts), strict=True):
        chunks = _logits(*part, chunk)
        first = next(chunks)
        rows.append(first[:, 0].clone().float())  # a view would keep the whole part alive
        others = (logits.amax(dim=1) for logits in chain([first[:, 1:]], chunks) if logits.shape[1])
        largest.append(reduce(torch.maximum, others, first.new_full((len(first), tokens - 1), float("-inf"))))
    row = torch.cat(rows).unflatten(0, (samples, heads))
    return row.exp(), torch.cat(largest).unflatten(0, (samples, heads)).amax(dim=1).float().exp()


def _without_padding(log_norm: Tensor, valid: Valid) -> Tensor:
    """(B, H, N, 1), infinite where the query is padding: its entries of the map are then 0."""
    return (log_norm if valid is None else log_norm.masked_fill(~valid[:, None], float("inf"))).unsqueeze(-1)


def _sums_of_largest(query: Tensor, key: Tensor, norm: Tensor, chunk: int) -> Tensor:
    """The same of one sample, for the form of the authors' code."""
    return sum(logits.amax(dim=0).float().exp().sum(dim=0) for logits in _logits(query[0], key[0], norm[0], chunk)).unsqueeze(0)


def _logits(query: Tensor, key: Tensor, norm: Tensor, chunk: int) -> Iterator[Tensor]:
    """log A (H, R, N) of R queries at a time. query, key (H, N, D), norm (H, N, 1)."""
    query, key = query * query.shape[-1] ** -0.5, key.transpose(1, 2)
    step = max(1, chunk // max(1, len(query) * key.shape[2]))
    for queries, norms in zip(query.split(step, dim=1), norm.split(step, dim=1), strict=True):
        yield (queries @ key).sub_(norms)


def class_row(query: Tensor, key: Tensor, log_norm: Tensor) -> Tensor:
    """The class token's attention to each token, (B, H, N - 1) float32."""
    logits = key[:, :, 1:] @ (query[:, :, :1] * query.shape[-1] ** -0.5).transpose(-2, -1)
    return (logits.float().squeeze(3) - log_norm[:, :, :1]).exp()
