"""Several processes: training that is killed, that fails or is told to end; evaluation of any number of samples."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from data.shapes.write import make_shapes
from engine.train import Trainer
from tasks.registry import TASKS
from tests import runs, tiny_run
from tests.runs import assert_same_run, assert_same_weights, read
from tests.test_compress_nlvr_dtp import flags
from utils import UserError, run_main

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SETTINGS = {"save_steps": 1, "epoch_steps": 3, "batch_size_train": 4}
PROGRAM = """
import json, os, sys
from pathlib import Path
from tests import test_distributed_runs as here
from utils import run_main

first, (whole, cut) = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", json.loads({arguments!r})
if first:
    here.runs.run_here("compress_nlvr_dtp", whole)
run_main(lambda: here.train(cut, "is killed" if first else "goes on"))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=3, size=40, tasks=("nlvr",), eval_size=9, workers=1)
    return folder


def train(argv: list[str], how: str) -> None:
    """Trains as one of two processes, the second of which meets with something in its second epoch."""
    finish = Trainer.finish

    def finishing(trainer, bad):
        if trainer.step == 4 and os.environ["RANK"] == "1":
            if how == "fails":
                raise UserError("this process cannot go on")
            if how in SIGNALS:
                os.kill(os.getpid(), SIGNALS[how])
        return finish(trainer, bad)

    Trainer.finish = finishing
    runs.run_here("compress_nlvr_dtp", argv)


SIGNALS = {"is killed": signal.SIGKILL, "is told to end": signal.SIGTERM}


def test_torchrun_goes_on_by_itself_when_a_process_is_killed(world, tmp_path):
    arguments = json.dumps([flags(world, tmp_path / name, "--resume", "auto", **SETTINGS) for name in ("whole", "cut")])
    (tmp_path / "program.py").write_text(PROGRAM.format(arguments=arguments))
    done = runs.run_script(tmp_path / "program.py", [], *TORCHRUN, "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def told(argv: list[str], how: str) -> None:
    run_main(lambda: train(argv, how))


def test_a_process_that_fails_ends_all_each_with_one_line(world, tmp_path):
    codes = runs.in_processes(2, tmp_path, told, flags(world, tmp_path / "run", **SETTINGS), "fails")
    said = [[line for line in (tmp_path / f"{rank}.err").read_text().splitlines() if line[:1] in "ep"] for rank in range(2)]
    assert codes == [1, 2]
    assert said == [["process 0 ends, because another one has ended"], ["error: this process cannot go on"]]
    assert not any("Traceback" in (tmp_path / f"{rank}.err").read_text() for rank in range(2))


def test_a_signal_to_one_process_saves_the_step_of_all(world, tmp_path):
    out = tmp_path / "run"
    assert runs.in_processes(2, tmp_path, told, flags(world, out, **SETTINGS), "is told to end") == [143, 143]
    saved = runs.last(out)
    assert saved["step"] >= 5 and saved["within"]["ranks"][1]["steps"] == saved["step"] - 3


def run_all(lines: list[list[str]]) -> None:
    for script, *argv in lines:
        runs.run_here(script, argv)


def test_two_processes_that_accumulate_take_the_step_of_one_batch(world, tmp_path):
    """They exchange gradients in the last batch of a step alone, and those hold all of it."""
    same = {"bert.dropout": 0, "drop_path": 0, "epoch_steps": 1, "max_epoch": 1}
    run_all([["compress_nlvr_dtp", *flags(world, tmp_path / "one", **same, batch_size_train=8)]])
    parts = flags(world, tmp_path / "two", **same, batch_size_train=2, accumulate=2)
    assert runs.in_processes(2, tmp_path, run_all, [["compress_nlvr_dtp", *parts]]) == [0, 0]
    assert runs.log_of(tmp_path / "two")[0]["loss"] == pytest.approx(runs.log_of(tmp_path / "one")[0]["loss"], rel=1e-5)
    one, two = (runs.last(tmp_path / name)["optimizer"]["state"].values() for name in ("one", "two"))
    for ours, theirs in zip(two, one, strict=True):  # a tenth of the gradient
        tolerance = 1e-5 * float(theirs["exp_avg"].abs().max()) + 1e-9
        torch.testing.assert_close(ours["exp_avg"], theirs["exp_avg"], rtol=1e-3, atol=tolerance)


# One sample: two of three processes have none. The tests of each task have uneven shares.
SIZES = tuple(map(int, os.environ.get("MADTP_SIZES", "1").split(",")))


def spelled(number: int) -> str:
    """A caption that no other number has."""
    return " ".join(("star", "red")[number >> bit & 1] for bit in range(7))


def evaluation(folder: Path, out: Path, task: str, size: int) -> list[str]:
    """Writes a split of this size, without equal captions, whose order would be rounding's. Returns the flags to evaluate on it."""
    tiny_run.write_run(folder, task)
    for name in ("nlvr_dev", "nlvr_test", "vqa_val", "vqa_test", "flickr30k_val", "flickr30k_test", "coco_karpathy_val"):
        test = folder / f"{name.split('_')[0]}_test.json"
        entries = json.loads((folder / "coco_karpathy_test.json" if "coco" in name else test).read_text())[:size]
        if "flickr" in name:
            entries = [{**entry, "caption": [spelled(i), f"a {spelled(i)}"]} for i, entry in enumerate(entries)]
        (folder / f"{name}.json").write_text(json.dumps(entries))
    (folder / "coco_karpathy_test.json").write_text((folder / "coco_karpathy_val.json").read_text())
    for stem in ("flickr30k", "coco_karpathy"):
        pairs = [{"image": f"{i}a.jpg", "caption": text, "image_id": i} for i, text in enumerate(tiny_run.SENTENCES)]
        (folder / f"{stem}_train.json").write_text(json.dumps(pairs))
    return ["--config", str(folder / "config.yaml"), "--evaluate", "--output_dir", str(out), "--set", "num_workers=0"]


def test_three_processes_measure_a_single_sample_as_one_does(tmp_path, monkeypatch):
    """MADTP_SIZES=1,7,50 measures splits of these sizes, also with two processes."""
    monkeypatch.setattr(tiny_run, "SAMPLES", max(4, *SIZES))
    monkeypatch.setattr(tiny_run, "SENTENCES", ["a red star" + " and a red star" * (i % 3) for i in range(tiny_run.SAMPLES)])
    cases = {f"{task}_{size}": (task, size) for task in TASKS for size in SIZES}
    script = {task: Path(TASKS[task].config_class.script).stem for task in TASKS}
    for name, (task, size) in cases.items():
        runs.run_here(script[task], evaluation(tmp_path / name, tmp_path / "1" / name, task, size))
    for processes in (3,) if SIZES == (1,) else (2, 3):
        there = tmp_path / str(processes)
        lines = [[script[task], *evaluation(tmp_path / name, there / name, task, size)] for name, (task, size) in cases.items()]
        assert runs.in_processes(processes, tmp_path, run_all, lines) == [0] * processes
        for name in cases:
            one, several = (read(folder / name, "result.json") for folder in (tmp_path / "1", there))
            assert several["metrics"] == one["metrics"], (processes, name)
            assert several["gflops"] == pytest.approx(one["gflops"], rel=1e-9), (processes, name)
