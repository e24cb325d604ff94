"""The benchmark on a tiny model: what it writes, and that the imposed cost is the cost asked for. No figure of time is tested."""

import csv
import json
import sys

import pytest

from tools import benchmark
from utils import UserError

CONFIG = """
image_size: 64
vit: {patch_size: 8, embed_dim: 32, depth: 3, num_heads: 2}
bert: {hidden_size: 32, num_hidden_layers: 2, num_attention_heads: 2, intermediate_size: 64, max_position_embeddings: 40}
sd_num: 4
sd_dim: 32
"""
KEYS = {"method", "p", "batch_size", "device", "throughput", "speedup", "latency_ms", "peak_memory_mib", "gflops", "keep"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "tiny.yaml").write_text(CONFIG)

    def run(*arguments: str) -> list[dict]:
        argv = ["--config", str(tmp_path / "tiny.yaml"), "--rounds", "2", "--batch-sizes", "1,3", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *argv, "--json", str(tmp_path / "rows.json"), *arguments])
        benchmark.main()
        return json.loads((tmp_path / "rows.json").read_text())["rows"]

    return run


@pytest.mark.parametrize("task", ["nlvr", "vit"])
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


@pytest.mark.parametrize("task", ["nlvr", "vit"])
def test_training_is_timed_with_the_cost_of_inference(run, task):
    rows = run("--task", task, "--p", "0.3", "--train")
    assert [(row["method"], row["batch_size"]) for row in rows] == [("dense", 1), ("madtp", 1), ("dense", 3), ("madtp", 3)]
    assert [row["gflops"] for row in rows] == [row["gflops"] for row in run("--task", task, "--p", "0.3")]


def test_other_libraries_are_timed_beside(run):
    rows = run("--task", "vit", "--p", "0.3", "--against", "timm,transformers")
    assert [row["method"] for row in rows[:4]] == ["dense", "timm", "transformers", "madtp"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--against", "jax"], "jax"),
        (["--against", "timm"], "--task vit"),
        (["--task", "vit", "--keep-schedule", "1"], "3 blocks"),
        (["--train", "--task", "block"], "--train"),
    ],
)
def test_what_cannot_be_compared_is_refused(run, arguments, said):
    with pytest.raises(UserError, match=said):
        run(*arguments)
