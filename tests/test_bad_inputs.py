"""Every bad input of the table ends the program with one line and exit code 2, and the page on troubleshooting knows them."""

import errno
import importlib
import os
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tasks.registry import TASKS
from tests import bad_inputs
from tests.bad_inputs import BadInput, write_world
from tests.runs import refusal

CASES = dict(bad_inputs.cases())


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    return {task: write_world(folder / task, task) for task in {bad.task for bad in CASES.values()}}


def program(bad: BadInput, folder: Path) -> tuple[str, list[str]]:
    """Returns the module to run and its flags."""
    flags = [flag.replace("{folder}", str(folder)) for flag in shlex.split(bad.flags)]
    if bad.program:
        return bad.program, flags
    return Path(TASKS[bad.task].config_class.script).stem, ["--config", str(folder / "config.yaml"), "--evaluate", *flags]


@pytest.mark.parametrize("name", CASES)
def test_a_bad_input_is_answered_in_one_line(name, worlds, tmp_path, monkeypatch, capsys):
    bad, folder = CASES[name], tmp_path / "run"
    shutil.copytree(worlds[bad.task], folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(worlds[bad.task]), str(folder)))
    bad.spoil(folder)
    module, flags = program(bad, folder)
    monkeypatch.setattr(sys, "argv", [module, *flags])
    said = refusal(capsys, lambda: importlib.import_module(module).main())
    assert bad.said in said
    assert not any(word in said for word in ("Traceback", "miniz", "PytorchStream", "pydantic"))


def test_a_disk_that_fills_up_ends_a_run_in_one_line(worlds, tmp_path, monkeypatch, capsys):
    write, written = torch.save, []

    def fills_up(content, file):
        written.append(file)
        if len(written) == 4:  # those of the first epoch fit: within it, the best, and after it
            Path(file).write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(content, file)

    monkeypatch.setattr(torch, "save", fills_up)
    settings = "--no-evaluate --pretrained= --p 0 --epoch 2 --set batch_size_train=2 --set num_workers=0"
    module, flags = program(BadInput("nlvr", "", "", flags=f"{settings} --output_dir {tmp_path}"), worlds["nlvr"])
    monkeypatch.setattr(sys, "argv", [module, *flags])
    said = refusal(capsys, lambda: importlib.import_module(module).main())
    assert "No space left on device; make room and go on with --resume" in said
    assert not list(tmp_path.glob("*.tmp"))
    assert torch.load(tmp_path / "checkpoint_last.pth")["epoch"] == 0


def test_the_table_is_large_and_its_names_are_unique():
    assert len(CASES) == sum(map(len, bad_inputs.TABLE.values())) >= 60


def test_the_page_on_troubleshooting_is_that_of_the_table():
    assert bad_inputs.PAGE.read_text(encoding="utf-8") == bad_inputs.page(), "PYTHONPATH=. python -m tests.bad_inputs writes it"
