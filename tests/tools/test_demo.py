"""The demo around the runs: its data, its report, and how it stops."""

import csv
import json
import shlex
from functools import partial
from pathlib import Path

import pytest

from tasks.registry import TASKS, demonstrated, load_any_config
from tests.tiny_run import SAMPLES, log_of, result_of, write_run
from tools import demo

RECALLS = ("mean recall, % (val)", "text R@1 / 5 / 10 (test)", "both towers once")
SAID = {
    "nlvr": ("accuracy, % (val)", "the whole forward pass"),
    "retrieval": RECALLS,
    "retrieval_clip": RECALLS,
    "caption": ("CIDEr (val)", "BLEU-4 (test)", "captions written"),
    "vqa": ("accuracy, % (val)", "questions answered"),
}  # in a report


@pytest.mark.parametrize("name", demonstrated())
def test_every_task_has_a_config_a_view_and_words_for_its_metrics(name: str) -> None:
    assert load_any_config(demo.config_of(name)).task == name
    assert TASKS[name].view and TASKS[name].columns


@pytest.mark.parametrize("name", [name for name in demonstrated() if name != "nlvr"])
def test_a_run_need_not_meet_a_picture_twice(name: str) -> None:
    config = load_any_config(demo.config_of(name))
    epoch = config.epoch_steps * config.batch_size_train
    assert demo.DEMO_EPOCHS * epoch <= TASKS[name].demo.demo_size
    assert config.max_epoch * epoch <= TASKS[name].demo.study_size


def test_the_demo_ends_with_the_exit_code_of_what_failed(capfd) -> None:
    with pytest.raises(SystemExit) as stopped:
        demo.execute(["-c", "import sys; print('working'); sys.exit(3)"])
    assert stopped.value.code == 3
    printed = capfd.readouterr()
    assert "working" in printed.out and printed.out.startswith("$ ") and "exit code 3" in printed.err


def test_programs_side_by_side_have_their_names_on_what_they_print(capfd) -> None:
    programs = {name: ["-c", f"print('working for', {number})"] for number, name in enumerate("ab")}
    assert demo.execute_side_by_side(programs) == [shlex.join(["python", *arguments]) for arguments in programs.values()]
    assert {"a | working for 0", "b | working for 1"} <= set(capfd.readouterr().out.splitlines())


def test_when_one_of_them_fails_the_others_are_stopped(capfd) -> None:
    programs = {"a": ["-c", "import time; time.sleep(600)"], "b": ["-c", "import sys; print('oh', file=sys.stderr); sys.exit(3)"]}
    with pytest.raises(SystemExit) as stopped:
        demo.execute_side_by_side(programs)
    assert stopped.value.code == 3 and "b | oh" in capfd.readouterr().out


@pytest.mark.parametrize("name", demonstrated())
def test_the_report_of_a_task(name: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    monkeypatch.setattr(demo, "time_runs", partial(demo.time_runs, rounds=1))
    reductions = (0.0, *TASKS[name].demo.reductions)
    folders = [write_run(tmp_path / f"{name}_p{p:g}", name, p) for p in reductions]
    for p, folder in zip(reductions, folders, strict=True):
        result = result_of(name, p)
        (folder / "result.json").write_text(json.dumps(result))
        if p:
            (folder / "log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in log_of(result, 2)))
    runs, path = demo.gather(TASKS[name].demo, folders, ["python x.py"])
    assert json.loads((tmp_path / "summary.json").read_text()) == [run.result for run in runs]
    pictures = 2 if name == "nlvr" else 1
    for run in runs:
        assert run.images_per_second > 0
        shapes = {"image": (pictures * SAMPLES, 4)} | ({} if name == "caption" else {"text": (SAMPLES, 3)})
        assert {tower: counts.shape for tower, counts in run.tokens.items()} == shapes
        assert (run.tokens["image"][:, -1] < 17).any() == run.compressed
    page = path.read_text()
    assert page.count("<figcaption>") == len(demo.DRAWN) and page.count("images/s: ") == 1
    first, _, *speeds = (tmp_path / "speed.csv").read_text().splitlines()
    assert first == f"# python tools/demo.py --task {name}" and len(list(csv.DictReader(speeds))) == len(runs)
    assert all(words in page for words in (*SAID[name], f"p = {reductions[-1]:g}"))
    assert ("fewer (deployment)" in page) == (name != "nlvr")
    assert ("matching" in page) == (name == "retrieval")


def test_pictures_go_from_few_tokens_kept_to_many(tmp_path: Path) -> None:
    views = [demo.open_run(write_run(tmp_path / name, "retrieval", p)) for name, p in (("a", 0.0), ("b", 0.4))]
    ids = views[1].ids
    (_, whole), (_, left) = (demo.count_tokens(view, ids) for view in views)
    assert all(few < all_of_them for few, all_of_them in zip(left, whole, strict=True))
    assert whole[0] == 17 + 5 and len(set(left)) > 1  # an image of 16 patches, three words, three class tokens
