"""Captioning and VQA from the command line to their files, on a tiny Shapes world."""

import json
import shutil
from pathlib import Path

import pytest

from data.shapes.write import make_shapes
from tasks.registry import TASKS
from tests import runs
from tests.runs import FILES, ROOT, assert_same_run, log_of, read

PICTURES = 11  # of a split: neither two processes nor batches of 8 share them evenly
SHARED = {
    "sd_num": 8, "sd_dim": 32, "sd_init_std": 0.02, "batch_size_train": 8, "batch_size_test": 8, "calibration_size": 8,
    "num_workers": 0, "amp": "false", "max_epoch": 2, "ramp_epochs": 1, "epoch_steps": 1, "vit.depth": 2, "vit.embed_dim": 32,
    "bert.hidden_size": 32, "bert.num_hidden_layers": 2, "bert.intermediate_size": 64,
}  # fmt: skip
P = 0.15
SUBMISSION = {"caption": "caption_result.json", "vqa": "vqa_result.json"}
EACH_TASK = pytest.mark.parametrize("task", SUBMISSION)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=5, size=20, tasks=("caption", "vqa"), eval_size=PICTURES, workers=1)
    return folder


def flags(task: str, world: Path, out: Path, *more: str, **settings) -> list[str]:
    """The command line of a tiny run; keys in `settings` go before those of SHARED."""
    files = {name: world / "images" for name in TASKS[task].config_class.image_keys}
    files |= {"ann_root": world / "annotations", "tokenizer": world / "annotations" / "vocab.txt"}
    sets = [f"--set={key}={value}" for key, value in {**files, **SHARED, **settings}.items()]
    config = str(ROOT / f"configs/shapes/{task}.yaml")
    return ["--config", config, "--output_dir", str(out), "--device", "cpu", "--pretrained", "", "--p", str(P), *sets, *more]


def run(task: str, world: Path, out: Path, *more: str, **settings) -> None:
    runs.run_here(f"compress_{task}_dtp", flags(task, world, out, *more, **settings))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A folder with the folder of each task's run."""
    folder = tmp_path_factory.mktemp("runs")
    for task in SUBMISSION:
        run(task, world, folder / task)
    return folder


@EACH_TASK
def test_a_run_leaves_its_files_and_keeps_its_contract(task, trained):
    folder = trained / task
    assert {*FILES, SUBMISSION[task]} <= {path.name for path in folder.iterdir()}
    result = read(folder, "result.json")
    gflops = result["gflops"]
    assert result["task"] == task and result["reduce_ratio"] == P
    assert gflops["measured"] == pytest.approx(gflops["target"], rel=0.01)
    assert gflops["deployment"] > 0 and gflops["reference"] > 0
    rows = read(folder, "predictions_test.json")
    assert len(rows) == PICTURES
    assert all(isinstance(row["prediction"], str) and row["tokens_kept"] > 0 and row["gflops"] > 0 for row in rows.values())
    assert all(("score" in row) == (task == "vqa") for row in rows.values())


def test_a_result_says_how_captions_were_scored(trained):
    scoring = read(trained / "caption", "result.json")["scoring"]
    assert scoring["tokenizer"] in ("PTB", "words") and "SPICE" in scoring["not_computed"]


def test_captions_may_be_scored_against_cocos_files(trained, world, tmp_path):
    """The world writes the same captions there."""
    best = trained / "caption" / "checkpoint_best.pth"
    truth = world / "annotations/coco_gt"
    run("caption", world, tmp_path, "--evaluate", "--pretrained", str(best), coco_gt_root=truth)
    assert read(tmp_path, "result.json")["metrics"] == read(trained / "caption", "result.json")["metrics"]


def test_captions_are_handed_in_as_coco_wants_them(trained, world):
    truth = json.loads((world / "annotations/coco_gt/coco_karpathy_test_gt.json").read_text())
    handed_in = read(trained / "caption", "caption_result.json")
    assert {row["image_id"] for row in handed_in} == {image["id"] for image in truth["images"]}
    by_id = {row["image_id"]: row["caption"] for row in handed_in}
    rows = read(trained / "caption", "predictions_test.json")
    assert all(by_id[image["id"]] == rows[image["file_name"]]["prediction"] for image in truth["images"])


def test_answers_are_handed_in_as_the_server_wants_them(trained, world):
    questions = {entry["question_id"] for entry in json.loads((world / "annotations/vqa_test.json").read_text())}
    choices = set(json.loads((world / "annotations/answer_list.json").read_text()))
    handed_in = read(trained / "vqa", "vqa_result.json")
    assert {row["question_id"] for row in handed_in} == questions
    assert all(set(row) == {"question_id", "answer"} and row["answer"] in choices for row in handed_in)


@EACH_TASK
def test_the_best_checkpoint_evaluates_to_what_was_reported(task, trained, world, tmp_path):
    best = trained / task / "checkpoint_best.pth"
    run(task, world, tmp_path, "--evaluate", "--pretrained", str(best))
    for name in ("predictions_test.json", SUBMISSION[task]):
        assert read(tmp_path, name) == read(trained / task, name)
    assert read(tmp_path, "result.json")["metrics"] == read(trained / task, "result.json")["metrics"]


