"""Multi-head attention over padded or packed batches, with the statistics that a pruning rule asks for.

B batch, H heads, Q queries, N keys, D channels of a head, C = H * D, T tokens of a packed batch.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.attention import varlen
from madtp.attention.statistics import attend_with_statistics, map_statistics, packed_statistics
from madtp.importance import AttentionStatistics
from madtp.packing import Groups, Layout, Packed, Valid, padded
from madtp.rule import PruningRule

# The position of the class token in the order of a causal sequence; in memory it is the first token in any case.
Causal = Literal["class_first", "class_last"] | None

# Multiply-adds that take about as long as the calls for one more group of samples: measured on a CPU; on a GPU estimated as the
# float32 work done in the time of some twenty kernel launches.
GROUP_COST = {"cpu": 2**24, "cuda": 2**31}


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    queries: Layout,
    keys: Layout,
    dropout: float = 0.0,
    rule: PruningRule | None = None,
    causal: Causal = None,
    training: bool = False,
) -> tuple[Tensor, AttentionStatistics | None]:
    """Computes softmax(Q K^T / sqrt(D)) V over the valid keys and, for a pruning rule that scores tokens, its statistics.

    For inference, packed batches never materialise the attention map, except in a causal self-attention: texts are short.

    Args:
        query: (B, Q, C), or packed (T, C).
        key, value: (B, N, C), or packed.
        queries, keys: their layouts; packed ones hold the same number of samples.
        rule: of the block that prunes; None where no statistics are needed.
        training: choose a path with a backward pass. Gradients choose it too, but alone they would not do: a recomputed forward
            pass (activation checkpointing) runs once without and once with gradients and must prune the same tokens.
    Returns:
        (B, Q, C) or (T, C); statistics or None.
    """
    if rule is not None and rule.needs_keys:
        attended, _ = attend(query, key, value, num_heads, queries, keys, dropout, None, causal, training)
        return attended, AttentionStatistics(keys=mean_keys(key, num_heads, keys, rule.num_prefix_tokens))
    rule = rule if rule is not None and rule.needs_scores else None
    training = training or torch.is_grad_enabled()
    if isinstance(queries, Packed) and isinstance(keys, Packed):
        if varlen.usable(query, num_heads) and not dropout and causal is None and keys.sizes is None:
            return _attend_varlen(query, key, value, num_heads, queries, keys, rule)
        return _attend_groups(query, key, value, num_heads, queries, keys, dropout, rule, causal, training)
    if isinstance(queries, Packed) or isinstance(keys, Packed):
        raise ValueError("queries and keys must both be packed, or neither")
    query, key, value = (split_heads(part, num_heads) for part in (query, key, value))
    out, statistics = _attend_padded(query, key, value, keys, dropout, rule, causal, training)
    return merge_heads(out), statistics


def recomputes_scores(x: Tensor, layout: Layout, num_heads: int) -> bool:
    """Tells whether statistics cost `attend` a second Q K^T on x: the kernel for all samples returns no attention map."""
    return isinstance(layout, Packed) and varlen.usable(x, num_heads)


def mean_keys(key: Tensor, num_heads: int, layout: Layout, num_prefix_tokens: int) -> Tensor:
    """Returns the mean of each token's keys over heads, without prefix tokens. (B, N, H * D), or packed -> (B, N - P, D)."""
    keys, _ = padded(key.detach().unflatten(-1, (num_heads, -1)).mean(dim=-2), layout)
    return keys[:, num_prefix_tokens:]


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def causal_mask(tokens: int, causal: Causal, device: torch.device) -> Tensor:
    """Marks the tokens (columns) that a token (row) may see: itself and those before it in the sequence's order, (N, N) bool."""
    order = torch.arange(tokens, device=device)
    if causal == "class_last":
        order = order.masked_fill(order == 0, tokens)
    return order.unsqueeze(1) >= order


