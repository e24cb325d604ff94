"""Which sparse weights run sparse kernels in an evaluation: those that are faster so, as measured here and now."""

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
    """Inside, masked weights run sparse kernels where these are faster; yields how many do, "used", "of" how many.

    Args:
        wanted: the key `sparse_kernels`.
        forward: a pass such as those inside, whose products are measured.
    """
    chosen = _choose(wanted, sparse, device, forward) if sparse is not None and sparse.masks else {}
    with on_sparse_kernels(model, chosen):
        yield {"used": len(chosen), "of": len(sparse.masks) if sparse else 0}


def _choose(wanted: bool, sparse: SparseWeights, device: torch.device, forward: Callable[[], object]) -> dict[str, torch.dtype]:
    """The names of weights, and the type that their products have."""
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
    chosen = gather_objects(chosen)[0]  # one choice for all processes, whatever each has measured
    shapes = Counter("{} x {}".format(*sparse.weights[name].shape) for name in chosen)
    logger.info(
        "sparse kernels: %d of %d layers%s", len(chosen), len(sparse.masks),
        "".join(f", {number} of {shape}" for shape, number in sorted(shapes.items())),
    )  # fmt: skip
    return chosen


def _dense(reason: str) -> dict[str, torch.dtype]:
    logger.info("sparse kernels: dense ones run everywhere: %s", reason)
    return {}
