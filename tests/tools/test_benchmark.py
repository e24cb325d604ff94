"""The benchmark on a tiny model: what it writes, and that the imposed cost is the cost asked for. No figure of time is tested."""

import argparse
import csv
import json
import re
import sys

import pytest
import torch

from configs.load import load_config
from configs.schema import RetrievalConfig, VqaConfig
from madtp.sparsity.kernels import Milliseconds
from tasks.registry import TASKS
from tests.tiny import with_lively_weights
from tools import benchmark
from tools.benchmarks import sparse_shapes
from tools.benchmarks.rankings import RANKINGS
from utils import UserError

CONFIG = """
image_size: 64
vit: {patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2}
bert: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, max_position_embeddings: 40}
sd_num: 4
sd_dim: 32
"""
CLIP = """
image_size: 64
clip: {patch_size: 8, vision_width: 32, vision_layers: 3, vision_heads: 2, text_width: 16, text_layers: 1, text_heads: 2,
  context_length: 16, embed_dim: 8}
max_text_tokens: 16
queue_size: 4
sd_num: 4
sd_dim: 32
"""
RANKING = CONFIG.replace("layers: 2", "layers: 3") + "k_test: 6\n"
FILES = {"retrieval_clip": CLIP, "rerank": RANKING + "queue_size: 4\nembed_dim: 8\n", "rank_answers": RANKING}
KEYS = {"method", "p", "batch_size", "device", "throughput", "speedup", "latency_ms", "peak_memory_mib", "gflops", "keep"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    def run(*arguments: str) -> list[dict]:
        task = arguments[1 + arguments.index("--task")] if "--task" in arguments else ""
        (tmp_path / "tiny.yaml").write_text(FILES.get(task, CONFIG))
        argv = ["--config", str(tmp_path / "tiny.yaml"), "--rounds", "2", "--batch-sizes", "1,3", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv, "--json", str(tmp_path / "rows.json"), *arguments])
        benchmark.main()
        return json.loads((tmp_path / "rows.json").read_text())["rows"]

    return run


@pytest.mark.parametrize("task", ["nlvr", "vit", "retrieval_clip"])
def test_a_row_for_every_method_and_batch_size_at_the_cost_asked_for(run, task, tmp_path):
    rows = run("--task", task, "--p", "0.2,0.4", "--out", str(tmp_path / "plots"))
    assert [(row["method"], row["batch_size"]) for row in rows] == [
        (method, size) for size in (1, 3) for method in ("dense", "madtp", "madtp")
    ]
    assert all(row.keys() >= KEYS for row in rows)
    for dense, *pruned in (rows[:3], rows[3:]):
        assert dense["speedup"] == 1 and len(set(dense["keep"])) == 1
        for row, p in zip(pruned, (0.2, 0.4), strict=True):
            assert row["p"] == pytest.approx(1 - row["gflops"] / dense["gflops"], abs=1e-3)
            assert row["p"] == pytest.approx(p, abs=0.04)  # whole tokens of 64
            assert row["keep"] == sorted(row["keep"], reverse=True) and row["keep"][-1] < dense["keep"][-1]
    (table,) = (tmp_path / "plots").glob("*.csv")
    lines = table.read_text().splitlines()
    assert lines[0].startswith("# python") and len(list(csv.DictReader(lines[2:]))) == len(rows)
    assert list((tmp_path / "plots").glob("*.png"))


def test_a_keep_schedule_is_imposed_block_by_block(run):
    rows = run("--task", "vit", "--keep-schedule", "1,0.5,0.25")
    assert rows[1]["keep"] == [
        65,
        34,
        10,
    ]  # 1 + 64; then half of 64, a quarter of 33, and a merged one


@pytest.mark.parametrize("task", ["nlvr", "caption", "vqa", "vit", "retrieval_clip"])
def test_training_is_timed_with_the_cost_of_inference(run, task):
    rows = run("--task", task, "--p", "0.3", "--train")
    assert [(row["method"], row["batch_size"]) for row in rows] == [("dense", 1), ("madtp", 1), ("dense", 3), ("madtp", 3)]
    assert [row["gflops"] for row in rows] == [row["gflops"] for row in run("--task", task, "--p", "0.3")]


def test_a_text_model_for_shorter_texts_is_refused(run, monkeypatch):
    monkeypatch.setitem(FILES, "vqa", CONFIG.replace("max_position_embeddings: 40", "max_position_embeddings: 12"))
    with pytest.raises(UserError, match="max_position_embeddings is 12; questions are timed with 14 tokens"):
        run("--task", "vqa", "--p", "0.3", "--train")


def test_other_libraries_are_timed_beside(run):
    rows = run("--task", "vit", "--p", "0.3", "--against", "timm,transformers")
    assert [row["method"] for row in rows[:4]] == ["dense", "timm", "transformers", "madtp"]

    rows = run("--task", "retrieval_clip", "--p", "0.3", "--against", "dense,transformers")
    assert [row["method"] for row in rows[:3]] == ["dense", "transformers", "madtp"]


