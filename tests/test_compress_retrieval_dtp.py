"""Both scripts for retrieval from the command line to their files, on a tiny Shapes world."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from configs.load import load_config
from configs.schema import ClipRetrievalConfig, RetrievalConfig
from data.shapes.write import make_shapes
from models.momentum import NO_IMAGE
from models.weights.reading import read_checkpoint
from tests import runs
from tests.runs import FILES, ROOT, assert_same_run, log_of, read

TRAINING_PICTURES = 10
PICTURES, CAPTIONS = 11, 55  # of a split: neither two processes nor batches of 8 share them evenly
SHARED = {
    "sd_num": 8, "sd_dim": 32, "sd_init_std": 0.02, "batch_size_train": 8, "batch_size_test": 8, "calibration_size": 8,
    "queue_size": 20, "num_workers": 0, "amp": "false", "max_epoch": 2, "ramp_epochs": 1, "epoch_steps": 1,
}  # fmt: skip


class Script(NamedTuple):
    """p: what its random weights can reach; own: the sizes of its model."""

    name: str
    config: type[RetrievalConfig]
    p: float
    own: dict


SCRIPTS = {
    "retrieval": Script(
        "compress_retrieval_dtp",
        RetrievalConfig,
        0.53,
        {
            "vit.depth": 2, "vit.embed_dim": 32, "bert.hidden_size": 32, "bert.num_hidden_layers": 2,
            "bert.intermediate_size": 64, "embed_dim": 16, "k_test": 4,
        },
    ),
    "retrieval_clip": Script(
        "compress_retrieval_clip_dtp",
        ClipRetrievalConfig,
        0.3,
        {
            "clip.vision_width": 32, "clip.vision_layers": 2, "clip.text_width": 32, "clip.text_layers": 2, "clip.embed_dim": 16,
        },
    ),
}  # fmt: skip
EACH_TASK = pytest.mark.parametrize("task", SCRIPTS)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    # By this seed no caption comes twice: the order of equal scores is rounding's.
    make_shapes(folder, seed=22, size=TRAINING_PICTURES, tasks=("retrieval",), eval_size=PICTURES, workers=1)
    return folder


def flags(task: str, world: Path, out: Path, *more: str, **settings) -> list[str]:
    """The command line of a tiny run; keys in `settings` go before those of SHARED."""
    files = {"image_root": world / "images", "ann_root": world / "annotations", "tokenizer": world / "annotations" / "vocab.txt"}
    sets = [f"--set={key}={value}" for key, value in {**files, **SHARED, **SCRIPTS[task].own, **settings}.items()]
    config, p = str(ROOT / f"configs/shapes/{task}.yaml"), str(SCRIPTS[task].p)
    return ["--config", config, "--output_dir", str(out), "--device", "cpu", "--pretrained", "", "--p", p, *sets, *more]


def run(task: str, world: Path, out: Path, *more: str, **settings) -> None:
    runs.run_here(SCRIPTS[task].name, flags(task, world, out, *more, **settings))


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """A folder with the folder of each task's run."""
    folder = tmp_path_factory.mktemp("runs")
    for task in SCRIPTS:
        run(task, world, folder / task)
    return folder


@EACH_TASK
def test_a_run_leaves_its_files(trained, task):
    folder = trained / task
    assert FILES <= {path.name for path in folder.iterdir()} and not list(folder.glob("*.tmp"))
    config = load_config(SCRIPTS[task].config, folder / "config.yaml")
    assert config.output_dir == folder and config.train_files == ["flickr30k_train"] and config.max_text_tokens == 35
    names = {"contrastive", "similarity", "similarity_momentum", "total"} | ({"matching"} if task == "retrieval" else set())
    assert [set(entry["loss"]) for entry in log_of(folder)] == [names] * 2
    weighted = {name: value * (0.1 if "similarity" in name else 1) for name, value in log_of(folder)[1]["loss"].items()}
    assert weighted.pop("total") == pytest.approx(sum(weighted.values()), rel=1e-4)


