"""Several processes: training that is killed, that fails or is told to end; evaluation of any number of samples."""

import json
import time
from pathlib import Path

import pytest

from data.shapes.write import make_shapes
from tasks.registry import TASKS
from tests import runs, tiny_run
from tests.runs import assert_same_run, assert_same_weights, read
from tests.test_compress_nlvr_dtp import flags

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import compress_nlvr_dtp
from engine.train import Trainer
from utils import UserError, run_main

first, rank, finish = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0", os.environ["RANK"], Trainer.finish
whole, cut, how = json.loads({arguments!r})


def finishing(trainer, bad):
    if trainer.step == 4 and rank == "1" and first:
        if how == "fails":
            raise UserError("this process cannot go on")
        os.kill(os.getpid(), signal.SIGKILL if how == "is killed" else signal.SIGTERM)
    return finish(trainer, bad)


def main():
    if whole and first:
        sys.argv = ["", *whole]
        compress_nlvr_dtp.main()
    Trainer.finish = finishing
    sys.argv = ["", *cut]
    compress_nlvr_dtp.main()


run_main(main)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=3, size=40, tasks=("nlvr",), eval_size=9, workers=1)
    return folder


def run(world: Path, folder: Path, how: str, *launcher: str, whole: bool = False):
    settings = {"save_steps": 1, "epoch_steps": 3, "batch_size_train": 4}
    lines = [flags(world, folder / name, "--resume", "auto", **settings) for name in ("whole", "cut")]
    arguments = json.dumps([lines[0] if whole else None, lines[1], how])
    (folder / "program.py").write_text(PROGRAM.format(arguments=arguments))
    return runs.run_script(folder / "program.py", [], *TORCHRUN, *launcher)


def test_torchrun_goes_on_by_itself_when_a_process_is_killed(world, tmp_path):
    done = run(world, tmp_path, "is killed", "--max-restarts", "1", whole=True)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert_same_weights(tmp_path / "cut", tmp_path / "whole")


def test_a_process_that_fails_ends_all_with_its_own_message(world, tmp_path):
    started = time.monotonic()
    done = run(world, tmp_path, "fails")
    assert done.returncode and time.monotonic() - started < 100  # with the start of the programs on a busy machine
    assert done.stderr.count("error: this process cannot go on") == 1
    program = str(tmp_path / "program.py")
    assert f'File "{program}"' not in done.stderr, done.stderr  # no traceback


def test_a_signal_to_one_process_saves_the_step_of_all(world, tmp_path):
    done = run(world, tmp_path, "is asked to end")
    assert done.returncode and "exitcode  : 143" in done.stderr, done.stderr
    saved = runs.last(tmp_path / "cut")
    assert saved["step"] >= 5 and saved["within"]["ranks"][1]["steps"] == saved["step"] - 3


SIZES = (1,)  # two processes have none; tests of each task have uneven shares


def evaluation(folder: Path, out: Path, task: str, size: int) -> list[str]:
    """Writes a split of this size, without equal captions, whose order would be rounding's. Returns the flags to evaluate on it."""
    tiny_run.write_run(folder, task)
    for name in ("nlvr_dev", "nlvr_test", "vqa_val", "vqa_test", "flickr30k_val", "flickr30k_test", "coco_karpathy_val"):
        test = folder / f"{name.split('_')[0]}_test.json"
        entries = json.loads((folder / "coco_karpathy_test.json" if "coco" in name else test).read_text())[:size]
        if "flickr" in name:
            entries = [{**entry, "caption": ["star " * (2 * i + 1), "red " * (i + 2)]} for i, entry in enumerate(entries)]
        (folder / f"{name}.json").write_text(json.dumps(entries))
    (folder / "coco_karpathy_test.json").write_text((folder / "coco_karpathy_val.json").read_text())
    for stem in ("flickr30k", "coco_karpathy"):
        pairs = [{"image": f"{i}a.jpg", "caption": text, "image_id": i} for i, text in enumerate(tiny_run.SENTENCES)]
        (folder / f"{stem}_train.json").write_text(json.dumps(pairs))
    return ["--config", str(folder / "config.yaml"), "--evaluate", "--output_dir", str(out), "--set", "num_workers=0"]


def test_three_processes_measure_a_single_sample_as_one_does(tmp_path):
    cases = {f"{task}_{size}": (task, size) for task in TASKS for size in SIZES}
    script = {task: Path(TASKS[task].config_class.script).stem for task in TASKS}
    lines = []
    for name, (task, size) in cases.items():
        lines.append([script[task], *evaluation(tmp_path / name, tmp_path / "three" / name, task, size)])
    runs.run_in_two_processes(tmp_path, lines, processes=3)
    for name, (task, size) in cases.items():
        runs.run_here(script[task], evaluation(tmp_path / name, tmp_path / "one" / name, task, size))
        one, three = (read(tmp_path / folder / name, "result.json") for folder in ("one", "three"))
        assert three["metrics"] == one["metrics"], name
        assert three["gflops"] == pytest.approx(one["gflops"], rel=1e-9), name