@EACH_TASK
def test_the_deployment_form_answers_at_about_the_same_cost(task, trained, world, tmp_path):
    best = trained / task / "checkpoint_best.pth"
    run(task, world, tmp_path, "--evaluate", "--pretrained", str(best), keep="fixed")
    fixed, result = read(tmp_path, "result.json"), read(trained / task, "result.json")
    assert fixed["temperature"] == result["temperature"]
    assert fixed["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.05)
    assert len(read(tmp_path, "predictions_test.json")) == PICTURES


@EACH_TASK
def test_a_resumed_run_is_the_uninterrupted_one(task, trained, world, tmp_path):
    runs.interrupt_in_the_second_epoch(lambda: run(task, world, tmp_path))
    run(task, world, tmp_path, "--resume")
    assert_same_run(tmp_path, trained / task)


@EACH_TASK
def test_tokens_and_weights_go_together_and_the_teacher_is_heard(task, world, tmp_path, caplog):
    caplog.set_level("INFO")
    run(task, world, tmp_path / "dense", "--p", "0", max_epoch=1)
    best, p = str(tmp_path / "dense" / "checkpoint_best.pth"), 0.35
    both = ("--enable-sparse-api", "--token_reduce", "--pretrained", best, "--p", str(p))
    run(task, world, tmp_path / "both", *both, distill="true", max_epoch=1)
    runs.assert_tokens_weights_and_teacher(tmp_path / "both")
    assert "not fitted" not in caplog.text  # every layer was given something


def test_a_run_that_was_cut_within_an_epoch_is_the_uninterrupted_one(world, tmp_path):
    """Of VQA: scoring captions takes long, and their decoder is the same."""
    task, settings = "vqa", {"epoch_steps": 2, "save_steps": 1, "max_epoch": 1}
    run(task, world, tmp_path / "whole", **settings)
    runs.cut_at(1, lambda: run(task, world, tmp_path / "cut", **settings))
    run(task, world, tmp_path / "cut", "--resume", **settings)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.fixture(scope="module")
def two_processes(trained, world, tmp_path_factory) -> Path:
    """The folder of runs in two processes: of each task an evaluation, and one step of training with half the batch."""
    folder = tmp_path_factory.mktemp("two")
    lines = []
    for task in SUBMISSION:
        best = str(trained / task / "checkpoint_best.pth")
        lines.append([f"compress_{task}_dtp", *flags(task, world, folder / "evaluated" / task, "--evaluate", "--pretrained", best)])
        step = flags(task, world, folder / "step" / task, max_epoch=1, batch_size_train=4)
        lines.append([f"compress_{task}_dtp", *step])
    runs.run_in_two_processes(folder, lines)
    return folder


@EACH_TASK
def test_two_processes_give_the_metrics_of_one(task, trained, two_processes):
    alone, shared = trained / task, two_processes / "evaluated" / task
    assert read(shared, "result.json")["metrics"] == read(alone, "result.json")["metrics"]
    rows, expected = (read(folder, "predictions_test.json") for folder in (shared, alone))
    assert {name: row["prediction"] for name, row in rows.items()} == {n: row["prediction"] for n, row in expected.items()}


@EACH_TASK
def test_two_processes_with_half_the_batch_take_the_step_of_one(task, trained, two_processes):
    """The task's loss is a mean over words, of which the halves have more or fewer."""
    alone, shared = (log_of(folder / task)[0]["loss"] for folder in (trained, two_processes / "step"))
    assert shared["similarity"] == pytest.approx(alone["similarity"], rel=1e-4)
    assert shared["task"] == pytest.approx(alone["task"], rel=0.02)


def test_answers_may_be_generated(trained, world, tmp_path):
    best = trained / "vqa" / "checkpoint_best.pth"
    run("vqa", world, tmp_path, "--evaluate", "--pretrained", str(best), inference="generate")
    assert len(read(tmp_path, "vqa_result.json")) == PICTURES


@EACH_TASK
def test_a_file_cut_off_is_refused_in_one_line(task, world, tmp_path, capsys):
    annotations = tmp_path / "annotations"
    shutil.copytree(world / "annotations", annotations)
    cut = annotations / {"caption": "coco_karpathy_val.json", "vqa": "vqa_val.json"}[task]
    cut.write_text(cut.read_text()[:-20])
    said = runs.refusal(capsys, lambda: run(task, world, tmp_path / "out", ann_root=annotations))
    assert cut.name in said and "cut off" in said


@EACH_TASK
def test_a_p_out_of_reach_names_the_range(task, world, tmp_path, capsys):
    """The decoder, which is not pruned, is expensive here."""
    said = runs.refusal(capsys, lambda: run(task, world, tmp_path, "--p", "0.95"))
    low, high = (float(part) for part in said.split("pruning removes ")[1].split(" of the")[0].split(" to "))
    assert P < low < high < 0.95  # of pruning from the first block on


def test_a_missing_ground_truth_names_its_key(world, tmp_path, capsys):
    said = runs.refusal(capsys, lambda: run("caption", world, tmp_path, coco_gt_root="/nowhere"))
    assert "/nowhere" in said and "set the key 'coco_gt_root'" in said


def test_what_is_trained_on_is_no_test_however_it_is_spelt(world, tmp_path, capsys):
    said = runs.refusal(capsys, lambda: run("vqa", world, tmp_path, test_file="vqa_train.json"))
    assert "test_file: vqa_train.json is among the train_files" in said


def test_no_answers_to_choose_from_is_refused_in_one_line(world, tmp_path, capsys):
    said = runs.refusal(capsys, lambda: run("vqa", world, tmp_path, answer_list="nowhere"))
    assert "nowhere" in said