@EACH_TASK
def test_the_result_has_every_key_of_the_contract(trained, task):
    result, p = read(trained / task, "result.json"), SCRIPTS[task].p
    assert {key: result[key] for key in ("task", "method", "variant", "keep", "reduce_ratio", "seed")} == {
        "task": task, "method": "dtp", "variant": "paper", "keep": "instance", "reduce_ratio": p, "seed": 42,
    }  # fmt: skip
    assert result["temperature"] > 0 and result["prune_from"] in (0, 1) and result["epoch"] in (0, 1)
    gflops = result["gflops"]
    parts = {"uncompressed", "target", "measured", "tokens", "weights", "val", "test", "reference", "deployment"}
    assert set(gflops) == parts
    assert gflops["target"] == pytest.approx((1 - p) * gflops["uncompressed"])
    assert gflops["measured"] == pytest.approx(gflops["target"], rel=0.01)
    assert 0 < gflops["deployment"] < gflops["measured"] / 2 and gflops["uncompressed"] < gflops["reference"]
    assert 0 < result["params"]["nonzero"] <= result["params"]["total"]
    sides = [f"{side}_r{cut}" for side in ("txt", "img") for cut in ("1", "5", "10", "_mean")]
    assert all(list(result["metrics"][split]) == [*sides[:4], *sides[4:], "r_mean"] for split in ("val", "test"))


@EACH_TASK
@pytest.mark.parametrize("split", ["val", "test"])
def test_recalls_are_those_of_the_predictions(trained, world, task, split):
    entries, found = read(world / "annotations", f"flickr30k_{split}.json"), read(trained / task, f"predictions_{split}.json")
    metrics = read(trained / task, "result.json")["metrics"][split]
    names = [entry["image"] for entry in entries]
    owner = [name for entry in entries for name in [entry["image"]] * len(entry["caption"])]
    assert list(found["captions"]) == names and list(found["pictures"]) == [str(i) for i in range(CAPTIONS)]
    number = 4 if task == "retrieval" else 10
    assert {len(row) for row in found["captions"].values()} == {len(row) for row in found["pictures"].values()} == {number}
    for cut in (1, 5, 10):
        right = [any(owner[text] == name for text in found["captions"][name][:cut]) for name in names]
        assert metrics[f"txt_r{cut}"] == pytest.approx(100 * sum(right) / PICTURES)
        right = [owner[int(text)] in row[:cut] for text, row in found["pictures"].items()]
        assert metrics[f"img_r{cut}"] == pytest.approx(100 * sum(right) / CAPTIONS)


@EACH_TASK
def test_a_resumed_run_gives_the_same_result_as_one_that_was_not_interrupted(trained, world, tmp_path, task):
    runs.interrupt_in_the_second_epoch(lambda: run(task, world, tmp_path))
    assert [entry["epoch"] for entry in log_of(tmp_path)] == [0] and not (tmp_path / "result.json").exists()
    run(task, world, tmp_path, "--resume")
    assert_same_run(trained / task, tmp_path)


@EACH_TASK
def test_momentum_encoders_and_queue_go_on_from_the_step_that_a_run_was_cut_at(world, tmp_path, task):
    settings = {"epoch_steps": 3, "save_steps": 1, "max_epoch": 1}
    run(task, world, tmp_path / "whole", **settings)
    runs.cut_at(2, lambda: run(task, world, tmp_path / "cut", **settings))
    run(task, world, tmp_path / "cut", "--resume", **settings)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    runs.assert_same_weights(tmp_path / "cut", tmp_path / "whole")


@pytest.fixture(scope="module")
def two_processes(trained, world, tmp_path_factory) -> Path:
    """The folder of runs in two processes: of each task an evaluation, and one step of training with half the batch."""
    folder = tmp_path_factory.mktemp("two")
    command_lines = []
    for task, script in SCRIPTS.items():
        evaluated = flags(task, world, folder / "evaluated" / task, *evaluation(trained, task))
        recompute = {"vit_grad_ckpt": "true", "vit_ckpt_layer": 1}  # as in the published configs
        step = flags(task, world, folder / "step" / task, max_epoch=1, batch_size_train=4, **recompute)
        command_lines += [[script.name, *evaluated], [script.name, *step]]
    runs.run_in_two_processes(folder, command_lines)
    return folder


def evaluation(trained: Path, task: str) -> tuple[str, ...]:
    return "--evaluate", "--pretrained", str(trained / task / "checkpoint_best.pth")


