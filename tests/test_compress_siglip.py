"""The script for CLIP from a folder of SigLIP to its files: it trains, goes on, evaluates, predicts and draws."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.load import load_config
from configs.schema import ClipRetrievalConfig
from data.shapes.write import make_shapes
from models.weights.reading import read_checkpoint
from tasks.registry import load_any_config, open_view
from tests import runs
from tests.folders import SIDE, SIGLIP_WORDS, siglip_folder
from tests.runs import FILES, assert_same_run, assert_same_weights, assert_tokens_weights_and_teacher, log_of, read
from tools import export, predict, visualize
from tools.exports.deployment import deployed
from utils import UserError

LENGTH = 24
SETTINGS = {
    "dataset": "flickr", "p": 0.3, "keep": "instance", "sd_num": 8, "sd_dim": 24, "batch_size_train": 8, "batch_size_test": 8,
    "calibration_size": 8, "queue_size": 20, "num_workers": 0, "max_epoch": 2, "ramp_epochs": 1, "epoch_steps": 1, "alpha": 0.4,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """Data, the folder of a SigLIP whose tokenizer knows their words, and a config that names nothing else."""
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=22, size=10, tasks=("retrieval",), eval_size=11, workers=1)
    words = [f"\u2581{word}" for word in (folder / "annotations/vocab.txt").read_text().split() if not word.startswith("[")]
    siglip_folder(folder / "siglip", (*SIGLIP_WORDS[:3], *words), LENGTH)
    files = {"image_root": str(folder / "images"), "ann_root": str(folder / "annotations"), "pretrained": str(folder / "siglip")}
    (folder / "experiment.yaml").write_text(json.dumps({**SETTINGS, **files}))
    return folder


def run(world: Path, out: Path, *more: str) -> None:
    flags = ["--config", str(world / "experiment.yaml"), "--output_dir", str(out), "--device", "cpu", *more]
    runs.run_here("compress_retrieval_clip_dtp", flags)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(world, folder)
    return folder


def test_a_run_takes_all_of_the_model_from_its_folder(trained, world):
    assert FILES <= {path.name for path in trained.iterdir()}
    config, result = load_config(ClipRetrievalConfig, trained / "config.yaml"), read(trained, "result.json")
    assert config.clip.family == "siglip" and config.image_size == SIDE and config.max_text_tokens == LENGTH
    assert config.pictures.mean == (0.5, 0.5, 0.5) and config.tokenizer == str(world / "siglip")
    assert result["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.01)
    assert [set(entry["loss"]) for entry in log_of(trained)] == [{"contrastive", "similarity", "similarity_momentum", "total"}] * 2
    saved, start = read_checkpoint(trained / "checkpoint_best.pth")["model"], read_checkpoint(world / "siglip")["model"]
    assert torch.equal(saved["logit_bias"].reshape(1), start["logit_bias"])
    assert not torch.equal(saved["visual.pool.probe"], start["vision_model.head.probe"])  # it was trained


def test_a_run_that_was_cut_goes_on_as_if_it_had_not_been(trained, world, tmp_path):
    runs.interrupt_in_the_second_epoch(lambda: run(world, tmp_path / "parted"))
    run(world, tmp_path / "parted", "--resume")
    assert_same_run(trained, tmp_path / "parted")
    assert_same_weights(trained, tmp_path / "parted")


def test_evaluating_the_checkpoint_gives_the_result_of_its_run(trained, tmp_path):
    flags = ["--config", str(trained / "config.yaml"), "--pretrained", str(trained / "checkpoint_best.pth"), "--evaluate"]
    runs.run_here("compress_retrieval_clip_dtp", [*flags, "--output_dir", str(tmp_path)])
    ours, theirs = read(tmp_path, "result.json"), read(trained, "result.json")
    assert ours["metrics"] == theirs["metrics"] and ours["gflops"]["test"] == pytest.approx(theirs["gflops"]["test"])


def test_the_uncompressed_folder_is_evaluated(world, tmp_path):
    run(world, tmp_path, "--evaluate", "--p", "0")
    assert 0 <= read(tmp_path, "result.json")["metrics"]["test"]["r_mean"] <= 100


def test_tokens_weights_and_a_teacher_work_together(world, tmp_path):
    settings = {"sparsity_type": "2:4", "distill": "true", "p": 0.4}
    run(world, tmp_path, *(f"--set={key}={value}" for key, value in settings.items()))
    assert_tokens_weights_and_teacher(tmp_path)


def test_what_is_drawn_is_what_the_record_says(trained):
    view = open_view(load_any_config(trained / "config.yaml"), trained / "checkpoint_best.pth")
    (batch, *_) = view.batches(view.ids)
    records = view.records(view.forward(batch))
    for i, sample in enumerate(view.samples(batch)):
        (_, picture, alive), (words, read_on) = sample.pictures[0], sample.texts[0]
        assert picture.shape == (SIDE, SIDE, 3) and len(words) == LENGTH - 1  # the last place is no word
        for name, found, prefix in (("image", alive.reshape(len(alive), -1), 0), ("text", read_on, 1)):
            record, standing = records[name], np.arange(found.shape[1])
            for block, (kept, leaving) in enumerate(zip(record.kept, record.leaving, strict=True)):
                if kept is not None:
                    standing = standing[kept[i, : len(standing)].numpy()]
                    merged = int(leaving[i]) - prefix - len(standing)
                    standing = np.append(standing, [-1] * merged)
                assert found[block].nonzero()[0].tolist() == [place for place in standing if place >= 0]


def test_exported_weights_answer_alike_and_other_formats_are_refused(trained, tmp_path):
    best = trained / "checkpoint_best.pth"
    export.export(best, None, tmp_path, packed=False, half=False)
    views = [open_view(load_any_config(path.with_name("config.yaml")), path) for path in (best, tmp_path / "model.safetensors")]
    (batch, *_) = views[0].batches(views[0].ids)
    features = [view.forward(batch)[side].feature for view in views for side in (0, 1)]
    assert torch.equal(features[0], features[2]) and torch.equal(features[1], features[3])
    with pytest.raises(UserError, match="a SigLIP, which is not exported to onnx or openvino; give --format safetensors"):
        deployed(best, None, None)


def test_a_checkpoint_predicts_and_is_drawn(trained, world, tmp_path, monkeypatch, capsys):
    pictures = sorted(str(path) for path in (world / "images").rglob("*.jpg"))[:2]
    inputs = [f"--image={path}" for path in pictures] + ["--text=two red stars above a circle"]
    monkeypatch.setattr(sys, "argv", ["predict.py", "--checkpoint", str(trained / "checkpoint_best.pth"), "--json", *inputs])
    predict.main()
    said = json.loads(capsys.readouterr().out)
    tokens = said["tokens"]
    assert len(said["ranking"]) == 2 and tokens["image"]["of"] == [16, 16] and tokens["text"]["of"] == [LENGTH]
    assert all(kept < 16 for kept in tokens["image"]["kept"])
    files = ["--config", str(trained / "config.yaml"), "--checkpoint", str(trained / "checkpoint_best.pth")]
    monkeypatch.setattr(sys, "argv", ["visualize.py", *files, "--samples", "2", "--out", str(tmp_path)])
    visualize.main()
    assert list(tmp_path.glob("*.png"))
