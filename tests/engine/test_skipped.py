"""Runs with on_bad_sample: skip on training pictures that cannot be read: the same numbers everywhere, and a full account."""

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs
from tests.bad_inputs import write_world
from tests.runs import assert_same_run, log_of, read, refusal
from tests.spoil import written

BROKEN = "broken.jpg"
SETTINGS = "--set on_bad_sample=skip --set max_epoch=2 --set ramp_epochs=1 --p 0 --pretrained= --set calibration_size=4"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """The data of a tiny run with two training samples more, whose left pictures cannot be read."""
    folder = write_world(tmp_path_factory.mktemp("world"), "nlvr")
    entries = read(folder, "nlvr_train.json")
    entries += [{**entry, "images": [BROKEN, entry["images"][1]]} for entry in entries[:2]]
    (folder / "nlvr_train.json").write_text(json.dumps(entries))
    written(BROKEN, b"GIF")(folder)
    return folder


def flags(world: Path, out: Path, more: str = "") -> list[str]:
    given = f"--config {world}/config.yaml --no-evaluate --output_dir {out} {SETTINGS} --set batch_size_train=2 {more}"
    return shlex.split(given)


def run(world: Path, out: Path, more: str = "") -> Path:
    runs.run_here("compress_nlvr_dtp", flags(world, out, more))
    return out


@pytest.fixture(scope="module")
def alone(world, tmp_path_factory) -> Path:
    return run(world, tmp_path_factory.mktemp("runs") / "alone", "--set num_workers=0")


def test_the_run_lists_what_it_skipped(alone, world):
    skipped = read(alone, "result.json")["skipped_samples"]
    epochs = [entry["skipped_samples"] for entry in log_of(alone)]
    (said,) = skipped["pictures"]
    assert said.startswith(f"{world / BROKEN}: not a readable picture")
    assert skipped["count"] == sum(epoch["count"] for epoch in epochs) >= 4  # both samples in both epochs
    assert all(epoch["pictures"] == [said] for epoch in epochs) and skipped["calibration"] == [said]


def test_the_numbers_do_not_depend_on_the_workers(alone, world, tmp_path):
    assert_same_run(run(world, tmp_path / "workers", "--set num_workers=2"), alone)


def test_a_resumed_run_knows_what_was_skipped_before(alone, world, tmp_path):
    out = tmp_path / "interrupted"
    runs.interrupt_in_the_second_epoch(lambda: run(world, out, "--set num_workers=0"))
    assert_same_run(run(world, out, "--set num_workers=0 --resume"), alone)


def test_the_processes_add_up_what_they_skipped(alone, world, tmp_path):
    out = tmp_path / "two"
    runs.run_in_two_processes(tmp_path, [["compress_nlvr_dtp", *flags(world, out, "--set num_workers=0 --set batch_size_train=1")]])
    assert read(out, "result.json")["skipped_samples"] == read(alone, "result.json")["skipped_samples"]


def stops(capsys, act: Callable[[], object]) -> None:
    assert "not a readable picture" in refusal(capsys, act)


def test_without_the_key_the_run_stops(world, tmp_path, capsys):
    stops(capsys, lambda: run(world, tmp_path / "out", "--set on_bad_sample=stop"))


@pytest.mark.parametrize("split", ["dev", "test"])
def test_evaluation_stops_on_a_picture_that_cannot_be_read(world, tmp_path, capsys, split):
    folder = tmp_path / "world"
    shutil.copytree(world, folder)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace(str(world), str(folder)))
    entries = read(folder, f"nlvr_{split}.json")
    entries[-1]["images"][0] = BROKEN
    (folder / f"nlvr_{split}.json").write_text(json.dumps(entries))
    stops(capsys, lambda: run(folder, tmp_path / "out"))
