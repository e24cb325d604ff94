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
    """By clocks on which a pass of the compressed model takes a third of the other's, once half of it, and a fifth of its work."""
    folders = [write_run(tmp_path / f"p{p:g}", "nlvr", p) for p in (0.0, 0.4)]
    ticks = iter([part for slow, fast in ((9, 9), (6, 2), (6, 3), (6, 2)) for part in (0, slow, 0, fast)])
    work = iter([0, *[part for _ in range(4) for part in (0, 5, 0, 1)], 0])
    monkeypatch.setattr(runs, "synchronised_time", lambda view: float(next(ticks)))
    monkeypatch.setattr(time, "process_time", lambda: float(next(work)))
    run(monkeypatch, *folders, "--rounds", 3, "--batches", 1, "--out", tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out" / "runs_nlvr_cpu.csv").read_text().splitlines()[2:]))
    found = [(row["run"], float(row["speedup"]), float(row["lowest"]), float(row["processor"])) for row in rows]
    assert found == [("p0", 1, 1, 1), ("p0.4", 3, 2, 5)]
    samples = int(rows[1]["samples"])
    assert float(rows[1]["images_per_second"]) == pytest.approx(2 * samples / 2)  # two images each, in two seconds
    said = capsys.readouterr().out
    assert "p0.4: " in said and "by processor time, which counts what the models compute and no waiting: 5.00 at p = 0.4." in said


@pytest.mark.parametrize(
    ("processor", "others", "busy"), [(1.5, None, False), (1.5, 0.1, False), (1.5, 0.4, True), (None, None, False)]
)
def test_a_busy_machine_is_remarked_on_a_cpu(processor, others, busy):
    speeds = [runs.Speed("a", p, 4, 10.0, 1.0, 1.0, processor, others) for p in (0.0, 0.5)]
    said = " ".join(runs.remarks(speeds))
    assert ("other processes took 40% of its processor time" in said) == busy
    assert ("1.50 at p = 0.5" in said) == (processor is not None)


BEFORE = "cpu  900 0 0 0 0 0 0 0 0 0\ncpu0 60 0 10 500 3 0 1 0 0 0\ncpu1 40 0 10 500 4 0 2 0 0 0\ncpu2 7 0 0 9 0 0 0 0 0 0\n"
AFTER = "cpu  999 0 0 0 0 0 0 0 0 0\ncpu0 90 0 12 565 6 0 3 0 0 0\ncpu1 50 0 13 580 6 0 5 0 0 0\ncpu2 99 0 0 9 0 0 0 0 0 0\n"


@pytest.mark.parametrize(("quota", "found"), [(None, [40 / 200]), ("max 100000", [40 / 200]), ("200000 100000", [])])
def test_other_processes_are_told_from_this_one(tmp_path, monkeypatch, quota, found):
    """On two cores of three that worked for 50 of 200 ticks, of which 10 were this process's."""
    stat, clock = tmp_path / "stat", iter((5.0, 5.0 + 10 / HERTZ))
    monkeypatch.setattr(runs, "STATISTICS", stat)
    monkeypatch.setattr(runs, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)
    monkeypatch.setattr(time, "process_time", lambda: next(clock))
    if quota:
        (tmp_path / "cpu.max").write_text(quota)
    stat.write_text(BEFORE)
    with runs.elsewhere() as others:
        stat.write_text(AFTER)
    assert others == [pytest.approx(share) for share in found]


def test_a_system_that_does_not_tell_is_not_guessed_at(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "STATISTICS", tmp_path / "missing")
    with runs.elsewhere() as found:
        pass
    assert found == []


def test_runs_that_do_not_see_the_same_samples_are_refused(tmp_path, monkeypatch, capsys):
    nlvr, caption = (write_run(tmp_path / task, task, 0.0) for task in ("nlvr", "caption"))
    for folders, words in (
        ((nlvr, caption), f"{caption}: has task caption, and {nlvr} has nlvr; give runs on the same samples"),
        ((nlvr, tmp_path / "none"), f"{tmp_path / 'none'}: has no config.yaml; give the folder of a run"),
    ):
        assert words in refusal(capsys, lambda folders=folders: run(monkeypatch, *folders))
