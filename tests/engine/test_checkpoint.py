"""A run that is saved and loaded goes on as if nothing had happened."""

import errno
import os
import random
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from engine.checkpoint import load_run, read_run, rng_state, save_atomic, save_run, set_rng_state
from engine.train import CosineSchedule, Trainer
from tests.runs import ROOT, refusal
from utils import Run, UserError

ONE = Run(torch.device("cpu"))
SCHEDULE = CosineSchedule(0.1, 0.0, 2, 10)


def fresh(seed: int) -> Trainer:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=8.0, growth_interval=2)
    return Trainer(model, torch.optim.AdamW(model.parameters(), lr=0.1), scaler, SCHEDULE)


def steps(trainer: Trainer, number: int) -> list[float]:
    """Some training with dropout and noise: it depends on weights, optimiser, loss scale and random numbers."""
    losses = []
    for _ in range(number):
        noise = random.random() + float(np.random.rand())
        loss = (trainer.model(torch.randn(3, 4)) + noise).pow(2).mean()
        trainer.optimizer.zero_grad()
        trainer.scaler.scale(loss).backward()
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        trainer.step += 1
        losses.append(float(loss.detach()))
    return losses


def test_a_loaded_run_goes_on_to_the_bit(tmp_path):
    path, state = tmp_path / "last.pth", {"temperature": 2.5, "prune_from": 1, "epoch": 3, "best_score": float("-inf")}
    original = fresh(0)
    steps(original, 5)
    save_run(path, original, original.model, state, ONE)
    expected = steps(original, 3)
    other = fresh(1)
    assert steps(other, 3) != expected
    saved = read_run(path, ONE)
    load_run(saved, path, other, other.model, ONE)
    assert {key: saved[key] for key in state} == state
    assert other.step == 5 and other.scaler.get_scale() == 32.0
    assert steps(other, 3) == expected
    assert all(map(torch.equal, original.model.state_dict().values(), other.model.state_dict().values()))


def test_the_random_state_is_restored():
    def draw():
        return random.random(), np.random.rand(), float(torch.rand(()))

    state = rng_state()
    first = draw()
    assert draw() != first
    set_rng_state(state)
    assert draw() == first


def test_a_run_that_dies_while_writing_leaves_the_last_good_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    save_atomic({"epoch": 1}, path)

    def die(content, file):
        file.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_atomic({"epoch": 2}, path)
    assert torch.load(path) == {"epoch": 1}


@pytest.mark.parametrize("place", ["save", "replace"])
def test_a_full_disk_is_the_users_to_mend_and_the_last_good_file_stays(tmp_path, monkeypatch, capsys, place):
    path = tmp_path / "last.pth"
    save_atomic({"epoch": 1}, path)

    def full(content, file):
        tmp_path.joinpath("last.pth.tmp").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(*((torch, "save", full) if place == "save" else (os, "replace", full)))
    said = refusal(capsys, lambda: save_atomic({"epoch": 2}, path))
    assert f"{path}: No space left on device; make room and go on with --resume" in said
    assert torch.load(path) == {"epoch": 1} and list(tmp_path.iterdir()) == [path]


LIMITED = """
import resource, signal, sys, torch
from pathlib import Path
from engine.checkpoint import save_atomic
from models.weights.safetensors import save_exported
from utils import run_main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
weights = {"a": torch.zeros(100_000)}
save = {"pth": lambda path: save_atomic(weights, path), "safetensors": lambda path: save_exported(path, weights, {})}
run_main(lambda: save[sys.argv[1]](Path(sys.argv[2])))
"""


@pytest.mark.parametrize("kind", ["pth", "safetensors"])
def test_a_file_that_the_system_does_not_take_whole_leaves_nothing(tmp_path, kind):
    """The writers of PyTorch and safetensors have errors of their own, which no patch shows."""
    path = tmp_path / f"last.{kind}"
    command = [sys.executable, "-c", LIMITED, kind, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {path}: not written whole; ") and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_run_of_another_program_is_not_resumed(tmp_path):
    torch.save({"state_dict": {"a": torch.ones(1)}, "optimizer": {}, "epoch": 3}, tmp_path / "epoch_3.pt")
    with pytest.raises(UserError, match="epoch_3.pt: holds weights, not a run to resume"):
        read_run(tmp_path / "epoch_3.pt", ONE)


def test_other_ranks_write_nothing(tmp_path):
    trainer = fresh(0)
    save_run(tmp_path / "last.pth", trainer, trainer.model, {}, Run(torch.device("cpu"), rank=1, world_size=2))
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_resumed_is_refused(tmp_path):
    trainer, path = fresh(0), tmp_path / "last.pth"
    with pytest.raises(UserError, match="last.pth: no such checkpoint to resume from"):
        read_run(path, ONE)
    save_atomic({"model": trainer.model.state_dict()}, path)
    with pytest.raises(UserError, match="holds weights, not a run to resume"):
        read_run(path, ONE)
    save_run(path, trainer, trainer.model, {}, ONE)
    with pytest.raises(UserError, match="a run of 1 processes cannot go on with 2"):
        read_run(path, Run(torch.device("cpu"), world_size=2))


@pytest.mark.parametrize("damage", ["cut off", "another model"])
def test_a_damaged_or_foreign_run_is_the_users_to_mend(tmp_path, damage):
    trainer, path = fresh(0), tmp_path / "last.pth"
    save_run(path, trainer, trainer.model, {}, ONE)
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:500])
    else:
        trainer.model = nn.Linear(3, 3)
    with pytest.raises(UserError, match="last.pth: "):
        load_run(read_run(path, ONE), path, trainer, trainer.model, ONE)
