"""Timing of the matrix products with 2:4 weights, shape by shape, with dense and with sparse kernels."""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from engine.train import Precision
from madtp.sparsity.kernels import Milliseconds, Product, Stopwatch, products_of
from tools.benchmarks.contenders import check_sparse, dense_method, forward_of, random_inputs, sparse_models
from utils import UserError


@dataclass
class ShapeRow:
    """The times of a product of (rows, inputs) by an (outputs, inputs) weight. sparse_ms is None without a sparse kernel for it."""

    rows: int
    outputs: int
    inputs: int
    dtype: str
    dense_ms: float
    sparse_ms: float | None


def time_shapes(args: argparse.Namespace) -> list[ShapeRow]:
    """Times all products of the models that --sparse times.

    Raises:
        UserError: without a GPU, without --amp, or when the task has no sparse models.
    """
    device = torch.device(args.device)
    check_sparse(args)
    if not args.amp:
        raise UserError("--shapes: sparse kernels run in 16 bits; add --amp")
    if device.type != "cuda":
        raise UserError("--shapes: sparse kernels need a GPU; use --device cuda on a machine that has one")
    return timed(products_in(args, device), Stopwatch(device))


@torch.no_grad()
def products_in(args: argparse.Namespace, device: torch.device) -> list[Product]:
    """Collects the distinct products over all batch sizes, the largest weights first."""
    dense = dense_method(args, device).gflops
    found: set[Product] = set()
    for _, model, sparse, setting in sparse_models(args, device, dense):
        forward_with = forward_of(args, model, setting, setting.temperature is not None)
        for batch_size in args.batch_sizes:
            with Precision(device, args.amp).autocast():
                products = products_of(sparse.weights, forward_with(random_inputs(args, batch_size, device)))
            found |= {product for counts in products.values() for product in counts}
    return sorted(found, key=lambda product: (-product.outputs * product.inputs, product.outputs, -product.rows))


def timed(products: Sequence[Product], stopwatch: Callable[[Product], Milliseconds]) -> list[ShapeRow]:
    rows = []
    for product in products:
        dense, sparse = stopwatch(product)
        dtype = str(product.dtype).removeprefix("torch.")
        rows.append(ShapeRow(*product[:3], dtype, dense, sparse if math.isfinite(sparse) else None))
    return rows


def shapes_table(rows: Sequence[ShapeRow]) -> str:
    head = f"{'rows':>8}{'outputs':>9}{'inputs':>8}{'dense ms':>11}{'sparse ms':>11}{'speedup':>9}"
    lines = []
    for r in rows:
        sparse = f"{'-':>11}{'-':>9}" if r.sparse_ms is None else f"{r.sparse_ms:11.4f}{r.dense_ms / r.sparse_ms:9.2f}"
        lines.append(f"{r.rows:8d}{r.outputs:9d}{r.inputs:8d}{r.dense_ms:11.4f}{sparse}")
    return "\n".join([head, *lines])
