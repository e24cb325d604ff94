"""Runs that are cut: at any step, by signals, by SIGKILL while they write; each goes on to the numbers of the whole one.

MADTP_KILLS=20 kills so many runs, at other moments for another MADTP_KILLS_SEED.
"""

import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

from data.shapes.write import make_shapes
from engine.train import Trainer
from tests import runs
from tests.runs import assert_same_run, assert_same_weights, cut_at, in_processes, last, log_of, read
from tests.test_compress_nlvr_dtp import flags as plain_flags

KILLS, SEED = int(os.environ.get("MADTP_KILLS", 2)), int(os.environ.get("MADTP_KILLS_SEED", 0))
EPOCH = 3  # steps of an epoch
SETTINGS = {"save_steps": 1, "epoch_steps": EPOCH, "drop_path": 0.1}
OTHERS = {  # what else a run has to remember
    "every budget of a range": {"train_budget": "[0.4, 0.5]"},
    "accumulated batches, mixed precision": {"accumulate": 2, "batch_size_train": 4, "amp": "true"},
    "masks that change": {"sparsity_type": "2:4", "mask_schedule": "refresh", "max_epoch": 3, "p": 0.5, "calibration_size": 8},
    "tokens from the data": {"sd_init": "kmeans", "token_gradient": "decision", "num_workers": 1},
}
run_here = partial(runs.run_here, "compress_nlvr_dtp")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=3, size=40, tasks=("nlvr",), eval_size=9, workers=1)
    return folder


