"""Counting the cost of a forward pass in closed form, from the number of tokens that each block saw.

1 GFLOP = 1e9 multiply-adds as fvcore counts them: linear, matmul and convolution one per multiply-add, layer norm five per
element, everything else nothing. Token counts are integer tensors of any shape (one entry per sample), so padding is free.
"""

from typing import TypeVar

from torch import Tensor, nn

Count = TypeVar("Count", Tensor, int)  # token counts, and the costs that follow from them

GIGA = 1e9
PATTERN, STANDS_FOR = "sparse_pattern", "stands_for"  # attributes of weights
LAYER_NORM_FLOPS = 5  # per element, fvcore's convention


def linear(tokens: Count, in_features: int, out_features: int) -> Count:
    return tokens * in_features * out_features


def products(tokens: Count, *weights: Tensor) -> Count:
    """Counts linear layers with these weights, (O, I) each; N:M sparse ones cost N / M."""
    return tokens * sum(multiplied(weight) for weight in weights)


def multiplied(weight: Tensor) -> int:
    """Counts the entries of a weight that cost a multiply-add per token; a stand-in counts as the weight it stands for."""
    weight = getattr(weight, STANDS_FOR, weight)
    kept, group = getattr(weight, PATTERN, None) or (1, 1)
    return weight.numel() * kept // group


def mark_sparse(weight: nn.Parameter, pattern: tuple[int, int] | None) -> None:
    """Makes `multiplied` count a weight as N:M sparse, or as dense for None."""
    setattr(weight, PATTERN, pattern)  # on the weight itself: costs are counted from weights alone


def layer_norm(tokens: Count, dim: int) -> Count:
    return tokens * LAYER_NORM_FLOPS * dim


def scores(queries: Count, keys: Count, dim: int) -> Count:
    """Counts QK^T; all heads together have `dim` channels."""
    return queries * keys * dim


def attention(queries: Count, keys: Count, dim: int) -> Count:
    """Counts QK^T and AV; all heads together have `dim` channels."""
    return 2 * scores(queries, keys, dim)
