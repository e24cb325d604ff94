"""The page to try a checkpoint on: its answers are those of tools/predict.py, at any reduce ratio; and what a browser shows."""

import shutil
import sys
import threading

import numpy as np
import pytest
import torch

from engine.threads import threads_for
from tasks.registry import TASKS, open_checkpoint
from tests.runs import refusal
from tests.tools.test_predict import evaluated, world  # noqa: F401  # fixtures
from tools import demo_app
from tools.app.trial import Trial
from utils import UserError

TEXTS = {"nlvr": "both images have a red circle", "vqa": "what is red ?", "caption": ""}


@pytest.fixture
def trial_of(evaluated):  # noqa: F811
    return lambda task: Trial(open_checkpoint(evaluated(task) / "checkpoint_best.pth", None, "cpu", None))


def pictures(folder, number: int) -> list[str]:
    return [str(path) for path in sorted(folder.rglob("*.jpg"))[:number]]


@pytest.mark.parametrize("task", TASKS)
def test_a_trial_answers_as_predict_does_at_the_ratio_that_is_asked_for(trial_of, world, task):  # noqa: F811
    trial, text = trial_of(task), TEXTS.get(task, "a red circle\n\na blue square\n")
    images = pictures(world / "images" / "nlvr", len(trial.pictures))
    costs = [float("inf")]
    for p in (0, 0.25, 0.4):
        outcome = trial(images, text, p)
        (whole, slow), (left, fast) = outcome.costs["uncompressed"], outcome.costs["pruned"]
        assert left <= costs[-1] and (left < whole or p == 0)  # with few tokens the nearest cost may be that of another p
        costs.append(left)
        assert slow > 0 < fast and outcome.rows()[1][3].endswith("% fewer")
        assert outcome.drawing.dtype == np.uint8 and outcome.drawing.ndim == 3 and outcome.drawing.std() > 1
        setting = trial.setting_at(tuple(images), tuple(filter(None, text.split("\n"))), p)
        opened = trial.opened._replace(setting=setting)
        with torch.no_grad():
            expected = trial.opened.task.predictor(opened, images, [line for line in text.split("\n") if line]).predict()
        assert outcome.answer == expected.lines and left == pytest.approx(float(expected.gflops))


def test_what_is_missing_is_said(trial_of, world):  # noqa: F811
    trial, images = trial_of("nlvr"), pictures(world / "images" / "nlvr", 2)
    with pytest.raises(UserError, match="choose the left image and the right image first"):
        trial([images[0], None], "a circle", 0.4)
    with pytest.raises(UserError, match="write the sentence first"):
        trial(images, " \n", 0.4)


def run(monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["demo_app.py", *map(str, arguments), "--device", "cpu"])
    demo_app.main()


def test_without_gradio_or_with_too_many_pictures_it_says_so(monkeypatch, evaluated, capsys):  # noqa: F811
    checkpoint = evaluated("vqa") / "checkpoint_best.pth"
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install gradio" in refusal(capsys, lambda: run(monkeypatch, "--checkpoint", checkpoint))
    twice = ("--checkpoint", checkpoint, "--image", "a.png", "--image", "b.png")
    assert "takes 1 pictures, got 2" in refusal(capsys, lambda: run(monkeypatch, *twice))


def test_small_work_runs_on_one_thread_and_large_work_on_all():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for gflops, device, threads in ((1, "cpu", 1), (100, "cpu", 2), (1, "meta", 2)):
            with threads_for(gflops, torch.device(device)):
                assert torch.get_num_threads() == threads
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_work_of_a_prediction_is_estimated_from_weights_and_patches(trial_of, world):  # noqa: F811
    trial = trial_of("nlvr")
    predictor = trial._predictor(pictures(world / "images" / "nlvr", 2), ["a circle"], trial.opened.setting)
    with torch.no_grad():
        assert 1 / 3 < predictor.work() / float(predictor.predict().uncompressed) < 3


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser is installed")
def test_a_browser_shows_the_answer(trial_of, world, tmp_path):  # noqa: F811
    pytest.importorskip("gradio")
    playwright = pytest.importorskip("playwright.sync_api")
    trial, images = trial_of("nlvr"), pictures(world / "images" / "nlvr", 2)
    blocks = demo_app.page(trial, images, TEXTS["nlvr"])
    _, address, _ = blocks.launch(prevent_thread_lock=True, server_name="127.0.0.1", share=False, quiet=True)
    seen: dict[str, str] = {}

    def browse() -> None:  # the browser's loop and the server's must not share a thread
        with playwright.sync_playwright() as started:
            browser = started.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            page = browser.new_page()
            page.goto(address)
            page.wait_for_function("document.body.innerText.includes('% fewer')", timeout=60_000)
            seen["text"] = page.inner_text("body")
            seen["answer"] = page.get_by_label("answer").input_value()
            browser.close()

    thread = threading.Thread(target=browse)
    thread.start()
    thread.join(120)
    blocks.close()
    assert "left image" in seen["text"] and "milliseconds" in seen["text"] and "probability" in seen["answer"]
