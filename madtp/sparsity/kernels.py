"""Running 2:4 weights on PyTorch's semi-structured sparse kernels, where these are faster than dense ones: on a GPU, in 16 bits.

The shapes of a weight's products depend on the model, the data and the pruning. They are recorded in a forward pass, and each
product is timed dense and sparse.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.sparse import to_sparse_semi_structured

from madtp import flops
from madtp.sparsity.hooks import LinearInputHook
from madtp.sparsity.masks import Pattern, magnitude_mask

PATTERN = Pattern(2, 4)
DTYPES = (torch.float16, torch.bfloat16)
GAIN = 0.03  # share of a weight's time that sparse kernels must save
TOLERANCE = 0.02  # of a sparse product, relative to its largest entry
WARM_UP, REPEATS, ROUNDS = 10, 50, 3  # dense and sparse in turn: an idle GPU takes a while to reach full speed

Convert = Callable[[Tensor], Tensor]
Clock = Callable[[Callable[[], object]], float]


class Product(NamedTuple):
    """The product of `rows` vectors of `inputs` channels with an (outputs, inputs) weight."""

    rows: int
    outputs: int
    inputs: int
    dtype: torch.dtype


class Milliseconds(NamedTuple):
    dense: float
    sparse: float


def milliseconds(call: Callable[[], object]) -> float:
    """Times a call, averaged over many after a warm-up: its time on the GPU, or the time to launch it if that is longer."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    for _ in range(WARM_UP):
        call()
    start.record()
    for _ in range(REPEATS):
        call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / REPEATS


def to_sparse(weight: Tensor) -> Tensor:
    """Converts a 2:4 weight to the kernels' format."""
    return by_rows(to_sparse_semi_structured(weight))


def by_rows(weight: Tensor) -> Tensor:
    """Makes products row-major, as dense ones are.

    With cuSPARSELt, older versions of PyTorch transpose them otherwise, and lose this setting whenever the tensor is wrapped.
    """
    if hasattr(weight, "fuse_transpose_cusparselt"):
        weight.fuse_transpose_cusparselt = True
    return weight


class Stopwatch:
    """Times products dense and sparse, each once. A product that sparse kernels refuse or compute wrongly takes infinite time."""

    def __init__(self, device: torch.device, clock: Clock = milliseconds, convert: Convert = to_sparse):
        self.device, self.clock, self.convert = device, clock, convert
        self.measured: dict[Product, Milliseconds] = {}

    @torch.no_grad()
    def __call__(self, product: Product) -> Milliseconds:
        if product not in self.measured:
            self.measured[product] = self._measure(product)
        return self.measured[product]

    def _measure(self, product: Product) -> Milliseconds:
        rows, outputs, inputs, dtype = product
        x, bias = (torch.randn(shape, device=self.device, dtype=dtype) for shape in ((rows, inputs), (outputs,)))
        weight = torch.randn(outputs, inputs, device=self.device, dtype=dtype)
        weight = weight * magnitude_mask(weight, PATTERN)
        try:
            sparse = self.convert(weight)
            as_good = _is_as_good(F.linear(x, sparse, bias), F.linear(x, weight, bias))
        except RuntimeError:
            as_good = False
        if not as_good:
            return Milliseconds(self.clock(lambda: F.linear(x, weight, bias)), float("inf"))
        both = [[self.clock(partial(F.linear, x, w, bias)) for w in (weight, sparse)] for _ in range(ROUNDS)]
        return Milliseconds(*map(median, zip(*both, strict=True)))


def _is_as_good(result: Tensor, expected: Tensor) -> bool:
    """Tells whether a product may replace another. Older versions of PyTorch return it transposed; attention kernels read rows."""
    return result.is_contiguous() and bool((result - expected).abs().max() <= TOLERANCE * expected.abs().max())


def products_of(weights: Mapping[str, Tensor], forward: Callable[[], object]) -> dict[str, Counter[Product]]:
    """Counts each weight's products in a forward pass; weights that sparse kernels cannot run are left out."""
    products: dict[str, Counter[Product]] = {}
    unfit: set[str] = set()

    def record(name: str, x: Tensor) -> None:
        outputs, inputs = weights[name].shape
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        counts = products.setdefault(name, Counter())
        counts[Product(x.numel() // inputs, outputs, inputs, dtype)] += 1
        mixed = len({product.dtype for product in counts}) > 1
        if dtype not in DTYPES or mixed or not x.is_contiguous():  # the kernels take a view of the rows
            unfit.add(name)

    with torch.no_grad(), LinearInputHook(weights, record):
        forward()
    return {name: counts for name, counts in products.items() if name not in unfit}


def faster_sparse(products: Mapping[str, Counter[Product]], stopwatch: Callable[[Product], Milliseconds]) -> list[str]:
    """Returns the weights whose products together are faster on sparse kernels, by more than noise."""
    chosen = []
    for name, counts in products.items():
        times = [(number, stopwatch(product)) for product, number in counts.items()]
        dense, sparse = sum(number * time.dense for number, time in times), sum(number * time.sparse for number, time in times)
        if sparse <= (1 - GAIN) * dense:
            chosen.append(name)
    return chosen


@contextmanager
def on_sparse_kernels(model: nn.Module, dtypes: Mapping[str, torch.dtype], convert: Convert = to_sparse) -> Iterator[None]:
    """Context manager that replaces the named parameters by sparse tensors of these types, for inference only."""
    weights = {name: model.get_parameter(name) for name in dtypes}
    try:
        for name, dtype in dtypes.items():
            stand_in = by_rows(nn.Parameter(convert(weights[name].detach().to(dtype)), requires_grad=False))
            setattr(stand_in, flops.STANDS_FOR, weights[name])
            _put(model, name, stand_in)
        yield
    finally:
        for name, weight in weights.items():
            _put(model, name, weight)


def _put(model: nn.Module, name: str, weight: Tensor) -> None:
    owner, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(owner), attribute, weight)
