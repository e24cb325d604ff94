"""The folder of a run is nobody else's: results are not replaced unasked, and two runs do not share it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.schema import NlvrConfig
from engine import run_folder
from engine.compress import run_experiment
from engine.run_folder import LOCK, RunFolder
from tests.engine.test_compress import SAVED, experiment
from tests.runs import ROOT
from utils import Run, UserError

HOLDER = """
import sys
from pathlib import Path
import torch
from configs.schema import NlvrConfig
from engine.run_folder import RunFolder
from utils import Run
used = RunFolder(NlvrConfig(output_dir=sys.argv[1]), Run(torch.device("cpu")))
with used.used():
    used.prepare()
    print("ready", flush=True)
    sys.stdin.read()
"""


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != LOCK}


def evaluation(folder: Path, **settings):
    task, _ = experiment(folder, [50.0], evaluate=True, **settings)
    task.checkpoint = SAVED
    return task


def test_a_new_run_does_not_replace_the_results_of_another_unasked(tmp_path):
    run_experiment(experiment(tmp_path, [70.0, 60.0])[0])
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"holds the checkpoint_best.pth of another run; .* --resume, .* --overwrite.*--output_dir"):
        run_experiment(experiment(tmp_path, [70.0])[0])
    assert contents(tmp_path) == before
    run_experiment(experiment(tmp_path, [70.0], overwrite=True)[0])
    assert len((tmp_path / "log.txt").read_text().splitlines()) == 1


def test_a_run_that_begins_anew_removes_the_result_of_the_one_before(tmp_path):
    run_experiment(experiment(tmp_path, [70.0])[0])
    task, _ = experiment(tmp_path, [70.0], overwrite=True)
    task.loaders["train"].sampler = None  # dies in its first epoch
    with pytest.raises(AttributeError):
        run_experiment(task)
    assert set(contents(tmp_path)) == {"config.yaml", "log.txt"}


def test_a_run_does_not_go_on_in_the_folder_of_a_third(tmp_path):
    for name in ("first", "second"):
        run_experiment(experiment(tmp_path / name, [70.0])[0])
    task, _ = experiment(tmp_path / "second", [70.0, 60.0], resume=str(tmp_path / "first" / "checkpoint_last.pth"))
    with pytest.raises(UserError, match="of another run"):
        run_experiment(task)


def test_what_a_refused_or_failed_start_left_is_no_result(tmp_path):
    (tmp_path / "log.txt").write_text("")
    (tmp_path / "config.yaml").write_text("p: 0.3\n")
    run_experiment(experiment(tmp_path, [70.0])[0])
    assert "result.json" in contents(tmp_path) and "p: 0.3" not in (tmp_path / "config.yaml").read_text()


def test_an_evaluation_does_not_replace_a_result_unasked_and_keeps_checkpoints(tmp_path):
    run_experiment(experiment(tmp_path, [70.0])[0])
    with pytest.raises(UserError, match="holds a result.json; replace it with --overwrite"):
        run_experiment(evaluation(tmp_path))
    run_experiment(evaluation(tmp_path, overwrite=True))
    assert {"checkpoint_last.pth", "checkpoint_best.pth", "log.txt"} <= set(contents(tmp_path))
    run_experiment(evaluation(tmp_path / "fresh"))


def test_two_runs_do_not_share_a_folder_and_a_dead_one_does_not_hold_it(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "PATIENCE", 0.0)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "ready\n"
    for task in (experiment(tmp_path, [70.0])[0], experiment(tmp_path, [70.0], overwrite=True)[0], evaluation(tmp_path)):
        with pytest.raises(UserError, match=rf"{tmp_path}: process {holder.pid} on .* is running in this folder; wait for it"):
            run_experiment(task)
    holder.kill()
    holder.wait()
    run_experiment(experiment(tmp_path, [70.0])[0])


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*arguments):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(run_folder.fcntl, "lockf", unsupported)
    run_experiment(experiment(tmp_path, [70.0])[0])
    assert "cannot be locked (Operation not supported)" in caplog.text


def test_only_the_main_process_locks(tmp_path):
    run = Run(torch.device("cpu"), rank=1, world_size=2)
    with RunFolder(NlvrConfig(output_dir=tmp_path), run).used():
        assert not list(tmp_path.iterdir())
