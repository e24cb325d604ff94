"""Runs timed against one another: in turn on the same samples, with what other processes take of the machine."""

import csv
import os
import sys
import time

import pytest

from tests.runs import refusal
from tests.tiny_run import write_run
from tools.benchmarks import runs

HERTZ = os.sysconf("SC_CLK_TCK")


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["runs.py", *map(str, arguments)])
    runs.main()


def test_models_are_compared_round_by_round(tmp_path, monkeypatch, capsys):
    """By clocks on which a pass of the compressed model takes a third of the other's, once half of it."""
    folders = [write_run(tmp_path / f"p{p:g}", "nlvr", p) for p in (0.0, 0.4)]
    ticks = iter([part for slow, fast in ((9, 9), (6, 2), (6, 3), (6, 2)) for part in (0, slow, 0, fast)])
    monkeypatch.setattr(runs, "synchronised_time", lambda view: float(next(ticks)))
    run(monkeypatch, *folders, "--rounds", 3, "--batches", 1, "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "runs_nlvr_cpu.csv").read_text().splitlines()[2:]))
    assert [(row["p"], float(row["speedup"]), float(row["lowest"])) for row in rows] == [("0.0", 1, 1), ("0.4", 3, 2)]
    samples = int(rows[1]["samples"])
    assert float(rows[1]["images_per_second"]) == pytest.approx(2 * samples / 2)  # two images each, in two seconds
    assert "p = 0.4: " in capsys.readouterr().out


def test_other_processes_are_told_from_this_one(tmp_path, monkeypatch):
    """On a machine of two cores that worked for 50 of 200 ticks, of which 10 were this process's."""
    stat, clock = tmp_path / "stat", iter((5.0, 5.0 + 10 / HERTZ))
    monkeypatch.setattr(runs, "STATISTICS", stat)
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    stat.write_text("cpu  100 0 20 1000 7 0 3 0 0 0\ncpu0 1 2\n")
    with runs.elsewhere() as found:
        stat.write_text("cpu  140 0 25 1145 12 0 8 0 0 0\ncpu0 1 2\n")
    assert found == [pytest.approx(40 / 200)]


def test_a_system_that_does_not_tell_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "STATISTICS", tmp_path / "missing")
    with runs.elsewhere() as found:
        pass
    assert found == []


def test_runs_of_two_tasks_are_refused(tmp_path, monkeypatch, capsys):
    folders = [write_run(tmp_path / task, task, 0.0) for task in ("nlvr", "caption")]
    assert "the runs are of caption and nlvr; give runs of one task" in refusal(capsys, lambda: run(monkeypatch, *folders))
