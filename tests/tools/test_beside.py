"""The speed-up beside busy processes: every way is measured, loops end with it, and an unpruned checkpoint is refused."""

import csv
import subprocess
import sys

import torch

from tests.runs import refusal
from tests.tools.test_predict import evaluated, world  # noqa: F401  # fixtures
from tools.benchmarks import beside


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["beside.py", *map(str, arguments)])
    beside.main()


def test_every_way_is_measured_and_the_loops_end(evaluated, tmp_path, monkeypatch, capsys):  # noqa: F811
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *given, **options: started.append(popen(*given, **options)) or started[-1])
    checkpoint, threads = evaluated("nlvr") / "checkpoint_best.pth", torch.get_num_threads()
    run(monkeypatch, "--checkpoint", checkpoint, "--busy", "0,1", "--batches", 1, "--rounds", 2, "--out", tmp_path)
    torch.set_num_threads(threads)
    lines = (tmp_path / "beside_nlvr_cpu.csv").read_text().splitlines()
    rows = list(csv.DictReader(lines[2:]))
    assert [row["busy"] for row in rows] == ["0"] * 3 + ["1"] * 3 and len({row["way"] for row in rows}) == 3
    assert all(0 < float(row["lowest"]) <= float(row["ratio"]) for row in rows)
    loops = [process for process in started if process.args == beside.LOOP]
    assert len(loops) == 1 and all(process.wait(5) for process in loops)
    assert "1 busy, a batch for each thread" in capsys.readouterr().out


def test_a_checkpoint_without_pruning_is_refused(evaluated, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.setattr(beside, "OFF", beside.open_view)  # what the setting is compared with
    monkeypatch.setattr(beside, "open_view", lambda config, path, device: type("View", (), {"setting": beside.OFF}))
    checkpoint = evaluated("nlvr") / "checkpoint_best.pth"
    assert "its tokens are not pruned" in refusal(capsys, lambda: run(monkeypatch, "--checkpoint", checkpoint))
