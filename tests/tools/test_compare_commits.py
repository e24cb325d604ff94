"""The comparison of two commits, on a repository whose entry script copies the numbers of the folder that it lies in."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import compare_commits

SCRIPT = """
import argparse, json, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir", type=pathlib.Path)
parser.add_argument("--evaluate", action="store_true")
args = parser.parse_known_args()[0]
args.output_dir.mkdir(parents=True, exist_ok=True)
numbers = json.loads(pathlib.Path("numbers.json").read_text())
result = {"acc": numbers["acc"], "none": float("nan"), "versions": str(args.output_dir)}
(args.output_dir / "result.json").write_text(json.dumps(result))
if not args.evaluate:
    (args.output_dir / "log.txt").write_text(json.dumps({"loss": numbers["loss"], "seconds": str(args.output_dir)}))
    (args.output_dir / "checkpoint_best.pth").write_bytes(pathlib.Path("weights.pth").read_bytes())
"""
NUMBERS, WEIGHTS = {"acc": 50.0, "loss": 0.25}, [1.0, 2.0]
CHECKS = ["tokens run", "tokens checkpoint", "all run", "all checkpoint", "all packed export"]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "tools").mkdir()
    for name in ("make_shapes", "export"):
        (tmp_path / "tools" / f"{name}.py").touch()
    (tmp_path / "compress_nlvr_dtp.py").write_text(SCRIPT)
    write_numbers(tmp_path)
    commit = ["-c", "user.name=A", "-c", "user.email=a@example.org", "commit", "--quiet", "-m", "base"]
    for arguments in (["init", "--quiet"], ["add", "."], commit):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(compare_commits, "ROOT", tmp_path)
    arguments = ["--base", "HEAD", "--tasks", "nlvr", "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["compare_commits.py", *arguments])
    return tmp_path


def write_numbers(folder: Path, weights: list[float] = WEIGHTS, **changed: float | str) -> None:
    (folder / "numbers.json").write_text(json.dumps({**NUMBERS, **changed}))
    torch.save({"weight": torch.tensor(weights)}, folder / "weights.pth")


def compare(capsys: pytest.CaptureFixture) -> tuple[int, dict[str, str]]:
    """The exit code, and check -> outcome."""
    with pytest.raises(SystemExit) as ended:
        compare_commits.main()
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines() if line.startswith("nlvr ")]
    return ended.value.code, {check: line.removeprefix(f"nlvr {check} ") for check, line in zip(CHECKS, lines, strict=True)}


def test_equal_numbers_are_the_same_whatever_the_seconds_and_versions(repository: Path, capsys: pytest.CaptureFixture) -> None:
    assert compare(capsys) == (0, dict.fromkeys(CHECKS, "same"))
    assert compare(capsys)[0] == 0, "the folders of the first time are used again"


def test_the_last_digit_of_a_result_counts(repository: Path, capsys: pytest.CaptureFixture) -> None:
    write_numbers(repository, acc=50.00000000000001)
    code, found = compare(capsys)
    assert code == 1
    assert set(found.values()) == {"result.json: acc: base 50.0, head 50.00000000000001"}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"loss": 0.5}, "log.txt: 0: loss: base 0.25, head 0.5"),
        ({"weights": [1.0, 3.0]}, "checkpoint_best.pth: weight: number 1 of 2: base 2.0, head 3.0"),
        ({"weights": [1.0]}, "checkpoint_best.pth: weight: base torch.float32 (2,), head torch.float32 (1,)"),
    ],
)
def test_what_training_changes_is_told_of_the_runs(
    repository: Path, capsys: pytest.CaptureFixture, changed: dict, said: str
) -> None:
    write_numbers(repository, **changed)
    code, found = compare(capsys)
    assert code == 1
    for check, difference in found.items():
        assert difference == (said if check.endswith("run") else "same")


def test_a_side_that_stops_differs(repository: Path, capsys: pytest.CaptureFixture) -> None:
    (repository / "compress_nlvr_dtp.py").write_text("raise ValueError('no')")
    code, found = compare(capsys)
    assert code == 1
    assert set(found.values()) == {"head: compress_nlvr_dtp.py ended with exit code 1: ValueError: no"}


def test_an_entry_that_the_change_adds_can_be_named(repository: Path, capsys: pytest.CaptureFixture, monkeypatch) -> None:
    script = (repository / "compress_nlvr_dtp.py").read_text()
    (repository / "compress_nlvr_dtp.py").write_text(script.replace('{"loss"', '{"more": 1, "loss"'))
    assert compare(capsys)[1]["tokens run"] == "log.txt: 0: more: only head has it"
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--added", "other,more"])
    assert compare(capsys) == (0, dict.fromkeys(CHECKS, "same"))