@pytest.fixture(scope="module")
def flags(world) -> Callable[..., list[str]]:
    return lambda out, *more, **settings: plain_flags(world, out, *more, **{**SETTINGS, **settings})


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory) -> Path:
    """The folder of a run that nothing cut."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_here(flags(out))
    return out


@pytest.mark.parametrize("step", [1, EPOCH + 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_that_was_cut_within_an_epoch_goes_on_from_the_step(flags, whole, tmp_path, step, workers):
    cut_at(step, lambda: run_here(flags(tmp_path, num_workers=workers)))
    saved = last(tmp_path)
    assert saved["step"] == step and saved["epoch"] == step // EPOCH and saved["within"]["ranks"][0]["steps"] == step % EPOCH
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        finish = Trainer.finish
        patch.setattr(Trainer, "finish", lambda trainer, bad: taken.append(trainer.step) or finish(trainer, bad))
        run_here(flags(tmp_path, "--resume", num_workers=workers))
    assert taken == list(range(step, 2 * EPOCH))
    assert_same_run(tmp_path, whole)
    assert_same_weights(tmp_path, whole)


def test_the_batches_that_were_taken_are_not_read_again(flags, tmp_path, monkeypatch):
    from data.nlvr import NlvrDataset

    cut_at(2, lambda: run_here(flags(tmp_path)))
    read_item, seen = NlvrDataset.__getitem__, []

    def reading(dataset, index):
        seen.append(dataset.swap or None)
        return read_item(dataset, index)

    monkeypatch.setattr(NlvrDataset, "__getitem__", reading)
    run_here(flags(tmp_path, "--resume", **{"augment.swap": "true"}))
    assert seen.count(True) == 8 * (2 * EPOCH - 2)


@pytest.mark.parametrize("other", OTHERS)
def test_whatever_a_run_has_to_remember_it_goes_on_to_the_bit(flags, tmp_path, other):
    settings = OTHERS[other]
    run_here(flags(tmp_path / "whole", **settings))
    for step in (1, EPOCH + 1):
        cut_at(step, lambda: run_here(flags(tmp_path / "cut", "--resume", "auto", **settings)))
    run_here(flags(tmp_path / "cut", "--resume", "auto", **settings))
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_the_step_end_saves_and_leaves_with_its_code(flags, whole, tmp_path, number, code):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    run = partial(run_here, flags(tmp_path, save_steps="", save_minutes=0))
    assert cut_at(1, run, how=lambda: os.kill(os.getpid(), number)) == code
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    assert 2 <= last(tmp_path)["step"] <= EPOCH and not (tmp_path / "log.txt").read_text()
    run_here(flags(tmp_path, "--resume"))
    assert_same_run(tmp_path, whole)


def killed(out: Path, argv: list[str], event: int | None, victim: int) -> None:
    """Runs the script in this process, and kills process number `victim` at its event number `event`; otherwise counts its events.

    An event is a step, a file half written, one that is about to be flushed, linked or renamed, or a line of the log.
    """
    happened = 0

    def watched(owner, name: str, half: bool = False):
        original = getattr(owner, name)

        def call(*args, **kwargs):
            nonlocal happened
            happened += 1
            if happened == event:
                if half and isinstance(args[1], Path):
                    original(*args, **kwargs)
                    args[1].write_bytes(args[1].read_bytes()[: args[1].stat().st_size // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)

        setattr(owner, name, call)

    rank = int(os.environ.get("RANK", 0))
    if event is None or rank == victim:
        watched(torch, "save", half=True)
        watched(Trainer, "finish")
        for name in ("replace", "link", "fsync", "unlink"):
            watched(os, name)
    run_here(argv)
    (out / f"events{rank}.json").write_text(json.dumps(happened))


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_that_is_killed_at_any_moment_goes_on_to_the_same_end(flags, tmp_path, processes):
    whole = tmp_path / "whole"
    assert in_processes(processes, tmp_path, killed, tmp_path, flags(whole), None, 0) == [0] * processes
    events = [(rank, event + 1) for rank in range(processes) for event in range(read(tmp_path, f"events{rank}.json"))]
    assert len(events) > 60
    for victim, event in random.Random(SEED).sample(events, KILLS):
        out = tmp_path / f"{victim}_{event}"
        resumed = flags(out, "--resume", "auto")
        codes = in_processes(processes, tmp_path, killed, tmp_path, resumed, event, victim, together=True)
        assert codes[victim] == -signal.SIGKILL and codes.count(0) == 0, (victim, event, codes)
        assert in_processes(processes, tmp_path, run_here, resumed) == [0] * processes, (victim, event)
        assert_same_run(out, whole)
        assert_same_weights(out, whole)
        assert not list(out.glob("*.tmp")), (victim, event)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Gives a folder on a disk of its own, and changes how many bytes that has."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def sized(size: int) -> Path:
        options = f"{'remount,' if folder.is_mount() else ''}size={size}"
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"only an administrator may mount a small disk: {done.stderr.strip()}")
        return folder

    yield sized
    if folder.is_mount():
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no program to mount a small disk with")
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_a_disk_that_fills_loses_nothing_that_was_saved(flags, whole, tmp_path, small_disk, capsys, share):
    needed = sum(file.stat().st_size for file in whole.rglob("*") if file.is_file())
    out = small_disk(int(share * needed)) / "run"
    said = runs.refusal(capsys, lambda: run_here(flags(out)))
    assert "No space left on device" in said or "is the disk full?" in said
    steps = last(out)["step"] if (out / "checkpoint_last.pth").is_file() else 0
    assert steps or share < 0.5
    small_disk(4 * needed)
    run_here(flags(out, "--resume", "auto"))
    assert_same_run(out, whole)
    assert_same_weights(out, whole)


def test_the_checkpoint_before_is_taken_with_a_warning_if_the_last_is_damaged(flags, whole, tmp_path, caplog):
    cut_at(EPOCH + 2, lambda: run_here(flags(tmp_path)))
    damaged = tmp_path / "checkpoint_last.pth"
    damaged.write_bytes(damaged.read_bytes()[:-100])
    run_here(flags(tmp_path, "--resume"))
    assert f"{damaged}: not a readable checkpoint" in caplog.text and "checkpoint_previous.pth" in caplog.text
    assert_same_run(tmp_path, whole)


def test_a_run_is_not_cut_within_an_epoch_and_gone_on_with_other_batches(flags, tmp_path, capsys):
    cut_at(1, lambda: run_here(flags(tmp_path)))
    for settings, said in (({"batch_size_train": 4}, "batch_size_train 8, and here it is 4"), ({"epoch_steps": 4}, "3 batches")):
        refused = runs.refusal(capsys, lambda settings=settings: run_here(flags(tmp_path, "--resume", **settings)))
        assert "was saved within an epoch with " + said in refused


def test_to_resume_what_is_there_begins_where_nothing_is(flags, whole, tmp_path):
    run_here(flags(tmp_path, "--resume", "auto"))
    assert_same_run(tmp_path, whole)
    assert [entry["epoch"] for entry in log_of(tmp_path)] == [0, 1]
