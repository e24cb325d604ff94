"""Column statistics of packed self-attention as one Triton kernel: the same as `chunked.column_statistics`, in O(T) memory.

Importing it needs Triton, which PyTorch installs for NVIDIA GPUs. With TRITON_INTERPRET=1 it runs on a CPU, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from madtp.packing import Packed

BLOCK_QUERIES = 64
BLOCK_KEYS = 64


@triton.jit
def _columns(
    query, key, log_norm, offsets, result,
    scale, heads, query_row, query_head, key_row, key_head, norm_row, norm_head, result_row,
    PREFIX: tl.constexpr, WIDTH: tl.constexpr, WIDTH_BLOCK: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Computes one block of columns of one sample in one pass over its queries, all heads of a block of queries before the next."""
    sample = tl.program_id(1)
    first = tl.load(offsets + sample) + PREFIX  # prefix tokens are left out
    tokens = tl.load(offsets + sample + 1) - first
    columns = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    width = tl.arange(0, WIDTH_BLOCK)
    keys = key + (first + columns)[None, :] * key_row + width[:, None]
    keys_inside = (columns < tokens)[None, :] & (width < WIDTH)[:, None]
    figure = tl.full((KEYS,), float("-inf"), tl.float32)
    end = tl.where(tl.program_id(0) * KEYS < tokens, tokens, 0)  # short samples leave some blocks without a column
    for start in range(0, end, QUERIES):
        rows = start + tl.arange(0, QUERIES)
        queries = query + (first + rows)[:, None] * query_row + width[None, :]
        queries_inside = (rows < tokens)[:, None] & (width < WIDTH)[None, :]
        top = tl.full((QUERIES, KEYS), float("-inf"), tl.float32)
        for head in range(heads):
            q = tl.load(queries + head * query_head, mask=queries_inside, other=0.0)
            k = tl.load(keys + head * key_head, mask=keys_inside, other=0.0)
            norm = tl.load(log_norm + (first + rows) * norm_row + head * norm_head, mask=rows < tokens, other=float("inf"))
            top = tl.maximum(top, tl.dot(q, k, input_precision="ieee") * scale - norm[:, None])
        figure = tl.maximum(figure, tl.max(top, axis=0))
    tl.store(result + sample * result_row + columns, tl.exp(figure), mask=columns < tokens)


def packed_column_statistics(query: Tensor, key: Tensor, log_norm: Tensor, layout: Packed, num_prefix_tokens: int = 1) -> Tensor:
    """Returns the largest entry of each column of each sample's map, as `chunked.column_statistics` does.

    Args:
        query, key: (T, H, D), the D channels contiguous.
        log_norm: (T, H) log-sum-exp of each row.
        num_prefix_tokens: P.
    Returns:
        (B, N - P) float32, 0 for padding.
    """
    heads, width = query.shape[1:]
    tokens = layout.longest - num_prefix_tokens
    result = torch.zeros(len(layout.lengths), tokens, device=query.device)
    if tokens == 0:
        return result
    _columns[triton.cdiv(tokens, BLOCK_KEYS), len(layout.lengths)](
        query, key, log_norm, layout.offsets, result, width**-0.5, heads,
        query.stride(0), query.stride(1), key.stride(0), key.stride(1), log_norm.stride(0), log_norm.stride(1), result.stride(0),
        PREFIX=num_prefix_tokens, WIDTH=width, WIDTH_BLOCK=max(16, triton.next_power_of_2(width)),
        QUERIES=BLOCK_QUERIES, KEYS=BLOCK_KEYS,
    )  # fmt: skip
    return result
