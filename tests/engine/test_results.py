"""The files of a run: log.txt, TensorBoard scalars, result.json."""

import json
import os
import subprocess

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from engine import results
from engine.results import RunLog, code_version, count_parameters, write_json
from tests.runs import ROOT

ENTRIES = [
    {"epoch": epoch, "loss": {"task": 0.5 + epoch, "total": 0.6}, "temperature": None, "selected": True, "gflops": {"val": 3}}
    for epoch in range(2)
]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="no git checkout")
def test_the_code_is_named_by_its_commit(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert head.startswith(code_version().removesuffix("+")) and len(code_version()) >= 7
    monkeypatch.setattr(results, "__file__", str(tmp_path / "results.py"))
    assert code_version() == ""


def test_the_log_is_a_json_object_a_line_and_scalars_by_path(tmp_path):
    log = RunLog(tmp_path)
    for entry in ENTRIES:
        log.write(entry)
    assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == ENTRIES
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    assert set(board.Tags()["scalars"]) == {"epoch", "loss/task", "loss/total", "gflops/val"}
    assert [(event.step, event.value) for event in board.Scalars("loss/task")] == [(0, 0.5), (1, 1.5)]


def test_a_new_run_starts_a_new_log_and_a_resumed_one_goes_on(tmp_path):
    RunLog(tmp_path).write(ENTRIES[0])
    RunLog(tmp_path, tmp_path, first_epoch=1).write(ENTRIES[1])
    with (tmp_path / "log.txt").open("a") as file:
        file.write('{"epoch": 0, "lo{"epoch": 2}\n{"epoch": 1, "lo')  # where a run died, twice
    for first_epoch in (2, 1):
        RunLog(tmp_path, tmp_path, first_epoch)
        assert [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()] == ENTRIES[:first_epoch]
    RunLog(tmp_path)
    assert (tmp_path / "log.txt").read_text() == ""


def test_other_ranks_leave_no_log(tmp_path):
    RunLog(None).write(ENTRIES[0])
    assert not list(tmp_path.iterdir())


def test_json_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    write_json({"a": [1, 2.5, None]}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    monkeypatch.setattr(os, "replace", lambda source, target: None)  # the process dies just before
    write_json({"b": 2}, path)
    assert json.loads(path.read_text()) == {"a": [1, 2.5, None]}


def test_zeros_are_told_from_parameters():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0, 2.0], [0.0, 0.0, 3.0]]))
        model.bias.copy_(torch.tensor([0.0, 1.0]))
    assert count_parameters(model) == {"total": 8, "nonzero": 4}