def test_siglips_image_encoder_is_timed_as_well(run, monkeypatch):
    siglip = CLIP.replace("clip: {", "clip: {family: siglip, vision_hidden: 100, ").replace("embed_dim: 8", "embed_dim: 32")
    monkeypatch.setitem(FILES, "retrieval_clip", siglip)
    rows = run("--task", "retrieval_clip", "--p", "0.3", "--against", "dense,transformers", "--batch-sizes", "1")
    assert [row["method"] for row in rows] == ["dense", "transformers", "madtp"] and rows[0]["keep"] == [64] * 3
    assert rows[2]["p"] == pytest.approx(0.3, abs=0.04)


@pytest.mark.parametrize("task", ["nlvr", "vit", "block", "retrieval_clip"])
def test_a_metered_pass_is_timed_beside_each_pruned_one(run, task):
    _, first, metered, second, also_metered = run("--task", task, "--p", "0.2,0.3", "--metered", "--batch-sizes", "2")
    assert [first["method"], metered["method"]] == [second["method"], also_metered["method"]] == ["madtp", "metered"]
    assert first["gflops"] == metered["gflops"] > second["gflops"] == also_metered["gflops"]


@pytest.mark.parametrize("task", ["nlvr", "vit"])
def test_sparse_weights_are_timed_with_all_tokens_and_with_fewer_at_the_cost_asked_for(run, task):
    rows = run("--task", task, "--p", "0.2,0.6", "--sparse", "--batch-sizes", "2", "--rounds", "1")
    assert [row["method"] for row in rows] == ["dense", "madtp", "madtp", "2:4", "madtp+2:4"]  # 0.2 takes no token beside 2:4
    dense, _, pruned, sparse, both = rows
    assert sparse["keep"] == dense["keep"] and both["keep"][-1] > pruned["keep"][-1]
    assert dense["gflops"] / 2 < sparse["gflops"] < 0.75 * dense["gflops"]
    assert both["p"] == pytest.approx(1 - both["gflops"] / dense["gflops"], abs=1e-3) == pytest.approx(0.6, abs=0.04)
    assert "2:4: dense kernels multiply zeros" in sparse["note"] and "madtp+2:4: dense kernels" in both["note"]


@torch.no_grad()
def test_shapes_are_those_of_all_2_4_products_in_16_bits(tmp_path):
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    given = {
        "task": "vit", "config": tmp_path / "tiny.yaml", "p": (0.6,), "batch_sizes": (2,), "amp": True, "train": False,
        "pretrained": None, "keep_schedule": None, "temperature": None, "candidates": None, "prune_every": 1,
    }  # fmt: skip
    products = sparse_shapes.products_in(argparse.Namespace(**given), torch.device("cpu"))
    tokens = 2 * (1 + 64)
    weights = {(96, 32), (32, 32), (128, 32), (32, 128)}  # qkv, proj, fc1, fc2
    assert {(tokens, *weight) for weight in weights} <= {product[:3] for product in products}
    assert {product[1:3] for product in products} == weights and {product.rows for product in products} > {tokens}
    rows = sparse_shapes.timed(products, lambda product: Milliseconds(3.0, 2.0))
    assert (rows[0].dtype, rows[0].dense_ms, rows[0].sparse_ms) == ("bfloat16", 3.0, 2.0)
    assert len(sparse_shapes.shapes_table(rows).splitlines()) == 1 + len(rows)


@pytest.mark.parametrize(
    ("task", "methods", "said"),
    [("rerank", ["separate", "padded", "shared"], "captions"), ("rank_answers", ["one by one", "batched"], "answers")],
)
def test_ways_of_ranking_are_timed_with_the_lengths_of_the_texts(run, task, methods, said, tmp_path):
    rows = run("--task", task, "--candidates", "4", "--rounds", "1", "--out", str(tmp_path / "tables"))
    assert [(row["method"], row["batch_size"]) for row in rows] == [(method, size) for size in (1, 3) for method in methods]
    assert rows[0]["speedup"] == 1 and rows[0]["gflops"] >= rows[-1]["gflops"] > 0
    least, median, most = map(int, re.search(rf"{said} of (\d+)/(\d+)/(\d+) tokens", rows[0]["note"]).groups())
    assert 3 <= least <= median < most
    each = 4 if task == "rerank" else 1
    assert rows[-1]["throughput"] == pytest.approx(3 * each * 1000 / rows[-1]["latency_ms"], rel=1e-6)
    (table,) = (tmp_path / "tables").iterdir()
    assert table.suffix == ".csv"


