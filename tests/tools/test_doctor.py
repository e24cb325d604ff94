"""The doctor: silent on a run that is well, and it names all that would stop one that is not, in the words of the run itself."""

import json
import os
import shlex
import shutil
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.train import Trainer
from metrics import caption
from tasks.registry import load_any_config
from tests import bad_inputs
from tests.bad_inputs import write_world
from tests.runs import read, run_here
from tests.spoil import WEIGHTS, cut, entry, gone, written
from tools import doctor
from tools.checks import files, training

TRAINING = "--no-evaluate --output_dir {folder}/out --set batch_size_train=2 --set max_epoch=3"
STOPPING = {
    f"{section.lower()}: {bad.name}": bad
    for section in ("Settings", "Weights", "Annotations", "Own data", "Images")
    for bad in bad_inputs.TABLE[section]
}
TASKS = ("nlvr", "retrieval", "retrieval_clip", "caption", "vqa")


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("worlds")
    return {task: write_world(folder / task, task) for task in TASKS}


@pytest.fixture
def world(worlds, tmp_path) -> Callable[[str], Path]:
    """A copy of the world of a task, to spoil."""

    def copied(task: str) -> Path:
        folder = tmp_path / "run"
        shutil.copytree(worlds[task], folder)
        config = folder / "config.yaml"
        config.write_text(config.read_text().replace(str(worlds[task]), str(folder)))
        return folder

    return copied


@pytest.fixture
def examined(monkeypatch, capsys) -> Callable[..., tuple[int, list[str]]]:
    """Runs the doctor on the config of a folder; returns its exit code and its lines."""

    def run(folder: Path, flags: str = TRAINING) -> tuple[int, list[str]]:
        given = shlex.split(flags.replace("{folder}", str(folder)))
        monkeypatch.setattr(sys, "argv", ["doctor", "--config", str(folder / "config.yaml"), *given])
        capsys.readouterr()
        try:
            doctor.main()
            code = 0
        except SystemExit as stopped:
            code = int(stopped.code)
        return code, capsys.readouterr().out.splitlines()

    return run


def of(level: str, lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith(level)]


def the(name: str, lines: list[str]) -> str:
    (line,) = (line for line in lines if f" {name}: " in line)
    return line


@pytest.mark.parametrize("task", TASKS)
def test_a_run_that_is_well_passes(task, worlds, examined):
    code, lines = examined(worlds[task])
    assert code == 0 and not of("problem", lines), lines
    assert lines[-1].endswith("nothing was found that would stop the run")
    steps = 3 * (4 // 2)
    assert f" {steps} steps on 1 process" in the("length", lines) and "of 2 samples takes" in the("training step", lines)
    assert " s at p" in the("training step", lines) and " at p, and " in the("length", lines)


def test_nothing_on_the_disk_changes(worlds, examined):
    folder = worlds["nlvr"]
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.parent.rglob("*")}
    examined(folder)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.parent.rglob("*")} == before


@pytest.mark.parametrize("name", STOPPING)
def test_what_stops_a_run_is_found_in_the_same_words(name, world, examined):
    bad = STOPPING[name]
    folder = world(bad.task)
    bad.spoil(folder)
    code, lines = examined(folder, f"--evaluate {bad.flags}")
    assert code == 2 and lines[-1].endswith("the run would stop")
    assert any(bad.said in line for line in lines if not line.startswith(("ok", "warning"))), lines


def test_all_problems_are_found_at_once(world, examined):
    folder = world("vqa")
    spoilers = [
        cut(WEIGHTS, 0.6), gone("vocab.txt"), entry("vqa_train", answer=None), written("vqa_val.json", b"["),
        written("answer_list.json", {}), written("3a.jpg", b"GIF"),
    ]  # fmt: skip
    for spoil in spoilers:
        spoil(folder)
    code, lines = examined(folder, f"{TRAINING} --set ramp_epochs=9 --resume --device cuda:99")
    said = (
        "is it cut off? Fetch it again", "set the key 'tokenizer'", "entry 1 has no 'answer'", "vqa_val.json: not valid JSON",
        "must be a list of texts", "the ramp ends in epoch 9", "no such checkpoint to resume from", "cuda",
    )  # fmt: skip
    assert code == 2 and len(of("problem", lines)) == len(said) + 1
    assert [part for part in said if not any(part in line for line in of("problem", lines))] == []
    assert "1 of all 4 cannot be read" in the("pictures of validation and test", lines)


