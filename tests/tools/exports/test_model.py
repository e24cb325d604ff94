"""Exported models answer like the deployment form in PyTorch, for batches of any size; int8 files come close."""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from data.shapes.write import make_shapes
from madtp.blocks import Guidance
from tests import runs
from tests.runs import read
from tests.tools.test_predict import random_run
from tools import evaluate, export, predict
from tools.exports.deployment import deployed
from tools.exports.engines import opened_engine
from tools.exports.folder import DESCRIPTION

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
pytest.importorskip("onnxscript", reason="needs the extra onnx")
pytest.importorskip("onnxruntime", reason="needs the extra onnx")

KINDS = ["onnx", "openvino"]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=22, size=20, tasks=("nlvr", "vqa", "retrieval"), eval_size=4, workers=1)
    return folder


@pytest.fixture(scope="module")
def exported(world, tmp_path_factory):
    """(task, flags) -> the folder that the program writes, next to the run's; written once."""
    written: dict[tuple, Path] = {}

    def run(task: str, *flags: str) -> Path:
        if "openvino" in flags:
            pytest.importorskip("openvino", reason="needs the extra openvino")
            if "--int8" in flags:
                pytest.importorskip("nncf", reason="needs the extra openvino")
        if (task, *flags) not in written:
            folder = tmp_path_factory.mktemp(task)
            random_run(task, world, folder / "run")
            argv = ["--checkpoint", folder / "run" / "checkpoint_best.pth", "--out", folder / "out", "--format", *flags]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("sys.argv", ["export.py", *map(str, argv)])
                export.main()
            written[(task, *flags)] = folder / "out"
        return written[(task, *flags)]

    return run


def evaluated(folder: Path, capsys, *flags: str) -> dict:
    """What tools/evaluate.py writes of the test split."""
    with pytest.MonkeyPatch.context() as patch:
        argv = ["--exported", folder, "--json", folder / "evaluated.json", *flags]
        patch.setattr("sys.argv", ["evaluate.py", *map(str, argv)])
        evaluate.main()
    capsys.readouterr()
    return read(folder, "evaluated.json")