@pytest.mark.parametrize(("task", "config"), [("rerank", RetrievalConfig), ("rank_answers", VqaConfig)])
@torch.no_grad()
def test_ways_of_ranking_give_equal_scores(task, config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(FILES[task])
    config = load_config(config, tmp_path / "tiny.yaml", {"p": 0.0})
    torch.manual_seed(0)
    model = with_lively_weights(TASKS[config.task].reference_case(config)[0]).eval()
    ranking = RANKINGS[task]
    inputs = ranking.inputs(config, 3)
    found = [method.prepare(inputs)() for method in ranking.methods(config, model, ranking.inputs(config, 1))]
    if task == "rerank":
        (candidates, *_), scores = zip(*((way.candidates, way.scores) for way in found), strict=True)
        assert candidates.shape == (3, 6) and scores[0].std() > 0.01
    else:
        scores = [torch.cat([torch.stack([best.double(), gflops]) for best, gflops in way], dim=1) for way in found]
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("task", benchmark.TASKS)
def test_every_task_has_a_config_of_its_own(task, monkeypatch):
    seen = []
    monkeypatch.setattr(benchmark, "benchmark", lambda args: seen.append(args.config) or [])
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--task", task])
    benchmark.main()
    load_config(benchmark.TASKS[task].config, *seen)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "jax"], "jax"),
        (["--against", "timm"], "--task vit"),
        (["--task", "vit", "--keep-schedule", "1"], "3 blocks"),
        (["--train", "--task", "block"], "--train"),
        (["--train", "--metered"], "--metered"),
        (["--task", "rerank", "--p", "0.5"], "--p"),
        (["--sparse", "--train"], "--sparse"),
        (["--sparse", "--task", "retrieval_clip"], "nlvr or vit"),
        (["--shapes"], "--amp"),
        (["--shapes", "--amp"], "--device cuda"),
        (["--task", "rank_answers", "--train"], "--train"),
        (["--task", "retrieval_clip", "--against", "timm"], "--task vit"),
        (["--task", "retrieval_clip", "--pretrained", "clip.pth"], "--pretrained"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, arguments, said):
    with pytest.raises(UserError, match=said):
        run(*arguments)


@pytest.mark.parametrize("task", ["nlvr", "vit", "retrieval_clip"])
def test_fixed_numbers_of_tokens_are_timed_in_an_engine_at_the_cost_asked_for(run, task, tmp_path):
    rows = run("--task", task, "--p", "0.2,0.4", "--engine", "torch", "--precision", "bf16", "--out", str(tmp_path / "out"))
    assert [(row["method"], row["batch_size"]) for row in rows] == [(m, n) for n in (1, 3) for m in ("dense", "fixed", "fixed")]
    assert {(row["engine"], row["precision"], row["peak_memory_mib"]) for row in rows} == {("torch", "bf16", None)}
    for row, p in zip(rows[1:3], (0.2, 0.4), strict=True):
        assert row["p"] == pytest.approx(1 - row["gflops"] / rows[0]["gflops"], abs=1e-3) == pytest.approx(p, abs=0.04)
        assert row["keep"] == sorted(row["keep"], reverse=True)
    (table,) = (tmp_path / "out").iterdir()
    header = json.loads(table.read_text().splitlines()[1].removeprefix("# "))
    assert table.name.startswith(f"{task}_cpu_torch2") and table.name.endswith("_bf16.csv")
    assert header["engine"] == "torch" and header["engine_version"] == torch.__version__ and "instruction_sets" in header


@pytest.mark.parametrize(("engine", "precision"), [("onnxruntime", "fp32"), ("openvino", "fp32"), ("openvino", "bf16")])
def test_exported_files_are_timed_and_compared_with_pytorch(run, engine, precision):
    for package in ("onnx", "onnxscript", engine):
        pytest.importorskip(package, reason="needs the extras onnx and openvino")
    flags = ("--keep-schedule", "1,0.5,0.25", "--engine", engine, "--precision", precision, "--batch-sizes", "2")
    rows = run("--task", "nlvr", *flags)
    assert [row["method"] for row in rows] == ["dense", "fixed"]
    assert {(row["engine"], row["precision"]) for row in rows} == {(engine, precision)}
    assert rows[1]["keep"] == [65, 34, 10]  # 1 + 64; then half of 64, a quarter of 33, and a merged one
    assert all(("deviates from PyTorch by" in row["note"]) == (precision == "fp32") for row in rows)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--precision", "bf16"), "--precision: goes with --engine"),
        (("--engine", "torch", "--precision", "int8"), "engine torch runs fp32 or bf16 here"),
        (("--engine", "torch", "--train"), "--train: does not go with --engine"),
        (("--engine", "torch", "--task", "block"), "--engine: is for --task nlvr, vit, retrieval_clip"),
        (("--engine", "torch", "--keep-schedule", "1,0.5"), "--keep-schedule: 2 shares for 3 blocks"),
    ],
)
def test_engines_refuse_what_they_do_not_compare(run, flags, said):
    with pytest.raises(UserError, match=said):
        run("--task", "vit", *flags) if "--task" not in flags else run(*flags)
