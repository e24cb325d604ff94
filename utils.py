"""Process-wide helpers: ranks and collectives, device, seed, logger, and errors that the user can fix."""

import argparse
import errno
import logging
import os
import random
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.rendezvous import rendezvous

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # timeout of collectives; the others wait while the main process scores captions
# Words of the errors of a collective whose other side has gone.
GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")

# What to do about the errors of a file system that the user can mend.
FILE_ERRORS = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "make room, or write to another place"),
    **dict.fromkeys((errno.EROFS, errno.EACCES), "change what is allowed there, or give another place"),
}

logger = logging.getLogger("madtp")


class UserError(Exception):
    """A mistake that the user can fix. The message says in one line what is wrong, where, and what to do."""


class SharedError(UserError):
    """A UserError that all processes raise alike; the main process tells it."""


@dataclass(frozen=True)
class Run:
    """The device and rank of this process. Without a process group it is rank 0 of 1."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def init_run(device: str | None = None, seed: int = 42) -> Run:
    """Joins the process group of torchrun or of SLURM's srun (nccl on CUDA, gloo elsewhere), seeds, and sets up the logger.

    Args:
        device: "cpu", "cuda" (one GPU per process) or "cuda:N"; None is "cuda" if available, else "cpu".
        seed: of all random numbers; the same on every rank.

    Raises:
        UserError: when the GPU does not exist, several processes are given the same GPU, or they do not know where to meet.
    """
    _understand_slurm()
    rank, world_size, local_rank = (int(os.environ.get(k, d)) for k, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {device}: there is no such kind of device; pass cpu or cuda") from None
    if chosen.type == "cuda":
        chosen = _gpu(chosen, world_size, local_rank)
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.allow_tf32 = False  # for convolutions; matrix products have it off by default
        torch.backends.cuda.enable_cudnn_sdp(False)  # it builds a plan per shape, and pruned batches keep changing shape
    if "RANK" in os.environ and not dist.is_initialized():
        _join("nccl" if chosen.type == "cuda" else "gloo", rank, world_size)
    seed_everything(seed)  # equal initial weights on every rank; training seeds each rank differently
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(message)s", stream=sys.stdout)
    return Run(chosen, rank, world_size)


def _join(backend: str, rank: int, world_size: int) -> None:
    """Joins the process group."""
    attempt, store = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), None
    if attempt != "0" and os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]:
        # torchrun's store still holds the addresses of the processes before. Its machines count restarts differently.
        store = dist.PrefixStore(f"attempt {attempt}", next(rendezvous("env://"))[0])
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=PATIENCE)


def _understand_slurm() -> None:
    """Sets torchrun's variables from those of SLURM, where srun has started several processes and not torchrun."""
    here = os.environ
    if "RANK" in here or "SLURM_PROCID" not in here or int(here.get("SLURM_NTASKS", 1)) < 2:
        return
    rank, processes = here["SLURM_PROCID"], here["SLURM_NTASKS"]
    if "MASTER_ADDR" not in here and not here.get("SLURM_STEP_NODELIST"):
        raise UserError(
            f"SLURM calls this process {rank} of {processes}, but not where they meet; start the script with srun or torchrun, or"
            " set MASTER_ADDR and MASTER_PORT; for a single process, unset SLURM_PROCID"
        )
    job, step = (int(here.get(key, 0)) for key in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    here.setdefault("MASTER_ADDR", first_host(here.get("SLURM_STEP_NODELIST", "")))
    here.setdefault("MASTER_PORT", str(20000 + (16 * job + step) % 20000))  # jobs on one node seldom share it
    is_bound = here.get("CUDA_VISIBLE_DEVICES", ",").isdigit()  # SLURM shows each process its own GPU alone
    here.update(RANK=rank, WORLD_SIZE=processes, LOCAL_RANK="0" if is_bound else here.get("SLURM_LOCALID", "0"))


def first_host(nodes: str) -> str:
    """Returns the first host of SLURM's list, such as node003 of `node[003-007,012],login1`."""
    found = re.match(r"([^,\[]*)(?:\[(\d+)[^\]]*\])?([^,\[]*)", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _gpu(device: torch.device, world_size: int, local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        raise UserError("--device cuda: this machine has no usable CUDA device; pass --device cpu")
    if device.index is not None and world_size > 1:
        raise UserError(f"--device {device}: {world_size} processes cannot share a GPU; pass --device cuda to give each its own")
    index, number = local_rank if device.index is None else device.index, torch.cuda.device_count()
    if index >= number:
        raise UserError(f"GPU {index} is not there, this machine has {number}; start fewer processes or pass another --device")
    return torch.device("cuda", index)


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sums `values` over all processes, in place. Without a process group they stay as they are."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Replaces `values` by their largest over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(values, dist.ReduceOp.MAX)
    return values


def broadcast(values: torch.Tensor) -> None:
    """Copies the `values` of the main process to all processes, in place."""
    if dist.is_initialized():
        dist.broadcast(values, 0)


def gather_objects(value: object) -> list:
    """Returns the `value` of every rank, in rank order, on every rank."""
    if not dist.is_initialized():
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def on_main(compute: Callable[[], T], run: Run) -> T:
    """Calls `compute` on the main process only. Returns its result on every process."""
    found = [compute() if run.is_main else None]
    if dist.is_initialized():
        dist.broadcast_object_list(found, device=run.device)
    return found[0]


def gather_dicts(entries: dict) -> dict:
    """Merges the entries of all ranks into one dict, on every rank."""
    return {key: value for part in gather_objects(entries) for key, value in part.items()}


def gather_tensors(values: torch.Tensor) -> torch.Tensor:
    """Concatenates the `values` (B, ...) of all processes in rank order. The shape must be the same on every process.

    Gradients flow back to every process, unlike with torch.distributed.all_gather.
    """
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
        """Sums the gradients of all processes and returns the part of this process."""
        return all_reduce_sum(gradient.clone(memory_format=torch.contiguous_format)).chunk(dist.get_world_size())[dist.get_rank()]


def gather_padded(values: torch.Tensor) -> torch.Tensor:
    """Concatenates `values` (B, N, ...) like gather_tensors. N may differ: it is padded with zeros to the largest."""
    if not dist.is_initialized():
        return values
    width = torch.tensor(values.shape[1], device=values.device)
    dist.all_reduce(width, dist.ReduceOp.MAX)
    return gather_tensors(F.pad(values, (0, 0) * (values.dim() - 2) + (0, int(width) - values.shape[1])))


def put_in_place(temporary: Path, path: Path) -> None:
    """Renames a file that was written aside. Its content is on the disk before its name is, even if the power fails."""
    flush(temporary)
    os.replace(temporary, path)
    with suppress(OSError):  # some file systems do not flush folders
        flush(path.parent)


def flush(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def leave_process_group() -> None:
    """Destroys the process group where there is one. All processes have to call this."""
    if dist.is_initialized():
        # With PyTorch 2.7, gloo's thread needs the interpreter's lock to free the last collective, and destroying the group holds
        # that lock while it waits for the thread. So the last collective is held here, and freed afterwards.
        last = dist.barrier(async_op=True)
        last.wait()
        dist.destroy_process_group()


def at_least_one(text: str) -> int:
    """Parses a whole number of at least 1; an argparse type."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def home_expanded(text: str) -> str:
    """Returns a path with `~` in front replaced by the home folder; an argparse type. The shell leaves `--out=~/x` as it is."""
    return os.path.expanduser(text)


def user_path(text: str) -> Path:
    """Parses a path, with `~` for the home folder; an argparse type."""
    return Path(home_expanded(text))


def run_main(main: Callable[[], None]) -> None:
    """Calls `main`. Turns a UserError, or an error of FILE_ERRORS, into one line on stderr and exit code 2.

    A process that loses another one says so in one line too, with exit code 1: the cause is in the message of the other.

    The process group is destroyed only after success. After an error, NCCL would wait there for processes that are blocked in a
    collective, and torchrun, which has to stop them, would not see the error.
    """
    try:
        main()
    except UserError as error:
        if not (isinstance(error, SharedError) and dist.is_initialized() and dist.get_rank()):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        if not (dist.is_initialized() and any(words in str(error) for words in GONE)):
            raise
        print(f"process {dist.get_rank()} ends, because another one has ended", file=sys.stderr, flush=True)
        sys.exit(1)
    except OSError as error:
        if error.errno not in FILE_ERRORS:
            raise
        print(f"error: {error.filename or 'output'}: {error.strerror}; {FILE_ERRORS[error.errno]}", file=sys.stderr)
        sys.exit(2)
    leave_process_group()
