"""Counting the cost of a forward pass in closed form, from the number of tokens that each block saw.

1 GFLOP = 1e9 multiply-adds as fvcore counts them: linear, matmul and convolution one per multiply-add, layer norm five per
element, everything else nothing. Token counts are integer tensors of any shape (one entry per sample), so padding is free.
"""

from torch import Tensor, nn

GIGA = 1e9
LAYER_NORM_FLOPS = 5  # per element, fvcore's convention


def linear(tokens: Tensor | int, in_features: int, out_features: int) -> Tensor | int:
    return tokens * in_features * out_features


def products(tokens: Tensor | int, *weights: nn.Parameter) -> Tensor | int:
    """Counts linear layers with these weights, (O, I) each; N:M sparse ones cost N / M."""
    return tokens * sum(multiplied(weight) for weight in weights)


def multiplied(weight: nn.Parameter) -> int:
    """Counts the entries of a weight that cost a multiply-add per token; a stand-in counts as the weight it stands for."""
    weight = getattr(weight, "stands_for", weight)
    kept, group = getattr(weight, "sparse_pattern", None) or (1, 1)
    return weight.numel() * kept // group


def mark_sparse(weight: nn.Parameter, pattern: tuple[int, int] | None) -> None:
    """Makes `multiplied` count a weight as N:M sparse, or as dense for None."""
    weight.sparse_pattern = pattern


def layer_norm(tokens: Tensor | int, dim: int) -> Tensor | int:
    return tokens * LAYER_NORM_FLOPS * dim


def scores(queries: Tensor | int, keys: Tensor | int, dim: int) -> Tensor | int:
    """Counts QK^T; all heads together have `dim` channels."""
    return queries * keys * dim


def attention(queries: Tensor | int, keys: Tensor | int, dim: int) -> Tensor | int:
    """Counts QK^T and AV; all heads together have `dim` channels."""
    return 2 * scores(queries, keys, dim)