@EACH_TASK
def test_the_best_checkpoint_gives_the_result_again_in_one_process_and_in_two(trained, two_processes, world, tmp_path, task):
    run(task, world, tmp_path, *evaluation(trained, task))
    expected = read(trained / task, "result.json")
    assert read(tmp_path, "result.json") == expected
    shared = read(two_processes / "evaluated" / task, "result.json")
    gflops, gflops_shared = expected.pop("gflops"), shared.pop("gflops")
    assert shared == expected and gflops_shared == pytest.approx(gflops)


@EACH_TASK
def test_two_processes_with_half_the_batch_take_the_step_of_one(trained, two_processes, task):
    """Compares losses of single pairs; the number of pairs that they are contrasted with depends on the batch."""
    alone, shared = (log_of(folder / task)[0]["loss"] for folder in (trained, two_processes / "step"))
    for name in ("similarity", "similarity_momentum"):
        assert shared[name] == pytest.approx(alone[name], rel=1e-4)


@EACH_TASK
def test_in_mixed_precision_a_run_ends_and_its_checkpoint_gives_its_result(world, tmp_path, task):
    run(task, world, tmp_path / "run", amp="true", max_epoch=1)
    best = str(tmp_path / "run" / "checkpoint_best.pth")
    run(task, world, tmp_path / "again", "--evaluate", "--pretrained", best, amp="true")
    assert read(tmp_path / "run", "result.json") == read(tmp_path / "again", "result.json")


@EACH_TASK
def test_tokens_and_weights_go_together_and_the_teacher_is_heard(task, world, tmp_path, caplog):
    caplog.set_level("INFO")
    run(task, world, tmp_path / "dense", "--p", "0", max_epoch=1)
    best, p = str(tmp_path / "dense" / "checkpoint_best.pth"), {"retrieval": 0.64, "retrieval_clip": 0.45}[task]
    both = ("--enable-sparse-api", "--token_reduce", "--pretrained", best, "--p", str(p))
    run(task, world, tmp_path / "both", *both, distill="true", max_epoch=1)
    runs.assert_tokens_weights_and_teacher(tmp_path / "both")
    assert "not fitted" not in caplog.text  # every layer was given something


def test_with_masked_momentum_encoders_a_resumed_run_is_the_same_to_the_bit(world, tmp_path):
    masks = ("--enable-sparse-api", "--token_reduce", "--p", "0.45")
    settings = {"max_epoch": 2, "ramp_epochs": 1, "mask_schedule": "refresh"}
    run("retrieval_clip", world, tmp_path / "whole", *masks, **settings)
    runs.interrupt_in_the_second_epoch(lambda: run("retrieval_clip", world, tmp_path / "parted", *masks, **settings))
    run("retrieval_clip", world, tmp_path / "parted", *masks, "--resume", **settings)
    runs.assert_same_run(tmp_path / "whole", tmp_path / "parted")
    ours, theirs = (read_checkpoint(tmp_path / name / "checkpoint_last.pth")["model"] for name in ("parted", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def refusal(capsys, task: str, world: Path, out: Path, *more: str, **settings) -> str:
    return runs.refusal(capsys, lambda: run(task, world, out, *more, **settings))


@EACH_TASK
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ann_root": "/nowhere"}, "/nowhere/flickr30k_train.json: No such file or directory; set the key 'ann_root'"),
        ({"dataset": "coco"}, "coco_karpathy_train.json: No such file or directory; set the key 'ann_root'"),
        ({"image_root": "/nowhere"}, "train_0000000.jpg: no such picture; set the key 'image_root'"),
        ({"tokenizer": "/nowhere"}, "/nowhere: No such file or directory; set the key 'tokenizer'"),
        ({"queu_size": 9}, "unknown key 'queu_size'; did you mean 'queue_size'?"),
    ],
)
def test_settings_that_cannot_be_are_named(world, tmp_path, capsys, task, settings, said):
    assert said in refusal(capsys, task, world, tmp_path, **settings)


@EACH_TASK
def test_a_p_out_of_reach_names_the_range(world, tmp_path, capsys, task):
    said = refusal(capsys, task, world, tmp_path, "--p", "0.99")
    low, high = (float(part) for part in said.split("pruning removes ")[1].split(" of the")[0].split(" to "))
    assert 0 <= low < SCRIPTS[task].p < high < 0.99


