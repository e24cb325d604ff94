"""Saving and loading the whole state of a run.

A file is written under a temporary name, flushed to the disk and then renamed, so that an interrupted run keeps its last complete
checkpoint. The one before it is kept too, in case the last is damaged.
"""

import os
import random
from pathlib import Path

import numpy as np
import torch

from engine.train import Trainer
from models.weights.reading import read_checkpoint
from utils import Run, SharedError, UserError, gather_objects, logger, put_in_place

BEST, LAST, PREVIOUS = "checkpoint_best.pth", "checkpoint_last.pth", "checkpoint_previous.pth"


def rng_state() -> dict:
    """Returns the random state of this process, in types that weights-only loading accepts."""
    numpy_state = np.random.get_state(legacy=False)["state"]
    return {
        "python": random.getstate(),
        "numpy": [numpy_state["key"].tolist(), int(numpy_state["pos"])],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # only of this process's device
    }


def set_rng_state(state: dict) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    key, position = state["numpy"]
    np.random.set_state(("MT19937", np.array(key, dtype=np.uint32), position))
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0].cpu())


def save_atomic(content: dict, path: Path, previous: Path | None = None) -> None:
    """Saves a checkpoint whole or not at all: if it fails, an earlier file of this name stays, and nothing else.

    Args:
        content: what torch.save takes.
        path: the file.
        previous: name that an earlier file of `path` gets; without it, that file is replaced.

    Raises:
        UserError: when it cannot be written, for example because the disk is full.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        torch.save(content, temporary)
        if previous is not None and path.is_file():
            _keep(path, previous)
        put_in_place(temporary, path)
    except (OSError, RuntimeError) as error:  # PyTorch's writer has only its own errors
        reason = (error.strerror if isinstance(error, OSError) else None) or "not written whole; is the disk full?"
        raise UserError(f"{path}: {reason}; make room and go on with --resume, or give another --output_dir") from None
    finally:
        temporary.unlink(missing_ok=True)


def _keep(path: Path, previous: Path) -> None:
    """Gives a file a second name, so that its first is never missing; where files have one name only, renames it."""
    link = previous.with_name(previous.name + ".tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        link = path
    os.replace(link, previous)


def save_run(path: Path, trainer: Trainer, model: torch.nn.Module, state: dict, run: Run) -> None:
    """Saves the whole run and keeps the checkpoint before it as PREVIOUS. Call it on all ranks; rank 0 writes."""
    rng = gather_objects(rng_state())
    if run.is_main:
        trained = {
            "model": model.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "scaler": trainer.scaler.state_dict(),
            "step": trainer.step,
            "sparse": trainer.sparse.state_dict() if trainer.sparse else {},
            "bad_steps": [int(trainer.bad.total), int(trainer.bad.in_a_row)],
            "rng": rng,
        }
        save_atomic({**state, **trained}, path, path.with_name(PREVIOUS))


def read_run(path: Path, run: Run) -> dict:
    """Reads a checkpoint of `save_run`, or the one before it with a warning if the last is missing or damaged.

    Raises:
        UserError: when the file is missing, holds only weights, or was saved by another number of processes.
    """
    previous = path.with_name(PREVIOUS)
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such checkpoint to resume from; leave --resume out to start a new run")
        saved = read_checkpoint(path)
    except UserError as error:
        if path.name != LAST or not previous.is_file():
            raise
        logger.warning("%s. Going on from %s, the checkpoint before it", error, previous)
        path, saved = previous, read_checkpoint(previous)
    if not {"optimizer", "scaler", "step", "rng"} <= saved.keys():
        raise UserError(f"{path}: holds weights, not a run to resume; give it as --pretrained instead")
    if len(saved["rng"]) != run.world_size:
        raise UserError(f"{path}: a run of {len(saved['rng'])} processes cannot go on with {run.world_size}; start the same number")
    if len(set(gather_objects((path.name, saved["step"])))) > 1:
        raise SharedError(f"{path}: the processes read different files of this name; all machines must see the same folder")
    return saved


def load_run(saved: dict, path: Path, trainer: Trainer, model: torch.nn.Module, run: Run) -> None:
    """Restores a run from `saved`, the content of the checkpoint `path`.

    Raises:
        UserError: when it is a checkpoint of another model.
    """
    try:
        model.load_state_dict(saved["model"])
        trainer.optimizer.load_state_dict(saved["optimizer"])
        trainer.scaler.load_state_dict(saved["scaler"])
    except (RuntimeError, ValueError):
        raise UserError(f"{path}: a run of another model or precision; resume it with its own config.yaml") from None
    trainer.step = saved["step"]
    trainer.bad.total, trainer.bad.in_a_row = torch.tensor(saved.get("bad_steps", [0, 0])).float()  # older runs have none
    if trainer.sparse and saved.get("sparse"):
        trainer.sparse.load_state_dict(saved["sparse"])
    set_rng_state(saved["rng"][run.rank])
