"""The drawings of what a model still sees, and the program that makes them."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.view import Sample
from tests.tiny_run import write_run
from tools import visualize
from tools.visualize import _file_name, draw, fade
from utils import UserError


def test_a_pruned_patch_fades_and_the_others_stay() -> None:
    picture = np.full((4, 6, 3), 0.5)
    alive = np.array([[True, False, True], [True, True, True]])
    faded = fade(picture, alive)
    changed = (faded != picture).any(axis=-1)
    assert changed[:2, 2:4].all() and changed.sum() == 4


def test_samples_of_any_number_of_pictures_and_texts_fit_on_a_sheet() -> None:
    picture = ("image", np.zeros((8, 8, 3)), np.ones((2, 2, 2), dtype=bool))
    text = (["a", "red", "star", "[SEP]"], np.array([[True, False, True, False]]))
    sheets = [
        draw([Sample("a", "p", [picture], [])]),
        draw([Sample("b", "q", [], [text]), Sample("c", "r", [picture] * 2, [text])]),
    ]
    heights = []
    for sheet in sheets:
        buffer = io.BytesIO()
        sheet.savefig(buffer, format="png", dpi=30)
        heights.append(Image.open(buffer).size[1])
    assert heights[0] < heights[1]


def test_a_sentence_with_markup_is_drawn_as_it_is(tmp_path: Path) -> None:
    """To matplotlib, text between dollars is a formula."""
    words = ["$\\nosuch{", "<b>", "$5"]
    sample = Sample("a", "$\\frac$", [], [(words, np.ones((1, 3), dtype=bool))], [("prediction", "$x^$ &amp;")])
    sheet = draw([sample])
    sheet.savefig(tmp_path / "a.png", dpi=30)
    assert {*words, "$\\frac$", "$x^$ &amp;"} <= {text.get_text() for text in sheet.texts}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_run(tmp_path, "nlvr")


def arguments(world: Path, *more: object) -> list[str]:
    return [
        "--config",
        str(world / "config.yaml"),
        "--checkpoint",
        str(world / "checkpoint_best.pth"),
        "--device",
        "cpu",
        *map(str, more),
    ]


def visualised(monkeypatch, argv: list[str]) -> None:
    monkeypatch.setattr("sys.argv", ["visualize.py", *argv])
    visualize.main()


def test_a_picture_a_sample(world: Path, monkeypatch, capsys) -> None:
    visualised(monkeypatch, arguments(world, "--samples", 2, "--out", world / "out"))
    written = sorted((world / "out").iterdir())
    assert [path.name for path in written] == ["nlvr_test-1.png", "nlvr_test-3.png"]
    assert capsys.readouterr().out.splitlines() == [str(path) for path in written]


def test_one_sheet_for_named_samples(world: Path, monkeypatch) -> None:
    visualised(monkeypatch, arguments(world, "--ids", "nlvr_test-2", "nlvr_test-0", "--out", world / "docs" / "kept.png"))
    assert Image.open(world / "docs" / "kept.png").size[1] > 300


@pytest.mark.parametrize("task", ["retrieval", "retrieval_clip"])
def test_the_runs_config_names_the_task_and_pictures_name_the_samples(tmp_path: Path, monkeypatch, task: str) -> None:
    world = write_run(tmp_path, task)
    visualised(monkeypatch, arguments(world, "--ids", "2a.jpg", "--out", world / "out"))
    assert [path.name for path in (world / "out").iterdir()] == ["2a.png"]


def test_a_file_that_names_no_task_needs_one(world: Path, monkeypatch) -> None:
    config = world / "config.yaml"
    config.write_text(config.read_text().replace("task: nlvr\n", ""))
    with pytest.raises(UserError, match="its key 'task' is None"):
        visualised(monkeypatch, arguments(world))
    visualised(monkeypatch, arguments(world, "--task", "nlvr", "--samples", 1, "--out", world / "out"))
    assert len(list((world / "out").iterdir())) == 1


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (("--ids", "nlvr_test-9"), "nlvr_test-9: no such test sample; the ids run from nlvr_test-0 to nlvr_test-3"),
        (("--samples", 0), "--samples must be at least 1"),
    ],
)
def test_what_the_user_can_mend(world: Path, monkeypatch, more: tuple, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        visualised(monkeypatch, arguments(world, *more))


def test_weights_without_a_temperature_need_one(world: Path, monkeypatch) -> None:
    weights = torch.load(world / "checkpoint_best.pth", weights_only=True)["model"]
    torch.save(weights, world / "checkpoint_best.pth")
    with pytest.raises(UserError, match="give one with --temperature"):
        visualised(monkeypatch, arguments(world))
    visualised(monkeypatch, arguments(world, "--temperature", 2, "--samples", 1, "--out", world / "out"))
    assert len(list((world / "out").iterdir())) == 1


def test_pictures_of_one_name_in_two_folders_are_two_files():
    names = [_file_name(sample) for sample in ("a/1.PNG", "b/1.jpeg", "/c/1", "nlvr_test-1")]
    assert names == ["a_1.png", "b_1.png", "c_1.png", "nlvr_test-1.png"]