def test_all_keys_that_are_wrong_are_named(worlds, examined):
    code, lines = examined(worlds["nlvr"], "--p 2 --set init_lr=abc --set bach_size=3")
    assert code == 2 and len(of("problem", lines)) == 3
    for said in ("key 'p' must be below 1", "key 'init_lr' must be a number", "unknown key 'bach_size'"):
        assert any(said in line for line in of("problem", lines)), said


def test_weights_and_teacher_are_both_at_fault(world, examined):
    folder = world("nlvr")
    cut(WEIGHTS, 0.6)(folder)
    written("teacher.pth", b"<!DOCTYPE html>")(folder)
    _, lines = examined(folder, f"{TRAINING} --set distill=true --set teacher={{folder}}/teacher.pth")
    assert len(of("problem", lines)) == 2
    assert "cut off" in the("weights", of("problem", lines)) and "not a PyTorch checkpoint" in the("teacher", of("problem", lines))


# Pictures


def with_late_pictures(folder: Path, number: int) -> None:
    """Adds training samples behind the others, whose left pictures are broken."""
    entries = read(folder, "nlvr_train.json")
    written("broken.jpg", b"GIF")(folder)
    for place in range(number):
        shutil.copy(folder / "broken.jpg", folder / f"late{place}.jpg")
        entries.append({**entries[0], "images": [f"late{place}.jpg", "0b.jpg"]})
    (folder / "nlvr_train.json").write_text(json.dumps(entries))


def test_broken_pictures_are_counted_and_the_first_are_listed(world, examined):
    folder = world("nlvr")
    with_late_pictures(folder, 30)
    code, lines = examined(folder, f"{TRAINING} --all")
    assert code == 2 and "30 of all 30 cannot be read" in the("pictures of training", lines)
    assert len([line for line in lines if "late" in line and line.startswith("  ")]) == 20
    assert "           and 10 more" in lines


def test_by_default_some_pictures_are_read_and_it_says_how_many(world, examined):
    folder = world("nlvr")
    with_late_pictures(folder, 5)
    _, lines = examined(folder, f"{TRAINING} --pictures 2")
    assert "2 of 2 that were tried, spread evenly over 5 (--all reads every one) cannot be read" in the(
        "pictures of training", lines
    )


def test_pictures_that_training_skips_are_no_problem(world, examined):
    folder = world("nlvr")
    with_late_pictures(folder, 2)
    code, lines = examined(folder, f"{TRAINING} --set on_bad_sample=skip")
    assert code == 0 and the("pictures of training", lines).startswith("warning")
    written("3a.jpg", b"GIF")(folder)  # of the validation split
    assert examined(folder, f"{TRAINING} --set on_bad_sample=skip")[0] == 2


def test_the_other_layout_of_nlvr2_is_read(world, examined):
    folder = world("nlvr")
    for split in ("train", "dev", "test"):
        (folder / "images" / split / "7").mkdir(parents=True)
        for picture in folder.glob("*.jpg"):
            shutil.copy(picture, folder / "images" / split / "7")
        entries = read(folder, f"nlvr_{split}.json")
        changed = [{**entry, "images": [f"{split}/{name}" for name in entry["images"]]} for entry in entries]
        (folder / f"nlvr_{split}.json").write_text(json.dumps(changed))
    assert examined(folder)[0] == 0