def test_damaged_data_are_named(world, tmp_path, capsys):
    broken = tmp_path / "world"
    shutil.copytree(world, broken)
    annotations = broken / "annotations" / "flickr30k_val.json"
    whole = annotations.read_text()
    annotations.write_text(whole[: len(whole) // 2])
    assert "flickr30k_val.json: not valid JSON at line" in refusal(capsys, "retrieval_clip", broken, tmp_path / "out")
    annotations.write_text(whole)
    picture = broken / "images" / json.loads(whole)[7]["image"]
    picture.write_bytes(picture.read_bytes()[:100])
    assert f"{picture}: not a readable picture" in refusal(capsys, "retrieval_clip", broken, tmp_path / "out")


def test_weights_without_heads_are_not_evaluated(trained, world, tmp_path, capsys):
    saved = read_checkpoint(trained / "retrieval" / "checkpoint_best.pth")
    saved["model"] = {name: weight for name, weight in saved["model"].items() if "proj" not in name.split(".")[0]}
    torch.save(saved, tmp_path / "headless.pth")
    said = refusal(capsys, "retrieval", world, tmp_path, "--evaluate", "--pretrained", str(tmp_path / "headless.pth"))
    assert "headless.pth: lacks vision_proj.weight, vision_proj.bias, text_proj.weight and 1 more, so its answers" in said


@EACH_TASK
def test_weights_of_another_model_are_named(trained, world, tmp_path, capsys, task):
    best, settings = str(trained / task / "checkpoint_best.pth"), {"vit.embed_dim": 48, "clip.vision_width": 48}
    key = "vit.embed_dim" if task == "retrieval" else "clip.vision_width"
    assert f"{best}: shapes do not fit: " in refusal(capsys, task, world, tmp_path, "--pretrained", best, **{key: settings[key]})


def test_tome_merges_patches_alone_in_both_scripts(world, tmp_path):
    for task in SCRIPTS:
        out = tmp_path / task
        run(task, world, out, "--epoch", "1", "--p", "0.2", method="tome", ramp_epochs=0)
        result = read(out, "result.json")
        assert result["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.01)
        names = read_checkpoint(out / "checkpoint_best.pth")["model"]
        assert not any("pruner" in name or "space_dict" in name for name in names)


@pytest.mark.parametrize(
    ("key", "entries", "most", "kept"),
    [
        ("auto", {}, TRAINING_PICTURES - 1, True),
        ("auto", {}, TRAINING_PICTURES, False),  # of more images than these
        ("auto", {"variant": "paper"}, TRAINING_PICTURES - 1, False),  # a run of this project, on whatever data
        ("keep", {"variant": "paper"}, TRAINING_PICTURES - 1, True),
        ("drop", {}, TRAINING_PICTURES - 1, False),
    ],
)
def test_the_image_ids_of_a_published_queue_are_kept_if_they_number_the_training_images(
    world, trained, tmp_path, key, entries, most, kept
):
    weights = read_checkpoint(trained / "retrieval" / "checkpoint_best.pth")["model"]
    dense = {name: tensor for name, tensor in weights.items() if "pruner" not in name and name != "space_dict"}
    dense |= {"idx_queue": torch.full((1, 20), most), "ptr_queue": torch.zeros(1, dtype=torch.long)}
    torch.save({"model": dense, **entries}, tmp_path / "published.pth")
    more = ("--pretrained", str(tmp_path / "published.pth"), "--p", "0", "--epoch", "1", "--set", f"queue_ids={key}")
    runs.run_here("compress_retrieval_dtp", flags("retrieval", world, tmp_path / "out", *more))
    ids = read_checkpoint(tmp_path / "out" / "checkpoint_last.pth")["model"]["idx_queue"][0]
    assert ids[:8].max() < TRAINING_PICTURES  # one step's batch
    assert ids[8:].tolist() == [most if kept else NO_IMAGE] * 12


@EACH_TASK
def test_fixed_numbers_of_tokens_are_refused_in_one_line(task, world, tmp_path, capsys):
    assert "keep: fixed is not there for retrieval yet" in refusal(capsys, task, world, tmp_path, "--evaluate", keep="fixed")
