"""Multi-head attention on projected heads, with the statistics that a pruner asks for.

Shapes: B batch, H heads, Q queries, N keys, D width of a head, C = H * D.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.alignment import Valid
from madtp.importance import AttentionStatistics
from madtp.packing import Groups, Packed
from madtp.pruning import Layout, TokenPruner
from madtp.attention import varlen

# Where the class token of a causal sequence stands in its order; in memory it is the first token in any case.
Causal = Literal["class_first", "class_last"] | None

# Multiply-adds that take about as long as the calls for one more group of samples: measured on a CPU; on a GPU an estimate, what it
# computes in float32 in the time of some twenty kernel launches.
GROUP_COST = {"cpu": 2**24, "cuda": 2**31}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    queries: Layout,
    keys: Layout,
    dropout: float = 0.0,
    pruner: TokenPruner | None = None,
    causal: Causal = None,
) -> tuple[Tensor, AttentionStatistics | None]:
    """softmax(Q K^T / sqrt(D)) V over the valid keys; with a pruner also the statistics that it needs of a self-attention.

    query (B, Q, C), key and value (B, N, C) with `keys` their mask or None -> (B, Q, C), statistics or None; or all of them
    packed, (T, C), where `queries` and `keys` say where the same number of samples lie. Without gradients, packed keeps no map,
    but for a `causal` self-attention: texts are short.
    """
    pruner = pruner if pruner is not None and pruner.needs_scores else None
    if isinstance(keys, Packed):
        if varlen.usable(query, num_heads) and not dropout and causal is None:
            return _attend_varlen(query, key, value, num_heads, queries, keys, pruner)
        return _attend_groups(query, key, value, num_heads, queries, keys, dropout, pruner, causal)
    heads = [split_heads(part, num_heads) for part in (query, key, value)]
    out, statistics = _attend_padded(*heads, keys, dropout, pruner, causal)
    return merge_heads(out), statistics


def scored_again(x: Tensor, layout: Layout, num_heads: int) -> bool:
    """Whether scores cost `attend` on x a second Q K^T: one kernel for all samples shows nothing of its map."""
    return isinstance(layout, Packed) and varlen.usable(x, num_heads)


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def causal_mask(tokens: int, causal: Causal, device: torch.device) -> Tensor:
    """Which tokens (columns) a token (row) may see: itself and those before it in the sequence's order, (N, N) bool."""
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    if causal == "class_last":
        mask[0], mask[1:, 0] = True, False
    return mask


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, valid: Valid, dropout: float, pruner: TokenPruner | None, causal: Causal = None
) -> tuple[Tensor, AttentionStatistics | None]:
    """The form for training: (B, H, Q, D) and so on; a pruner looks at the map, which the backward pass keeps in any case."""
    mask = None if valid is None else valid[:, None, None, :]
    if causal is not None:
        allowed = causal_mask(query.shape[2], causal, query.device)
        mask = allowed if mask is None else mask & allowed
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


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, queries: Packed, keys: Packed, pruner: TokenPruner | None
) -> tuple[Tensor, AttentionStatistics | None]:
    """One kernel for all samples."""
    parts = [part.unflatten(-1, (num_heads, -1)) for part in (query, key, value)]
    out, log_norm = varlen.attention(*parts, queries, keys)
    statistics = None if pruner is None else pruner.packed_statistics(*parts[:2], out, log_norm, keys)
    return out.flatten(1), statistics


def _attend_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    queries: Packed,
    keys: Packed,
    dropout: float,
    pruner: TokenPruner | None,
    causal: Causal,
) -> tuple[Tensor, AttentionStatistics | None]:
    """Samples of about equal length are padded to one another and go together, so a short sample costs little more than its due."""
    members = list(similar(queries.lengths, keys.lengths, query.shape[-1], GROUP_COST[query.device.type]))
    in_queries, in_keys = Groups(queries, members), Groups(keys, members)
    outs, figures = [], query.new_zeros(2, len(keys.lengths), keys.longest - 1, dtype=torch.float32)
    parts = zip(members, in_keys.layouts, in_queries.split(query), in_keys.split(key), in_keys.split(value), strict=True)
    for group, layout, *projected in parts:
        heads = [split_heads(part, num_heads) for part in projected]
        out, statistics = _attend_group(*heads, None if layout.uniform else layout.valid, dropout, pruner, causal)
        outs.append(merge_heads(out))
        for figure, found in zip(figures, statistics, strict=True):
            if found is not None:
                figure[group, : found.shape[1]] = found
    return in_queries.join(outs), None if pruner is None else AttentionStatistics(*figures)


def _attend_group(
    query: Tensor, key: Tensor, value: Tensor, valid: Valid, dropout: float, pruner: TokenPruner | None, causal: Causal
) -> tuple[Tensor, tuple[Tensor | None, Tensor | None]]:
    """Outputs, class attention and columns of one group; with the map where a backward pass will want it."""
    if torch.is_grad_enabled() or causal is not None or pruner is None:
        out, found = _attend_padded(query, key, value, valid, dropout, pruner, causal)
    else:
        out, found = pruner.attend(query, key, value, valid)
    return out, (None, None) if found is None else (found.class_attention, found.columns)


def similar(queries: Sequence[int], keys: Sequence[int], width: int, group_cost: int) -> Iterator[list[int]]:
    """Samples that may be padded to one another, most keys first: a group ends where padding costs more than one more group.
    In a group they stand in their own order, so that a group of all need not be moved.

    queries, keys: tokens of each sample
    """
    order = sorted(range(len(keys)), key=lambda i: (-keys[i], -queries[i]))
    group: list[int] = []
    longest, area = 0, 0  # queries of the longest, and entries of the map that are not padding
    for sample in order:
        stretched = max(longest, queries[sample])
        wasted = (len(group) + 1) * stretched * keys[(group or [sample])[0]] - area - queries[sample] * keys[sample]
        if 2 * wasted * width > group_cost:
            yield sorted(group)
            group, area, stretched = [], 0, queries[sample]
        group.append(sample)
        longest, area = stretched, area + queries[sample] * keys[sample]
    yield sorted(group)