def test_many_pictures_are_read_by_several_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(files, "CHUNK", 2)
    reads = [Named(str(tmp_path / f"{index}.jpg"), index % 3 == 0) for index in range(8)]
    assert files.broken(reads, "pictures") == [f"{tmp_path}/{index}.jpg: broken" for index in (0, 3, 6)]


class Named(namedtuple("Named", "path broken")):
    def __call__(self) -> None:
        if self.broken:
            raise files.BadPicture(f"{self.path}: broken")


def test_a_sample_is_spread_from_the_first_to_the_last():
    assert files.spread(range(101), 5) == [0, 25, 50, 75, 100]
    assert files.spread(range(3), 5) == files.spread(range(3), None) == [0, 1, 2]
    assert files.spread(range(9), 1) == [0]


# The disk


@pytest.mark.parametrize(("share", "level"), [(0.9, "problem"), (1.5, "warning"), (9.0, "ok")])
def test_the_free_disk_is_compared_with_what_the_checkpoints_take(worlds, examined, monkeypatch, share, level):
    monkeypatch.setattr(files, "checkpoint_sizes", lambda config: (2 * 10**9, 5 * 10**9))
    free = int(share * 17 * 10**9)  # the best, the last and the one before, and one more while it is written
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "free")(free))
    code, lines = examined(worlds["nlvr"])
    assert the("disk", lines).startswith(level) and "17.00 GB are needed" in the("disk", lines)
    assert code == (2 if level == "problem" else 0)


def test_the_sizes_of_checkpoints_are_those_of_the_files(world, examined):
    folder = world("nlvr")
    run_here("compress_nlvr_dtp", shlex.split(f"--config {folder}/config.yaml {TRAINING}".replace("{folder}", str(folder))))
    config = load_any_config(folder / "config.yaml")
    best, last = files.checkpoint_sizes(config)
    for name, size in (("checkpoint_best.pth", best), ("checkpoint_last.pth", last)):
        assert size <= (folder / "out" / name).stat().st_size <= 2 * size + 10**5  # names and places are most of a tiny file
    _, lines = examined(folder)
    assert "of another run; go on with that run by --resume" in the("output", of("problem", lines))


# The run


def test_a_run_to_resume_is_restored(world, examined):
    folder = world("nlvr")
    flags = TRAINING.replace("{folder}", str(folder))
    run_here("compress_nlvr_dtp", shlex.split(f"--config {folder}/config.yaml {flags}"))
    code, lines = examined(folder, f"{TRAINING} --set max_epoch=5 --resume")
    assert code == 0 and "goes on in epoch 4 of 5" in the("resume", lines) and " 4 steps" in the("length", lines)
    code, lines = examined(folder, f"{TRAINING} --resume")
    assert code == 0 and "all 3 epochs are done" in the("resume", of("warning", lines))
    code, lines = examined(folder, f"{TRAINING} --resume --processes 2")
    assert code == 2 and "cannot go on with 2" in the("resume", of("problem", lines))
    code, lines = examined(folder, f"{TRAINING} --resume --set keep=mean")
    assert code == 2 and "a run with keep 'instance' cannot go on" in the("resume", of("problem", lines))


def test_more_processes_take_fewer_steps_and_may_have_too_few_samples(worlds, examined):
    code, lines = examined(worlds["nlvr"], f"{TRAINING} --processes 2")
    assert code == 0 and " 3 steps on 2 processes" in the("length", lines)
    code, lines = examined(worlds["nlvr"], f"{TRAINING} --processes 4")
    assert code == 2 and "do not fill a batch of 2 on each of 4 processes" in the("training step", of("problem", lines))


def test_p_out_of_reach_stops_a_run_only_where_training_cannot_widen_it(worlds, examined):
    code, lines = examined(worlds["nlvr"], f"{TRAINING} --p 0.97 --set ramp_epochs=1")
    assert code == 2 and "p = 0.97 is out of reach" in the("p", of("problem", lines))
    code, lines = examined(worlds["nlvr"], f"{TRAINING} --p 0.97 --set ramp_epochs=2")
    assert code == 0 and "unless training widens it by epoch 2" in the("p", of("warning", lines))
    code, lines = examined(worlds["nlvr"], f"{TRAINING} --p 0.97 --set ramp_epochs=1 --quick")
    assert code == 0 and "not checked, with --quick" in the("p", lines)


