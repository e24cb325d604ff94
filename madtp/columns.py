"""The column statistics of a self-attention without its map, from queries, keys and the softmax's normaliser.

An entry of the map is exp(q k / sqrt(D) - L_q) with L_q the log-sum-exp of its row, which fused attention has computed anyway.
The maximum commutes with the exponential, so only one exponential a column is left of the paper's form.

Shapes: B batch, H heads, N tokens with the class token first, D width of a head. The class token's row and column are left out.
"""

from collections.abc import Iterator

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
    parts = query[:, :, 1:], key[:, :, 1:], log_norm[:, :, 1:, None]
    if valid is not None:
        parts = *parts[:2], parts[2].masked_fill(~valid[:, None, 1:, None], float("inf"))
    chunk, (heads, tokens) = CHUNK[query.device.type], parts[2].shape[1:3]
    samples = 1 if summed else max(1, chunk // max(1, heads * tokens**2))
    figures = _sums_of_largest if summed else _largest
    return torch.cat([figures(*part, chunk) for part in zip(*(part.split(samples) for part in parts), strict=True)])


def _largest(query: Tensor, key: Tensor, norm: Tensor, chunk: int) -> Tensor:
    """query, key (B, H, N, D), norm (B, H, N, 1) -> (B, N)."""
    heads = [part.flatten(0, 1) for part in (query, key, norm)]
    together = max(1, chunk // max(1, norm.shape[2] ** 2))
    largest = [
        torch.stack([logits.amax(dim=1) for logits in _logits(*part, chunk)]).amax(dim=0)
        for part in zip(*(part.split(together) for part in heads), strict=True)
    ]
    return torch.cat(largest).unflatten(0, norm.shape[:2]).amax(dim=1).float().exp()


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
