"""Sparse kernels in an evaluation: each 2:4 weight uses one if that is measured to be faster on this GPU."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from madtp.sparsity.kernels import PATTERN, Stopwatch, faster_sparse, on_sparse_kernels, products_of
from madtp.sparsity.masks import SparseWeights
from utils import gather_objects, logger


@contextmanager
def sparse_kernels(
    wanted: bool, model: nn.Module, sparse: SparseWeights | None, device: torch.device, forward: Callable[[], object]
) -> Iterator[dict[str, int]]:
    """A context manager in which masked weights run sparse kernels if these are faster.

    Yields the number of weights that do ("used") and of all sparse weights ("of").

    Args:
        wanted: the config key `sparse_kernels`.
        model: the model.
        sparse: its sparse weights, if any.
        device: the device that it runs on.
        forward: a typical pass. The matrix products in it are timed.
    """
    chosen = _choose(wanted, sparse, device, forward) if sparse is not None and sparse.masks else {}
    with on_sparse_kernels(model, chosen):
        yield {"used": len(chosen), "of": len(sparse.masks) if sparse else 0}


def _choose(wanted: bool, sparse: SparseWeights, device: torch.device, forward: Callable[[], object]) -> dict[str, torch.dtype]:
    """Returns the names of the weights that use sparse kernels, with the dtype of their products."""
    if device.type != "cuda":
        return _dense("this is no GPU")
    if not wanted:
        return _dense("sparse_kernels is false")
    if sparse.pattern != PATTERN:
        return _dense("no weights are 2:4")
    products = products_of({name: sparse.weights[name] for name in sparse.masks}, forward)
    if not products:
        return _dense("no 2:4 layer runs in 16 bits; set amp: true")
    chosen = {name: next(iter(products[name])).dtype for name in faster_sparse(products, Stopwatch(device))}
    chosen = gather_objects(chosen)[0]  # timings differ between processes; all use the choice of rank 0
    shapes = Counter("{} x {}".format(*sparse.weights[name].shape) for name in chosen)
    logger.info(
        "sparse kernels: %d of %d layers%s", len(chosen), len(sparse.masks),
        "".join(f", {number} of {shape}" for shape, number in sorted(shapes.items())),
    )  # fmt: skip
    return chosen


def _dense(reason: str) -> dict[str, torch.dtype]:
    logger.info("sparse kernels: not used, dense ones run everywhere: %s", reason)
    return {}
