"""The study: its rows, and what it writes while runs are missing."""

import json
import os
import signal
import time
from pathlib import Path

import pytest

from configs.load import parse_command_line
from engine.results import write_json
from tasks.registry import TASKS
from tests.tiny_run import result_of
from tools import study_shapes
from tools.demo import SHAPES
from utils import UserError


@pytest.fixture
def study(tmp_path: Path, monkeypatch):
    """Runs the study of a task; `outcomes` maps a command to its exit code. Returns the commands and the table's rows."""
    monkeypatch.chdir(Path(__file__).parents[2])
    monkeypatch.setattr(study_shapes, "OUTPUT", tmp_path / "study")
    monkeypatch.setattr(study_shapes, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(study_shapes, "execute", lambda command: "")

    def conduct(task: str, outcome=lambda command: 0, *more: str) -> tuple[list[str], list[str]]:
        commands = []

        def run(arguments, **options):
            command = " ".join(arguments[1:])
            commands.append(command)
            done = type("Done", (), {"returncode": outcome(command)})
            if not done.returncode:
                p = float(command.split("--p ")[1].split()[0])
                folder = Path(command.split("--output_dir ")[1].split()[0])
                write_json(result_of(task, p, "2:4" if "sparsity_type=2:4" in command else ""), folder / "result.json")
            return done

        monkeypatch.setattr(study_shapes.subprocess, "run", run)
        monkeypatch.setattr("sys.argv", ["tools/study_shapes.py", "--task", task, *more])
        try:
            study_shapes.main()
        finally:
            kind = "".join(f"_{kind}" for kind in ("arms", "orders", "alignment") if f"--{kind}" in more)
            text = (tmp_path / "results" / f"shapes_{task}{kind}.md").read_text()
            rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
        return commands, rows

    return conduct


@pytest.mark.parametrize("task", ["retrieval", "retrieval_clip"])
def test_the_rows_of_retrieval(study, task: str) -> None:
    commands, rows = study(task)
    assert [row.split(" | ")[0] for row in rows] == [
        "| uncompressed",
        "| p = 0.5",
        "| p = 0.75",
        "| p = 0.75, at random",
        "| p = 0.5, not fine-tuned",
        "| p = 0.75, not fine-tuned",
    ]
    assert len(commands) == 1 + 5 * 3 and all("image_root=datasets/shapes_study" in command for command in commands)
    assert rows[1] == "| p = 0.5 | 81.25 ± 0.00 | 80.00 ± 0.00 | 1.0000 | 50.0% | 0.00% | 3 |"


def test_nlvr_has_models_that_see_less_and_more_data_than_the_demo(study) -> None:
    commands, rows = study("nlvr")
    assert len(rows) == 8 and "| trained on the text alone | 81.25 |" in rows[-2]
    assert all(f"--set image_root={study_shapes.STUDY_SHAPES}/images" in command for command in commands)
    assert study_shapes.STUDY_SHAPES != SHAPES


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_a_model_trained_without_images_stands_beside_those_that_see(study, task: str) -> None:
    commands, rows = study(task)
    assert rows[-1].startswith("| trained without images | 81.25 |")
    assert sum("--epoch 4 --set text_only=true" in command for command in commands) == 1
    assert not any("_root=" in command for command in commands)  # the demo's data will do


@pytest.mark.parametrize("task", ["nlvr", "vqa", "retrieval_clip"])
def test_every_way_for_the_learnable_tokens_to_learn_is_a_setting_of_its_own(study, task) -> None:
    commands, rows = study(task, lambda command: 0, "--alignment")
    assert len(rows) == len(study_shapes.alignment_of()) >= 12
    configs = []
    for command in commands:
        config = parse_command_line("", TASKS[task].config_class, command.split()[1:])
        configs.append(config.model_dump_json(exclude={"output_dir"}))
    assert len(set(configs)) == len(configs)


def test_the_arms_of_weights_and_distillation_take_the_runs_that_are_there(study) -> None:
    study("nlvr")
    commands, rows = study("nlvr", lambda command: 0, "--arms")
    assert [row.split(" | ")[0] for row in rows] == [
        "| uncompressed",
        "| p = 0.8",
        "| p = 0.8, distilled",
        "| p = 0.8, 2:4",
        "| p = 0.8, 2:4, distilled",
        "| p = 0.8, not fine-tuned",
        "| p = 0.8, 2:4, not fine-tuned",
        "| 2:4 alone, not fine-tuned",
        "| 2:4 alone, masked only, not fine-tuned",
    ]
    assert " | 80.0% | 40.0% | 0.0% | " in rows[1] and " | 80.0% | 40.0% | 40.0% | " in rows[3]  # by both, tokens, weights
    assert len(commands) == 3 * 3 + 3 and sum("sparsity_type=2:4" in each and "distill=true" in each for each in commands) == 3


def test_the_orders_stand_beside_the_arm_that_has_the_default_one(study) -> None:
    study("nlvr", lambda command: 0, "--arms")
    commands, rows = study("nlvr", lambda command: 0, "--orders")
    assert [row.split(" | ")[0] for row in rows] == [
        "| uncompressed",
        "| p = 0.8, 2:4, distilled",
        "| p = 0.8, 2:4, distilled, weights_first",
        "| p = 0.8, 2:4, distilled, tokens_first",
        "| p = 0.8, 2:4, distilled, adaptive",
    ]
    assert len(commands) == 3 * 3 and sum("order=adaptive" in each for each in commands) == 3


def test_a_row_that_has_come_to_mean_another_command_is_run_again(study, monkeypatch) -> None:
    assert len(study("caption")[0]) == len(study_shapes.rows_of("caption")) + 3 * 2
    monkeypatch.setitem(TASKS["caption"].demo.blind, "trained without images", "--p 0 --epoch 5")
    (command,), _ = study("caption")
    assert "--epoch 5" in command


def test_a_part_of_the_rows_may_be_run_and_others_stay_in_the_table(study) -> None:
    study("vqa", lambda command: 0, "--rows", "uncompressed")
    commands, rows = study("vqa", lambda command: 0, "--rows", "p = 0.5; p = 0.75")
    assert len(commands) == 6 and [row.split(" | ")[0] for row in rows] == ["| uncompressed", "| p = 0.5", "| p = 0.75"]
    with pytest.raises(UserError, match="there is no row 'p = 0.8'; there are: uncompressed; p = 0.5;"):
        study("vqa", lambda command: 0, "--rows", "p = 0.8")


def test_rows_that_have_not_run_are_left_out_and_what_failed_is_run_again(study, tmp_path: Path) -> None:
    def fails(command: str) -> int:
        return 3 if "at random" in command or "method=random" in command or "p0.5_43" in command else 0

    with pytest.raises(UserError, match="ended with exit code 3; see "):
        study("retrieval", fails)
    results = json.loads((tmp_path / "results" / "shapes_retrieval.json").read_text())
    assert "p = 0.75, at random" not in results and len(results["p = 0.5"]) == 2 and len(results) == 5
    commands, rows = study("retrieval")
    assert len(commands) == 4 and len(rows) == 6


def test_an_interrupted_study_leaves_what_it_knows(study, tmp_path: Path) -> None:
    written = tmp_path / "results" / "shapes_retrieval.md"

    def interrupts(command: str) -> int:
        if "p0.75_42" not in command:
            return 0
        for _ in range(100):  # until the program has written what ended before
            if written.is_file() and "| p = 0.5 |" in written.read_text():
                break
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        return 1

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job may ignore it
    try:
        with pytest.raises(KeyboardInterrupt):
            study("retrieval", interrupts)
    finally:
        signal.signal(signal.SIGINT, handler)
    assert "| uncompressed |" in written.read_text() and "| p = 0.5 |" in written.read_text()
