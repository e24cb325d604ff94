"""Runs of the entry scripts: in this process, in another, in two; and what they leave."""

import importlib
import json
import multiprocessing
import multiprocessing.connection
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import compress
from engine.train import Trainer
from tasks.registry import TASKS
from utils import run_main

ROOT = Path(__file__).parents[1]
PATIENCE = 2  # seconds
FILES = {
    "config.yaml",
    "log.txt",
    "checkpoint_last.pth",
    "checkpoint_best.pth",
    "predictions_val.json",
    "predictions_test.json",
    "result.json",
}


def run_here(script: str, argv: list[str]) -> None:
    """The script in this process: starting another costs seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *argv])
        importlib.import_module(script).main()


def run_script(file: Path, argv: list[str], *launcher: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *launcher, str(file), *argv], cwd=ROOT, capture_output=True, text=True, timeout=1800)


DRIVER = """
import importlib, json, sys
from utils import run_main
*earlier, last = json.loads({command_lines!r})
for sys.argv in earlier:
    importlib.import_module(sys.argv[0]).main()
sys.argv = last
run_main(importlib.import_module(last[0]).main)
"""


def in_processes(number: int, folder: Path, target: Callable, *arguments: object, together: bool = False) -> list[int]:
    """Calls a function in fresh processes that have the modules already, as a group if they are several, without a launcher.

    What process N writes to stderr is in the file N.err of `folder`. With `together`, one that has left takes the others with it
    after a moment, as a launcher would. Returns the exit codes.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.runs", *(Path(task.config_class.script).stem for task in TASKS.values())])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(number), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)} if number > 1 else {}
    children = [context.Process(target=_call, args=(rank, group, folder, target, arguments)) for rank in range(number)]
    for child in children:
        child.start()
    if together:
        multiprocessing.connection.wait([child.sentinel for child in children], 300)
    for child in children:
        child.join(PATIENCE if together else 300)
        child.kill()
        child.join()
    return [child.exitcode for child in children]


def _call(rank: int, group: dict[str, str], folder: Path, target: Callable, arguments: tuple) -> None:
    if group:
        os.environ.update(group, RANK=str(rank), LOCAL_RANK=str(rank))
    with open(folder / f"{rank}.err", "w") as said:
        os.dup2(said.fileno(), 2)
        sys.stderr = said
        try:
            target(*arguments)
        except Exception:
            traceback.print_exc(file=said)  # the file is closed by the time that multiprocessing would print it
            raise


def run_in_two_processes(folder: Path, command_lines: list[list[str]]) -> None:
    """Scripts, each with its arguments, one after the other in two processes that are started once."""
    (folder / "driver.py").write_text(DRIVER.format(root=str(ROOT), command_lines=json.dumps(command_lines)))
    done = run_script(folder / "driver.py", [], "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    assert done.returncode == 0, done.stderr


class Interrupted(Exception):
    pass


def interrupt_in_the_second_epoch(run: Callable[[], None]) -> None:
    original, epochs = compress.train_epoch, []

    def dying(trainer, loader, *rest):
        epochs.append(loader.sampler.epoch)
        if len(epochs) == 2:
            raise Interrupted
        return original(trainer, loader, *rest)

    with pytest.raises(Interrupted), pytest.MonkeyPatch.context() as patch:
        patch.setattr(compress, "train_epoch", dying)
        run()


def _fail() -> None:
    raise Interrupted


def cut_at(step: int, run: Callable[[], None], how: Callable[[], None] = _fail) -> int | str | None:
    """Runs until `how` is called in a step, counted from 0 over the run. Returns the code with which the run leaves."""
    finish = Trainer.finish

    def finishing(trainer, bad):
        if trainer.step == step:
            how()
        return finish(trainer, bad)

    with pytest.raises((SystemExit, Interrupted)) as left, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "finish", finishing)
        run()
    return getattr(left.value, "code", None)


def refusal(capsys: pytest.CaptureFixture, run: Callable[[], None]) -> str:
    """Returns the message of a run that the user can mend: one line on stderr, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        run_main(run)
    said = capsys.readouterr().err
    assert error.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1, said
    return said


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def log_of(folder: Path) -> list[dict]:
    entries = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{key: value for key, value in entry.items() if key != "seconds"} for entry in entries]


def assert_same_run(folder: Path, other: Path) -> None:
    results = [read(each, "result.json") for each in (folder, other)]
    assert all(result.pop("versions") for result in results) and results[0] == results[1]
    for name in ("predictions_val.json", "predictions_test.json"):
        assert read(folder, name) == read(other, name), name
    assert log_of(folder) == log_of(other)


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoint_last.pth")


def assert_same_weights(folder: Path, other: Path) -> None:
    ours, theirs = last(folder)["model"], last(other)["model"]
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def assert_tokens_weights_and_teacher(folder: Path) -> None:
    """Checks a run with 2:4 weights, pruned tokens and distillation: each does its part, and together they remove p."""
    result = read(folder, "result.json")
    gflops, params = result["gflops"], result["params"]
    assert gflops["measured"] == pytest.approx(gflops["target"], rel=0.01)
    assert gflops["measured"] < min(gflops["tokens"], gflops["weights"]) < gflops["uncompressed"]
    assert params["sparse_total"] == 2 * params["sparse_nonzero"] > 0
    losses = log_of(folder)[0]["loss"]
    assert {"distill_vision", "distill_logits"} < set(losses) and all(losses.values())
