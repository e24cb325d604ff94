"""What a forward pass costs, in closed form, from the number of tokens that each block saw.

1 GFLOP = 1e9 multiply-adds as fvcore counts them: linear, matmul and convolution one per multiply-add, layer norm five per
element, everything else nothing. Token counts are integer tensors of any shape (one entry a sample), so padding costs nothing.
"""

from torch import Tensor, nn

GIGA = 1e9
LAYER_NORM_FLOPS = 5  # per element, fvcore's convention


def linear(tokens: Tensor | int, in_features: int, out_features: int) -> Tensor | int:
    return tokens * in_features * out_features


def products(tokens: Tensor | int, *weights: nn.Parameter) -> Tensor | int:
    """Linear layers with these weights, (O, I) each; N:M sparse ones cost N / M."""
    return tokens * sum(multiplied(weight) for weight in weights)


def multiplied(weight: nn.Parameter) -> int:
    """The entries of a weight, or of the one that it stands for, that cost a multiply-add a token."""
    weight = getattr(weight, "stands_for", weight)
    kept, group = getattr(weight, "sparse_pattern", None) or (1, 1)
    return weight.numel() * kept // group


def mark_sparse(weight: nn.Parameter, pattern: tuple[int, int] | None) -> None:
    """Have `multiplied` count a weight as N:M sparse, or as dense."""
    weight.sparse_pattern = pattern


def layer_norm(tokens: Tensor | int, dim: int) -> Tensor | int:
    return tokens * LAYER_NORM_FLOPS * dim


def scores(queries: Tensor | int, keys: Tensor | int, dim: int) -> Tensor | int:
    """QK^T, all heads together `dim` wide."""
    return queries * keys * dim


def attention(queries: Tensor | int, keys: Tensor | int, dim: int) -> Tensor | int:
    """QK^T and AV, all heads together `dim` wide."""
    return 2 * scores(queries, keys, dim)
