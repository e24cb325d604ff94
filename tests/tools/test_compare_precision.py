"""Counting what bfloat16 changes."""

from argparse import Namespace
from pathlib import Path

import pytest
import torch

from madtp.rule import PruneSetting
from tasks.view import View
from tests.tiny_run import TEMPERATURE, write_run
from tools import compare_precision
from tools.compare_precision import compare, difference, open_for, rounded
from utils import UserError


def opened(world: Path) -> View:
    config, weights = (str(world / name) for name in ("config.yaml", "checkpoint_best.pth"))
    return open_for(Namespace(config=config, pretrained=weights, device="cpu"))


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_run(tmp_path, "nlvr")


def test_sets_that_differ_are_counted_by_block():
    exact = torch.tensor([[[1, 1, 1], [1, 0, 1]], [[1, 1, 0], [1, 0, 0]]]).bool()  # two samples, two blocks, three tokens
    other = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[1, 1, 0], [1, 0, 0]]]).bool()
    found = difference(exact, other)
    assert found.sets.tolist() == [0.0, 0.5] and found.tokens.tolist() == [0.0, 1.0] and found.kept.tolist() == [2.5, 1.5]


def test_a_pass_equals_itself_and_its_checkpoints_setting_is_used(world):
    view = opened(world)
    assert view.setting == PruneSetting(TEMPERATURE, 1)
    towers, answers = compare(view, view.ids)
    assert towers["image"].kept[0] == 16 > towers["image"].kept[1]  # pruned from the second block on
    with rounded(view):
        towers, answers = compare(view, view.ids)  # bfloat16 against bfloat16
    assert answers == 0 and not any(found.sets.any() or found.tokens.any() for found in towers.values())


def test_the_second_pass_is_in_bfloat16_and_the_view_stays_in_float32(world):
    view, dtypes = opened(world), []
    view.model.cls_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    compare(view, view.ids[:1])
    assert dtypes == [torch.float32, torch.bfloat16] and view.precision.enabled is False


@pytest.mark.parametrize("task", ["retrieval", "vqa", "caption"])
def test_towers_of_other_tasks_are_compared_without_answers(task, tmp_path):
    view = opened(write_run(tmp_path, task))
    towers, answers = compare(view, view.ids)
    assert answers is None and "image" in towers


def test_the_table_names_every_block(world, monkeypatch, capsys, caplog):
    argv = ["--config", str(world / "config.yaml"), "--pretrained", str(world / "checkpoint_best.pth"), "--samples", "3"]
    monkeypatch.setattr("sys.argv", ["compare_precision.py", *argv, "--device", "cpu"])
    with caplog.at_level("INFO"):
        compare_precision.main()
    said = caplog.text
    assert all(f"| {block} | " in said for block in ("image 1", "image 3", "text 1", "text 2")) and "image 4" not in said
    assert f"3 samples at temperature {TEMPERATURE:g}, pruning from block 2" in said and "answers that differ: " in said


def test_a_model_that_prunes_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="prunes no tokens"):
        opened(write_run(tmp_path, "nlvr", p=0.0))