def _attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    valid: Valid,
    dropout: float,
    rule: PruningRule | None,
    causal: Causal,
    training: bool,
    sizes: Tensor | None = None,
) -> tuple[Tensor, AttentionStatistics | None]:
    """Attends over (B, H, Q, D) and so on; statistics are read off the map, which a backward pass keeps in any case.

    sizes: (B, N) number of input tokens that each key stands for; as many equal keys would have its attention (Bolya et al., 2022)
    """
    if sizes is not None:
        sizes = sizes if valid is None else sizes.masked_fill(~valid, 0.0)  # log 0 masks padding
        return _attend_weighted(query, key, value, sizes, dropout), None
    mask = None if valid is None else valid[:, None, None, :]
    visible = None
    if causal is not None:
        allowed = causal_mask(query.shape[2], causal, query.device)
        mask, visible = allowed if mask is None else mask & allowed, allowed.sum(dim=1)
    # Fused attention keeps no map. Its backward pass in bf16 on a CPU takes several times as long as the plain products.
    fused = rule is None and not (training and query.device.type == "cpu")
    if fused:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout), None
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    attention = scores.softmax(dim=-1)
    out = F.dropout(attention, dropout).to(value.dtype) @ value
    return out, None if rule is None else map_statistics(attention, out, valid, rule, visible)


def _attend_weighted(query: Tensor, key: Tensor, value: Tensor, sizes: Tensor, dropout: float) -> Tensor:
    """Returns softmax(Q K^T / sqrt(D) + log sizes) V. (B, H, Q, D), (B, H, N, D) twice, (B, N) -> (B, H, Q, D)."""
    bias = sizes.log()[:, None, None, :].to(query.dtype)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
    return F.dropout(scores.softmax(dim=-1), dropout).to(value.dtype) @ value


def _attend_varlen(
    query: Tensor, key: Tensor, value: Tensor, num_heads: int, queries: Packed, keys: Packed, rule: PruningRule | None
) -> tuple[Tensor, AttentionStatistics | None]:
    """Runs one variable-length kernel for all samples."""
    query, key, value = (part.unflatten(-1, (num_heads, -1)) for part in (query, key, value))
    out, log_norm = varlen.attention(query, key, value, queries, keys)
    statistics = None if rule is None else packed_statistics(query, key, out, log_norm, keys, rule)
    return out.flatten(1), statistics


def _attend_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    num_heads: int,
    queries: Packed,
    keys: Packed,
    dropout: float,
    rule: PruningRule | None,
    causal: Causal,
    training: bool,
) -> tuple[Tensor, AttentionStatistics | None]:
    """Pads samples of similar length to one another and runs them together, so that a short sample costs little more than alone."""
    members = list(similar(queries.lengths, keys.lengths, query.shape[-1], GROUP_COST[query.device.type]))
    in_queries, in_keys = Groups(queries, members), Groups(keys, members)
    outs: list[Tensor] = []
    gathered: dict[str, Tensor] = {}
    prefix = 0 if rule is None else rule.num_prefix_tokens
    sizes = [None] * len(members) if keys.sizes is None else in_keys.split(keys.sizes)
    parts = zip(members, in_keys.layouts, sizes, in_queries.split(query), in_keys.split(key), in_keys.split(value), strict=True)
    for group, layout, weights, *projected in parts:
        q, k, v = (split_heads(part, num_heads) for part in projected)
        valid = None if layout.uniform else layout.valid
        if training or causal is not None or rule is None:
            out, found = _attend_padded(q, k, v, valid, dropout, rule, causal, training, weights)
        else:
            out, found = attend_with_statistics(q, k, v, valid, rule)
        outs.append(merge_heads(out))
        for name, values in () if found is None else vars(found).items():
            if values is not None:
                if name not in gathered:
                    gathered[name] = values.new_zeros(len(keys.lengths), keys.longest - prefix)
                gathered[name][group, : values.shape[1]] = values
    statistics = AttentionStatistics(gathered.get("class_attention"), gathered.get("columns"))
    return in_queries.join(outs), None if rule is None else statistics


def similar(queries: Sequence[int], keys: Sequence[int], width: int, group_cost: int) -> Iterator[list[int]]:
    """Groups samples that may be padded to one another, most keys first: a group ends where padding costs more than another group.

    In a group samples stand in their own order, so that a group of all samples need not be moved.

    Args:
        queries, keys: tokens of each sample.
        width: C.
        group_cost: multiply-adds that one more group is worth.
    """
    order = sorted(range(len(keys)), key=lambda i: (-keys[i], -queries[i]))
    group: list[int] = []
    longest, area = 0, 0  # queries of the longest sample; entries of the map that are not padding
    for sample in order:
        stretched = max(longest, queries[sample])
        wasted = (len(group) + 1) * stretched * keys[(group or [sample])[0]] - area - queries[sample] * keys[sample]
        if 2 * wasted * width > group_cost:
            yield sorted(group)
            group, area, stretched = [], 0, queries[sample]
        group.append(sample)
        longest, area = stretched, area + queries[sample] * keys[sample]
    yield sorted(group)
