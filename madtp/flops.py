"""What a forward pass costs, in closed form, from the number of tokens that each block saw.

1 GFLOP = 1e9 multiply-adds as fvcore counts them: linear, matmul and convolution one per multiply-add, layer norm five per
element, everything else nothing. Token counts are integer tensors of any shape (one entry a sample), so padding costs nothing.
"""

from torch import Tensor

GIGA = 1e9
LAYER_NORM_FLOPS = 5  # per element, fvcore's convention


def linear(tokens: Tensor | int, in_features: int, out_features: int) -> Tensor | int:
    return tokens * in_features * out_features


def layer_norm(tokens: Tensor | int, dim: int) -> Tensor | int:
    return tokens * LAYER_NORM_FLOPS * dim


def scores(queries: Tensor | int, keys: Tensor | int, dim: int) -> Tensor | int:
    """QK^T, all heads together `dim` wide."""
    return queries * keys * dim


def attention(queries: Tensor | int, keys: Tensor | int, dim: int) -> Tensor | int:
    """QK^T and AV, all heads together `dim` wide."""
    return 2 * scores(queries, keys, dim)


def mlp(tokens: Tensor | int, dim: int, hidden: int) -> Tensor | int:
    return 2 * tokens * dim * hidden