@pytest.mark.parametrize("kind", KINDS)
def test_nlvr_answers_like_an_evaluation_with_fixed_numbers(exported, world, tmp_path, capsys, kind) -> None:
    folder = exported("nlvr", kind)
    argv = random_run("nlvr", world, tmp_path / "fixed", keep="fixed")
    runs.run_here("compress_nlvr_dtp", argv)
    wanted, found = read(tmp_path / "fixed", "predictions_test.json"), evaluated(folder, capsys)
    assert found["predictions"].keys() == wanted.keys()
    for sample, row in found["predictions"].items():
        assert row["score"] == pytest.approx(wanted[sample]["score"], abs=1e-5)
        assert (row["prediction"], row["tokens_kept"]) == (wanted[sample]["prediction"], wanted[sample]["tokens_kept"])
        assert row["gflops"] == pytest.approx(wanted[sample]["gflops"])
    result = read(tmp_path / "fixed", "result.json")
    assert found["metrics"] == result["metrics"]["test"] and found["gflops"] == pytest.approx(result["gflops"]["test"])


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_features_of_clip_are_those_of_its_towers_with_the_numbers_written_down(exported, kind) -> None:
    folder = exported("retrieval_clip", kind)
    deployment = deployed(folder.parent / "run" / "checkpoint_best.pth", None, None)
    described = read(folder, DESCRIPTION)
    assert {name: [2**31 - 1 if n is None else n for n in each] for name, each in described["counts"].items()} == deployment.counts
    images, ids, mask = deployment.inputs[0]
    guidance = Guidance(deployment.setting)
    for part, inputs, encoded in (
        ("image_encoder", images, deployment.model.encode_image(images, guidance)),
        ("text_encoder", ids, deployment.model.encode_text(ids, mask, guidance)),
    ):
        engine = opened_engine(folder / described["parts"][part]["file"])
        if part == "text_encoder":
            inputs = torch.nn.functional.pad(ids, (0, described["text_tokens"] - ids.shape[1]))
        for number in (1, len(inputs)):
            torch.testing.assert_close(engine(inputs[:number])[0], encoded.feature[:number], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_blip_retrieval_exports_its_online_image_encoder_alone(exported) -> None:
    folder = exported("retrieval", "onnx")
    described = read(folder, DESCRIPTION)
    assert described["parts"].keys() == {"image_encoder"} and described["counts"].keys() == {"vision"}
    deployment = deployed(folder.parent / "run" / "checkpoint_best.pth", None, None)
    images = deployment.inputs[0][0]
    wanted = deployment.model.encode_image(images, Guidance(deployment.setting))
    tokens, feature = opened_engine(folder / "image_encoder.onnx")(images)
    torch.testing.assert_close(tokens, wanted.tokens, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(feature, wanted.feature, atol=1e-5, rtol=1e-4)
    graph = onnx.load(folder / "image_encoder.onnx").graph
    assert not any("_m." in tensor.name or "text" in tensor.name for tensor in graph.initializer)


def test_the_image_side_of_questions_is_exported_and_gives_no_answer_alone(exported, world, capsys) -> None:
    folder = exported("vqa", "onnx")
    said = runs.refusal(capsys, lambda: evaluated(folder, capsys))
    assert "holds image_encoder of task 'vqa', which gives no answer alone" in said


def test_the_graph_gathers_and_multiplies_and_keeps_the_batch_free(exported) -> None:
    graph = onnx.load(exported("nlvr", "onnx") / "model.onnx").graph
    operators = Counter(node.op_type for node in graph.node)
    assert operators["TopK"] and operators["Gather"] and not any("Scatter" in name or name == "Loop" for name in operators)
    for each in graph.input:
        assert each.type.tensor_type.shape.dim[0].dim_param and not each.type.tensor_type.shape.dim[1].dim_param


def test_the_description_says_what_the_files_hold(exported) -> None:
    folder = exported("nlvr", "onnx")
    described = read(folder, DESCRIPTION)
    part = described["parts"]["model"]
    assert part["inputs"]["images"] == {"shape": ["batch", 2, 3, 96, 96], "type": "float32"}
    assert part["outputs"] == {"logits": {"shape": ["batch", 2], "type": "float32"}}
    assert part["gflops"] < part["gflops_uncompressed"] and described["calibration_samples"] > 0
    assert part["checked"]["fp32"]["deviation"] <= 1e-4 and part["checked"]["fp32"]["engine"] == "onnxruntime"
    assert set(path.name for path in folder.iterdir()) >= {"model.onnx", "config.yaml", DESCRIPTION}


@pytest.mark.parametrize("kind", KINDS)
def test_int8_comes_close_and_is_measured(exported, capsys, kind) -> None:
    exact, quantised = exported("nlvr", kind), exported("nlvr", kind, "--int8")
    assert 0 < read(quantised, DESCRIPTION)["parts"]["model"]["checked"]["int8"]["deviation"] < 0.5
    said, wanted = evaluated(quantised, capsys), evaluated(exact, capsys)
    assert said["precision"] == "int8" and said["gflops"] == wanted["gflops"]
    for sample, row in said["predictions"].items():
        assert row["score"] == pytest.approx(wanted["predictions"][sample]["score"], abs=0.15)


@pytest.mark.parametrize("task", ["nlvr", "retrieval_clip"])
def test_prediction_takes_the_folder_or_a_file_of_it(exported, world, monkeypatch, capsys, task) -> None:
    folder, pictures = exported(task, "onnx"), sorted((world / "images").rglob("*.jpg"))[:2]
    said = []
    for path in (folder, next(folder.glob("*.onnx"))):
        argv = ["--checkpoint", path, *(word for picture in pictures for word in ("--image", picture)), "--text", "a red star"]
        monkeypatch.setattr("sys.argv", ["predict.py", *map(str, argv), "--json"])
        capsys.readouterr()
        predict.main()
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1] and said[0]["gflops"] < said[0]["gflops_uncompressed"]
    monkeypatch.setattr("sys.argv", [*predict_argv(folder, pictures), "--explain", "kept.png"])
    assert "--explain: exported files tell no tokens" in runs.refusal(capsys, predict.main)


def predict_argv(folder: Path, pictures: list[Path]) -> list[str]:
    return list(
        map(str, ["predict.py", "--checkpoint", folder, "--image", pictures[0], "--image", pictures[1], "--text", "a star"])
    )


def test_counts_that_a_checkpoint_holds_are_used(world, tmp_path) -> None:
    random_run("vqa", world, run := tmp_path / "run")
    saved = torch.load(run / "checkpoint_best.pth")
    depths = {name: len(each) for name, each in deployed(run / "checkpoint_best.pth", None, None).counts.items()}
    torch.save({**saved, "counts": {name: [7] * depth for name, depth in depths.items()}}, run / "checkpoint_best.pth")
    model = deployed(run / "checkpoint_best.pth", None, None).model
    assert [block.pruner.fixed for block in model.branches["vision"]] == [7] * depths["vision"]


def test_as_many_samples_check_a_file_as_asked(world, tmp_path, monkeypatch) -> None:
    random_run("nlvr", world, tmp_path / "run")
    argv = ["--checkpoint", str(tmp_path / "run" / "checkpoint_best.pth"), "--out", str(tmp_path / "out"), "--format", "onnx"]
    monkeypatch.setattr("sys.argv", ["export.py", *argv, "--int8", "--check-samples", "3"])
    export.main()
    checked = read(tmp_path / "out", DESCRIPTION)["parts"]["model"]["checked"]
    assert {precision: check["samples"] for precision, check in checked.items()} == {"fp32": 3, "int8": 3}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--format", "onnx", "--packed"), "--packed: is for --format safetensors; leave it out"),
        (("--int8",), "--int8: is for --format onnx or openvino; leave it out"),
        (
            ("--format", "onnx", "--parts", "decoder"),
            "--parts decoder: task 'nlvr' has no such part; choose from model",
        ),
        (("--format", "onnx", "--text-tokens", "999"), "--text-tokens 999: task 'nlvr' reads at most"),
    ],
)
def test_flags_that_do_not_fit_are_refused(world, tmp_path, monkeypatch, capsys, flags, said) -> None:
    random_run("nlvr", world, tmp_path / "run")
    argv = ["--checkpoint", str(tmp_path / "run" / "checkpoint_best.pth"), "--out", str(tmp_path / "out"), *flags]
    monkeypatch.setattr("sys.argv", ["export.py", *argv])
    assert said in runs.refusal(capsys, export.main)
    assert not (tmp_path / "out").exists()
