"""Counting the products that a model executes, independently of the project's own counter."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@contextmanager
def counting_products() -> Iterator[FlopCounterMode]:
    """Counts the multiply-adds of all products, each as two; dead code counts, layer norms do not.

    Attention runs as plain products: which fused kernels there are, and which of them the counter knows, differs between versions
    of PyTorch.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        yield counter
