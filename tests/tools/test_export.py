"""Exported files give the same predictions and evaluations to the bit, packed or not; some things cannot be exported."""

import json
from pathlib import Path

import pytest
import torch

from data.shapes.write import make_shapes
from models.weights.reading import is_read, read_checkpoint
from tasks.registry import TASKS, open_checkpoint
from tests import runs
from tests.runs import read
from tests.tools.test_predict import evaluate, random_run
from tools import export, predict

SPARSE = {"sparsity_type": "2:4"}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=22, size=20, tasks=("nlvr", "caption", "vqa", "retrieval"), eval_size=3, workers=1)
    return folder


@pytest.fixture
def exported(monkeypatch, capsys):
    """(a run's folder, out, flags) -> what the program prints."""

    def run(folder: Path, out: Path, *more: str) -> str:
        argv = ["--checkpoint", folder / "checkpoint_best.pth", "--out", out, *more]
        monkeypatch.setattr("sys.argv", ["export.py", *map(str, argv)])
        capsys.readouterr()
        export.main()
        return capsys.readouterr().out

    return run


def change(folder: Path, **entries) -> None:
    """Save a run's checkpoint with other entries; weights of a dict go before its own."""
    path = folder / "checkpoint_best.pth"
    saved = torch.load(path)
    saved["model"] |= entries.pop("model", {})
    torch.save({**saved, **entries}, path)


def test_the_contrastive_temperature_that_a_teacher_is_read_with_goes_along(exported, world, tmp_path) -> None:
    random_run("retrieval", world, run := tmp_path / "run")
    change(run, model={"temp": torch.tensor(0.25)})
    exported(run, tmp_path / "plain")
    assert open_checkpoint(tmp_path / "plain" / "model.safetensors", device="cpu").model.temp == 0.25


@pytest.mark.parametrize("task", TASKS)
def test_what_is_read_of_every_task_is_the_same_to_the_bit_packed_or_not(exported, world, tmp_path, task) -> None:
    random_run(task, world, run := tmp_path / "run", **SPARSE)
    exported(run, tmp_path / "plain")
    exported(run, tmp_path / "packed" / "small.safetensors", "--packed")
    plain, packed = tmp_path / "plain" / "model.safetensors", tmp_path / "packed" / "small.safetensors"
    models = [open_checkpoint(path, device="cpu") for path in (run / "checkpoint_best.pth", plain, packed)]
    expected = models[0].model.state_dict()
    for opened in models[1:]:
        found = opened.model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items() if is_read(name))
        assert opened.setting == models[0].setting and opened.sparse.masks.keys() == models[0].sparse.masks.keys()
    assert packed.stat().st_size < 0.8 * plain.stat().st_size < 0.8 * (run / "checkpoint_best.pth").stat().st_size
    assert read_checkpoint(plain).keys() == read_checkpoint(packed).keys() >= {"task", "temperature", "masked", "sparsity_type"}


@pytest.mark.parametrize("task", ["nlvr", "retrieval"])
def test_evaluation_and_prediction_say_the_same_of_the_exported_file(exported, world, tmp_path, task, monkeypatch, capsys) -> None:
    evaluate(task, world, run := tmp_path / "run", **SPARSE)
    exported(run, tmp_path / "out", "--packed")
    file, again = tmp_path / "out" / "model.safetensors", tmp_path / "again"
    argv = ["--config", tmp_path / "out" / "config.yaml", "--evaluate", "--pretrained", file, "--output_dir", again]
    runs.run_here(f"compress_{task}_dtp", list(map(str, argv)))
    assert read(again, "predictions_test.json") == read(run, "predictions_test.json")
    ours, theirs = read(again, "result.json"), read(run, "result.json")
    assert all(ours[key] == theirs[key] for key in ("metrics", "temperature", "params", "sparse_kernels"))
    assert ours["params"]["sparse_total"] > 0 and ours["sparse_kernels"]["used"] == 0

    pictures = sorted((world / "images").rglob("*.jpg"))[: 1 + (task == "nlvr")]
    said = []
    for path in (file, run / "checkpoint_best.pth"):
        images = [word for picture in pictures for word in ("--image", picture)]
        argv = ["predict.py", "--checkpoint", path, *images, "--text", "a red star", "--json", "--device", "cpu"]
        monkeypatch.setattr("sys.argv", list(map(str, argv)))
        capsys.readouterr()
        predict.main()
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]


def test_half_precision_rounds_and_sizes_are_printed(exported, world, tmp_path) -> None:
    random_run("nlvr", world, run := tmp_path / "run", **SPARSE)
    said = exported(run, tmp_path / "half", "--half", "--packed")
    weights, original = (read_checkpoint(p)["model"] for p in (tmp_path / "half/model.safetensors", run / "checkpoint_best.pth"))
    assert all(torch.equal(tensor, original[name].half()) for name, tensor in weights.items() if tensor.is_floating_point())
    floats = [tensor for tensor in weights.values() if tensor.is_floating_point()]
    total, nonzero = sum(t.numel() for t in floats), sum(int((original[n] != 0).sum()) for n in weights if n in original)
    assert f"{nonzero} of {total} parameters are not zero" in said
    assert f"dense in float32 {4 * total / 2**20:.2f} MiB" in said
    assert (tmp_path / "half/model.safetensors").stat().st_size < 0.6 * 4 * total


def test_an_uncompressed_model_is_exported_too_but_not_packed(exported, world, tmp_path, capsys) -> None:
    random_run("nlvr", world, run := tmp_path / "run")
    exported(run, tmp_path / "out")
    assert open_checkpoint(tmp_path / "out/model.safetensors", device="cpu").sparse is None
    said = runs.refusal(capsys, lambda: exported(run, tmp_path / "packed", "--packed"))
    assert "--packed: " in said and "has no sparse weights; leave it out" in said


def test_a_checkpoint_that_is_not_what_it_says_is_refused(exported, world, tmp_path, capsys) -> None:
    random_run("nlvr", world, run := tmp_path / "run", **SPARSE)
    saved = torch.load(run / "checkpoint_best.pth")
    name = saved["masked"][0]

    def refusal() -> str:
        return runs.refusal(capsys, lambda: exported(run, tmp_path / "out"))

    change(run, model={name: torch.ones_like(saved["model"][name])})
    assert f"{name} is masked, but has 4 of 4 weights that are not zero, 2:4 wanted" in refusal()
    change(run, masked=["visual_encoder.nothing"])
    assert "lacks visual_encoder.nothing, which it calls masked" in refusal()
    change(run, masked=[name], sparsity_type="")
    assert "no sparsity_type says how" in refusal()
    assert not (tmp_path / "out").exists()


def test_nothing_of_another_run_is_written_over(exported, world, tmp_path, capsys) -> None:
    random_run("nlvr", world, run := tmp_path / "run")
    exported(run, run / "model.safetensors")
    random_run("nlvr", world, other := tmp_path / "other", image_size=32)
    before = (run / "config.yaml").read_text()
    assert "config.yaml: is of another run" in runs.refusal(capsys, lambda: exported(other, run / "other.safetensors"))
    assert (run / "config.yaml").read_text() == before and not (run / "other.safetensors").exists()
    (run / "checkpoint_best.pth").rename(run / "checkpoint.pth")
    assert "no such checkpoint" in runs.refusal(capsys, lambda: exported(run, run / "model.safetensors"))
    (run / "checkpoint.pth").rename(run / "checkpoint_best.pth")
    assert "there already" in runs.refusal(capsys, lambda: exported(run, run / "checkpoint_best.pth"))
