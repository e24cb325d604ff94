"""The parts of the day on a GPU: their commands work, and a part that is done is not done again."""

import json
import sys
from pathlib import Path

import pytest

from tests.runs import refusal
from tools import benchmark, gpu_day
from tools.benchmarks import attention_cost

TINY = [part.name for part in gpu_day.PARTS if part.name not in ("tests", "compression")]


@pytest.fixture
def day(tmp_path) -> gpu_day.Day:
    return gpu_day.Day("cpu", True, tmp_path)


@pytest.mark.parametrize("name", TINY)
def test_the_commands_of_a_part_run_and_leave_their_tables(monkeypatch, capsys, day, name):
    (part,) = (part for part in gpu_day.PARTS if part.name == name)
    for command in part.commands(day):
        program, arguments = (command[1], command[2:]) if command[0] == "-m" else (command[0], command[1:])
        monkeypatch.setattr(sys, "argv", [program, *arguments])
        (attention_cost if program.endswith("attention_cost") else benchmark).main()
    assert list(day.out.rglob("*.csv"))


def test_real_sizes_are_those_of_the_published_models():
    real = gpu_day.Day("cuda", False, Path("benchmarks/gpu"))
    commands = [" ".join(command) for part in gpu_day.PARTS for command in part.commands(real)]
    assert sum("--batch-sizes 1,32,256 --p 0.5,0.7,0.8 --against dense,compiled" in command for command in commands) == 3
    assert not any("--config configs/shapes" in command and "benchmark.py" in command for command in commands)
    assert any("--shapes" in command for command in commands) and any("--nproc_per_node 1" in command for command in commands)
    assert sum(part.minutes for part in gpu_day.PARTS) <= 1.5 * gpu_day.MINUTES


def test_a_short_compression_runs_in_a_process_group(day):
    (part,) = (part for part in gpu_day.PARTS if part.name == "compression")
    ended = gpu_day.run_part(part, day, 600)
    assert ended["ended"] == "well", (day.out / "compression.log").read_text()
    result = json.loads((day.out / "shapes_run" / "result.json").read_text())
    assert result["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.02)


def test_attention_with_scores_is_the_plain_formula():
    row = attention_cost.measure(19, 3, 2, 16, attention_cost.init_run("cpu").device, 1)
    assert row.kernel == "chunks" and max(row.output_error, row.class_error, row.column_error) < 1e-5


def part_of(name: str, *code: str, minutes: float = 1) -> gpu_day.Part:
    return gpu_day.Part(name, minutes, lambda day: [["-c", line] for line in code])


def run(monkeypatch, out: Path, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_day.py", "--device", "cpu", "--out", str(out), *arguments])
    gpu_day.main()


def test_what_is_done_is_skipped_and_what_failed_is_done_again(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu_day, "code_version", lambda: "abc")
    good, bad = part_of("good", "print('fine')"), part_of("bad", "raise SystemExit(3)", "print('never')")
    monkeypatch.setattr(gpu_day, "PARTS", (good, bad, part_of("long", "import time; time.sleep(60)", minutes=0.02)))
    with pytest.raises(SystemExit, match="not done: bad, long; see the logs"):
        run(monkeypatch, tmp_path)
    state = json.loads((tmp_path / "day.json").read_text())
    assert {name: entry["ended"] for name, entry in state.items()} == {
        "good": "well", "bad": "with exit code 3", "long": "by its time limit",
    }  # fmt: skip
    assert "fine" in (tmp_path / "good.log").read_text() and "never" not in (tmp_path / "bad.log").read_text().splitlines()
    monkeypatch.setattr(gpu_day, "PARTS", (good, part_of("bad", "print('mended')")))
    capsys.readouterr()
    run(monkeypatch, tmp_path)
    said = capsys.readouterr().out
    assert "good: done before at abc" in said and "bad: ended well" in said
    monkeypatch.setattr(gpu_day, "code_version", lambda: "def")
    run(monkeypatch, tmp_path, "--parts", "good")
    assert "good: ended well" in capsys.readouterr().out


def test_without_a_gpu_or_with_an_unknown_part_it_says_so(monkeypatch, tmp_path, capsys):
    assert "no GPU is here" in refusal(capsys, lambda: run(monkeypatch, tmp_path, "--device", "cuda"))
    assert "no part is called x; the parts are tests" in refusal(capsys, lambda: run(monkeypatch, tmp_path, "--parts", "x"))