def test_sparse_weights_are_counted_for_p(worlds, examined):
    code, lines = examined(worlds["nlvr"], f"{TRAINING} --set sparsity_type=2:4 --pretrained= --p 0.5 --set ramp_epochs=1")
    assert code == 0 and "0.5 can be reached" in the("p", lines), lines


def test_a_batch_beyond_the_memory_is_a_problem(worlds, examined, monkeypatch):
    def full(self, loss):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Trainer, "add", full)
    code, lines = examined(worlds["nlvr"])
    assert code == 2 and "a batch of 2 does not fit into the memory of cpu; lower 'batch_size_train'" in the("training step", lines)


def test_a_memory_that_is_nearly_full_is_a_warning(worlds, examined, monkeypatch):
    monkeypatch.setattr(training, "_memory", lambda device: (95, 100))
    code, lines = examined(worlds["nlvr"])
    assert code == 0 and the("training step", lines).startswith("warning")


def test_a_loss_that_is_no_number_is_a_problem(worlds, examined, monkeypatch):
    monkeypatch.setattr(training, "train_epoch", lambda *args: {"total": float("nan")})
    code, lines = examined(worlds["nlvr"])
    assert code == 2 and "the loss is nan at the first step" in the("training step", lines)


def test_a_long_step_is_not_repeated(worlds, examined, monkeypatch):
    taken = []
    monkeypatch.setattr(training, "train_epoch", lambda *args: taken.append(args) or {"total": 1.0})
    monkeypatch.setattr(training, "LONG_STEP", 0)
    _, lines = examined(worlds["nlvr"])
    assert len(taken) == 1 and "at p" not in the("length", lines)


def test_an_error_that_nobody_foresaw_hides_nothing(worlds, examined, monkeypatch):
    def fails(task):
        raise ZeroDivisionError("of a new kind")

    monkeypatch.setattr(doctor.TASKS["nlvr"], "loaders", fails)
    code, lines = examined(worlds["nlvr"])
    assert code == 2 and "ZeroDivisionError: of a new kind" in the("data", lines) and the("weights", lines).startswith("ok")


def test_without_java_captions_lack_metrics_and_the_run_goes_on(worlds, examined, monkeypatch):
    monkeypatch.setenv("PATH", "")
    code, lines = examined(worlds["caption"])
    assert code == 0 and len(of("warning  metrics", lines)) == 3
    assert not of("warning  metrics", examined(worlds["nlvr"])[1])


def test_spice_without_its_models_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(caption, "_java", lambda *arguments: "")
    monkeypatch.setattr(caption, "_PROGRAMS", tmp_path)
    assert list(caption.not_computable()) == ["SPICE"]


def test_flags_without_effect_are_named(worlds, examined):
    _, lines = examined(worlds["nlvr"], f"{TRAINING} --world_size 8")
    assert "--world_size has no effect" in the("config", of("warning", lines))


def test_an_evaluation_takes_no_step(worlds, examined):
    code, lines = examined(worlds["nlvr"], "--evaluate --output_dir {folder}/out")
    assert code == 0 and not [line for line in lines if "training step" in line]
    assert "0.4, at temperature 3" in the("p", lines)


@pytest.mark.parametrize(
    ("seconds", "said"), [(5, "5.0 seconds"), (90, "1.5 minutes"), (5400, "1.5 hours"), (6 * 86400, "6.0 days")]
)
def test_a_duration_has_its_unit(seconds, said):
    assert training.duration(seconds) == said


def test_the_flags_of_both_programs_are_shown(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["doctor", "--help"])
    with pytest.raises(SystemExit):
        doctor.main()
    shown = capsys.readouterr().out
    assert "--processes N" in shown and "--reduce_ratio" in shown
