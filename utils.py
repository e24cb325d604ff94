"""What belongs to the process: its rank, its device, its seed, its logger, and errors that are the user's to mend."""

import argparse
import logging
import os
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # of processes with the main one, which may have captions to score

logger = logging.getLogger("madtp")


class UserError(Exception):
    """A mistake that the user can mend: what is wrong, where, and what to do, in one line."""


@dataclass(frozen=True)
class Run:
    """The process as the experiment sees it. Without a process group it is rank 0 of 1."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_run(device: str | None = None, seed: int = 42) -> Run:
    """Join the process group that torchrun announces (nccl on CUDA, gloo elsewhere), seed, and set up the logger.

    Args:
        device: "cpu", "cuda" (of several processes each its own) or "cuda:N"; None: CUDA when there is some.
    Raises:
        UserError: for a GPU that is not there, and for one GPU to several processes.
    """
    rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device}: there is no such kind of device; pass cpu or cuda") from None
    if chosen.type == "cuda":
        chosen = _gpu(chosen, world_size, local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = False  # of convolutions; products do without by default
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans anew for each shape, and pruned batches have ever new ones
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    seed_everything(seed)  # the same weights on every rank; training gives each rank random numbers of its own
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    return Run(chosen, rank, world_size)


def _gpu(device: torch.device, world_size: int, local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device; pass --device cpu")
    if device.index is not None and world_size > 1:
        raise UserError(f"--device {device}: {world_size} processes cannot share a GPU; pass --device cuda, and each takes its own")
    index, number = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if index >= number:
        raise UserError(f"GPU {index} is not there, this machine has {number}; start fewer processes or pass another --device")
    return torch.device("cuda", index)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """The sum of `values` over all processes; itself without a process group."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def broadcast(values: torch.Tensor) -> None:
    """Give `values` of the main process to all."""
    if dist.is_initialized():
        dist.broadcast(values, 0)


def gather_objects(value: object) -> list:
    """`value` of every rank, in the order of the ranks, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_main(compute: Callable[[], T], run: Run) -> T:
    """What `compute` gives on the main process, on every process."""
    found = [compute() if run.is_main else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, device=run.device)
    return found[0]


def gather_dicts(entries: dict) -> dict:
    """The entries of every rank in one dict, on every rank."""
    return {key: value for part in gather_objects(entries) for key, value in part.items()}


def gather_tensors(values: torch.Tensor) -> torch.Tensor:
    """(B, ...) of every process, of one shape everywhere, in the order of the ranks. Gradients find their way back."""
    return _Gather.apply(values) if dist.is_initialized() else values


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values: torch.Tensor) -> torch.Tensor:
        values = values.contiguous()
        gathered = [torch.empty_like(values) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, values)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        """Each process gets for its part what the losses of all processes want of it."""
        return all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format)).chunk(dist.get_world_size())[dist.get_rank()]


def gather_padded(values: torch.Tensor) -> torch.Tensor:
    """The same of (B, N, ...) whose N differs between processes: padded with zeros to the largest."""
    if not dist.is_initialized():
        return values
    width = torch.tensor(values.shape[1], device=values.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    return gather_tensors(F.pad(values, (0, 0) * (values.dim() - 2) + (0, int(width) - values.shape[1])))


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def at_least_one(text: str) -> int:
    """An argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def run_main(main: Callable[[], None]) -> None:
    """Call `main`; a UserError becomes one line on stderr and exit code 2.

    The process group is left when all went well: otherwise NCCL would wait there for processes that wait in a collective, and
    torchrun, which ends them, would not hear of the error.
    """
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if dist.is_initialized():
        dist.destroy_process_group()
