"""The column statistics of a self-attention without its map, from queries, keys and the softmax's normaliser.

An entry of the map is exp(q k / sqrt(D) - L_q) with L_q the log-sum-exp of its row, which fused attention has computed anyway.
The maximum commutes with the exponential, so only one exponential a column is left of the paper's form.

Shapes: B batch, H heads, N tokens with the class token first, D width of a head. The class token's row and column are left out.
"""

import torch
from torch import Tensor

from madtp.alignment import Valid

CHUNK = 2**20  # entries of the map at a time: 4 MB


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
    query, key, norm = query[:, :, 1:] * query.shape[-1] ** -0.5, key[:, :, 1:].transpose(-2, -1), log_norm[:, :, 1:]
    if valid is not None:
        norm = norm.masked_fill(~valid[:, None, 1:], float("inf"))
    batch, heads, tokens = norm.shape
    result = query.new_full((batch, tokens), 0.0 if summed else float("-inf"), dtype=torch.float32)
    step = max(1, CHUNK // max(1, batch * heads * tokens))
    for start in range(0, tokens, step):
        rows = slice(start, start + step)
        logits = (query[:, :, rows] @ key).sub_(norm[:, :, rows, None])
        if summed:
            result += logits.amax(dim=1).float().exp().sum(dim=1)
        else:
            torch.maximum(result, logits.amax(dim=(1, 2)).float(), out=result)
    return result if summed else result.exp()


def class_row(query: Tensor, key: Tensor, log_norm: Tensor) -> Tensor:
    """The class token's attention to each token, (B, H, N - 1) float32."""
    logits = (query[:, :, :1] * query.shape[-1] ** -0.5) @ key[:, :, 1:].transpose(-2, -1)
    return (logits.float().squeeze(2) - log_norm[:, :, :1]).exp()
