"""Sparse weights and distillation through the entry script, on a tiny Shapes world: what is left, resumed, evaluated, refused."""

from functools import partial
from pathlib import Path

import pytest
import torch

from data.shapes.write import make_shapes
from madtp.sparsity.masks import Pattern, magnitude_mask
from models.weights.reading import read_checkpoint
from tests import runs
from tests.runs import assert_same_run, log_of, read
from tests.test_compress_nlvr_dtp import flags as dense_flags

P = 0.6  # weights alone remove 0.28
BOTH = ("--enable-sparse-api", "--token_reduce", "--p", str(P))
WEIGHTS = {"distill_vision": 3, "distill_language": 5, "distill_logits": 7}
LEARNING = {"distill": "true", **WEIGHTS, "mask_schedule": "refresh", "max_epoch": 3, "ramp_epochs": 1}

run_here = partial(runs.run_here, "compress_nlvr_dtp")


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=3, size=40, tasks=("nlvr",), eval_size=17, workers=1)
    return folder


@pytest.fixture(scope="module")
def dense(world, tmp_path_factory) -> Path:
    """A checkpoint of an uncompressed model."""
    out = tmp_path_factory.mktemp("dense")
    run_here(dense_flags(world, out, "--p", "0", "--epoch", "1"))
    return out / "checkpoint_best.pth"


@pytest.fixture(scope="module")
def flags(world, dense):
    return lambda out, *more, **settings: dense_flags(world, out, *BOTH, "--pretrained", str(dense), *more, **settings)


@pytest.fixture(scope="module")
def trained(flags, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sparse") / "both"
    run_here(flags(out, **LEARNING))
    return out


def sparse_names(weights: dict) -> list[str]:
    return [
        name for name in weights if (".blocks." in name or ".layer." in name) and weights[name].dim() == 2 and "pruner" not in name
    ]


def test_two_of_four_weights_are_left_and_the_result_says_so(trained):
    result, weights = read(trained, "result.json"), read_checkpoint(trained / "checkpoint_best.pth")["model"]
    assert result["sparsity_type"] == "2:4"
    names = sparse_names(weights)
    for name in names:
        assert (weights[name].unflatten(1, (-1, 4)).count_nonzero(dim=-1) == 2).all(), name
    params = result["params"]
    assert params["sparse_total"] == sum(weights[name].numel() for name in names) == 2 * params["sparse_nonzero"]
    assert params["nonzero"] <= params["total"] - params["sparse_nonzero"]
    gflops = result["gflops"]
    assert gflops["measured"] == pytest.approx(gflops["target"], rel=0.01)
    assert gflops["measured"] < min(gflops["tokens"], gflops["weights"]) < gflops["uncompressed"]


def test_every_sparse_layer_is_fitted(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    run_here(flags(tmp_path, "--evaluate"))
    assert "not fitted" not in caplog.text


def test_the_teacher_is_heard_in_every_epoch_as_loudly_as_the_config_says(trained):
    weights = {"task": 1, "similarity": 0.1, **WEIGHTS}
    for entry in log_of(trained):
        assert {*weights, "total"} == set(entry["loss"])
        assert entry["loss"]["total"] == pytest.approx(sum(weight * entry["loss"][name] for name, weight in weights.items()))


def test_a_resumed_run_is_the_same_to_the_bit(trained, flags, tmp_path):
    runs.interrupt_in_the_second_epoch(lambda: run_here(flags(tmp_path, **LEARNING)))
    run_here(flags(tmp_path, "--resume", **LEARNING))
    assert_same_run(trained, tmp_path)
    ours, theirs = (read_checkpoint(folder / "checkpoint_last.pth")["model"] for folder in (tmp_path, trained))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("order", ["weights_first", "tokens_first", "adaptive"])
def test_a_resumed_run_of_another_order_is_the_same_to_the_bit(order, flags, tmp_path):
    """Interrupted before tokens_first masks; in the middle of adaptive's ramp."""
    settings = {"order": order, "max_epoch": 3, "ramp_epochs": 2 if order == "adaptive" else 1}
    run_here(flags(tmp_path / "whole", **settings))
    runs.interrupt_in_the_second_epoch(lambda: run_here(flags(tmp_path / "parted", **settings)))
    run_here(flags(tmp_path / "parted", "--resume", **settings))
    assert_same_run(tmp_path / "whole", tmp_path / "parted")
    assert read_checkpoint(tmp_path / "parted" / "checkpoint_best.pth")["masked"]


def test_evaluating_the_checkpoint_gives_its_result_and_on_a_cpu_by_dense_kernels(trained, flags, tmp_path, caplog):
    caplog.set_level("INFO")
    run_here(flags(tmp_path, "--evaluate", "--pretrained", str(trained / "checkpoint_best.pth"), sparse_kernels="true"))
    ours, theirs = read(tmp_path, "result.json"), read(trained, "result.json")
    for key in ("metrics", "temperature", "params", "sparse_kernels"):
        assert ours[key] == theirs[key]
    masked = read_checkpoint(trained / "checkpoint_best.pth")["masked"]
    assert (
        ours["sparse_kernels"] == {"used": 0, "of": len(masked)}
        and caplog.text.count("dense ones run everywhere: this is no GPU") == 1
    )
    assert ours["gflops"]["test"] == theirs["gflops"]["test"]


def test_a_layer_that_stays_dense_is_named(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    run_here(flags(tmp_path, "--evaluate", "--weight-sparse-pattern", "m24n12_1d", "--p", "0.45"))
    assert "visual_encoder.blocks.0.attn.qkv.weight stays dense: its input is no multiple of 24" in caplog.text
    assert read(tmp_path, "result.json")["params"]["sparse_total"] == 0


def test_sparse_weights_are_not_evaluated_as_others(world, trained, flags, tmp_path, capsys):
    best = ("--evaluate", "--pretrained", str(trained / "checkpoint_best.pth"))
    for arguments in (flags(tmp_path, *best, "--weight-sparse-pattern", "m4n1_1d"), dense_flags(world, tmp_path, *best)):
        assert "was saved with sparsity_type 2:4" in runs.refusal(capsys, lambda arguments=arguments: run_here(arguments))


def test_dense_weights_are_masked_at_once_for_an_evaluation(flags, dense, tmp_path):
    run_here(flags(tmp_path, "--evaluate"))
    params = read(tmp_path, "result.json")["params"]
    assert params["sparse_total"] == 2 * params["sparse_nonzero"] > 0
    weights = read_checkpoint(dense)["model"]
    assert params["sparse_total"] == sum(weights[name].numel() for name in sparse_names(weights))


def test_two_processes_mask_and_learn_as_one(flags, tmp_path):
    """Weights are fitted anew to the calibration slice of both; rounding may prune a token more or less: hence the tolerance."""
    learning = {**LEARNING, "mask_schedule": "once", "max_epoch": 2, "lr_schedule": "step"}
    runs.run_in_two_processes(tmp_path, [["compress_nlvr_dtp", *flags(tmp_path / "two", batch_size_train=4, **learning)]])
    run_here(flags(tmp_path / "one", **learning))
    assert log_of(tmp_path / "two")[0]["loss"] == pytest.approx(log_of(tmp_path / "one")[0]["loss"], rel=1e-2)
    one, two = (read_checkpoint(tmp_path / name / "checkpoint_last.pth")["model"] for name in ("one", "two"))
    for name in sparse_names(one):
        assert torch.equal(one[name] != 0, two[name] != 0), name


@pytest.mark.parametrize(("pattern", "kept", "group"), [("m4n1_1d", 1, 4), ("4:8", 4, 8)])
def test_masks_of_other_patterns_hold_in_mixed_precision_with_activations_computed_again(pattern, kept, group, flags, tmp_path):
    settings = {**LEARNING, "max_epoch": 2, "mask_schedule": "once", "amp": "true", "vit_grad_ckpt": "true", "vit_ckpt_layer": 2}
    run_here(flags(tmp_path, "--weight-sparse-pattern", pattern, **settings))
    weights = read_checkpoint(tmp_path / "checkpoint_best.pth")["model"]
    for name in sparse_names(weights):
        assert (weights[name].unflatten(1, (-1, group)).count_nonzero(dim=-1) == kept).all(), name


@pytest.mark.parametrize("order", ["weights_first", "tokens_first", "adaptive"])
def test_every_order_ends_within_the_budget(flags, order, tmp_path):
    run_here(flags(tmp_path, order=order, max_epoch=4, ramp_epochs=1))
    result, weights = read(tmp_path, "result.json"), read_checkpoint(tmp_path / "checkpoint_best.pth")
    assert result["gflops"]["measured"] <= 1.01 * result["gflops"]["target"]
    masked = set(weights["masked"])
    for name in masked:
        assert torch.equal(weights["model"][name] != 0, magnitude_mask(weights["model"][name], Pattern(2, 4))), name
    assert masked == set(sparse_names(weights["model"])) or order == "adaptive" and masked


def test_weights_alone_that_meet_p_leave_the_tokens_alone(flags, tmp_path, caplog):
    caplog.set_level("INFO")
    run_here(flags(tmp_path, "--p", "0.2", "--epoch", "1"))
    result = read(tmp_path, "result.json")
    assert result["method"] == "none" and result["temperature"] is None and "token pruning is off" in caplog.text
    assert result["gflops"]["measured"] == result["gflops"]["weights"] <= result["gflops"]["target"]


def test_sparse_weights_without_pruned_tokens_are_not_evaluated_as_dense(world, dense, tmp_path, capsys):
    run_here(dense_flags(world, tmp_path, "--pretrained", str(dense), "--enable-sparse-api", "--p", "0.2", "--epoch", "1"))
    again = ("--evaluate", "--pretrained", str(tmp_path / "checkpoint_best.pth"), "--p", "0")
    said = runs.refusal(capsys, lambda: run_here(dense_flags(world, tmp_path / "dense", *again)))
    assert "was saved with sparsity_type 2:4, and the config has '' at p 0" in said


@pytest.mark.parametrize("evaluate", [(), ("--evaluate",)])
def test_what_weights_alone_cannot_reach_is_refused(world, dense, evaluate, tmp_path, capsys):
    arguments = dense_flags(world, tmp_path, "--pretrained", str(dense), "--enable-sparse-api", "--p", "0.9", *evaluate)
    assert "the weights alone remove" in runs.refusal(capsys, lambda: run_here(arguments))


@pytest.mark.parametrize(
    "changed", [{"sparse_layers": "mlp"}, {"order": "adaptive", "mask_schedule": "once"}, {"mask_schedule": "once"}]
)
def test_a_run_goes_on_under_its_own_plan_alone_and_a_refusal_leaves_its_config(trained, flags, changed, capsys):
    before = (trained / "config.yaml").read_text()
    arguments = flags(trained, "--resume", **{**LEARNING, **changed})
    assert f"a run with {next(iter(changed))} " in runs.refusal(capsys, lambda: run_here(arguments))
    assert (trained / "config.yaml").read_text() == before


def test_sparse_weights_that_were_trained_on_without_their_masks_are_refused(trained, flags, tmp_path, capsys):
    saved = read_checkpoint(trained / "checkpoint_best.pth")
    saved["model"][saved["masked"][0]] += 1
    torch.save(saved, tmp_path / "x.pth")
    said = runs.refusal(capsys, lambda: run_here(flags(tmp_path / "out", "--evaluate", "--pretrained", str(tmp_path / "x.pth"))))
    assert f"{saved['masked'][0]} is masked, but has 4 of 4 weights that are not zero" in said


def test_a_p_out_of_reach_names_the_range_beside_the_uncompressed_model(flags, tmp_path, capsys):
    """Weights alone remove 0.28, so pruning tokens beside them starts above that."""
    said = runs.refusal(capsys, lambda: run_here(flags(tmp_path, "--p", "0.97", ramp_epochs=1)))
    low, high = (float(part) for part in said.split("pruning removes ")[1].split(" of the")[0].split(" to "))
    assert 0.28 < low < high < 0.97


def test_a_teacher_without_its_head_is_refused(world, dense, tmp_path, capsys):
    """It would teach what chance gave it."""
    weights = {name: weight for name, weight in read_checkpoint(dense)["model"].items() if not name.startswith("cls_head.")}
    torch.save({"model": weights}, tmp_path / "headless.pth")
    teacher = str(tmp_path / "headless.pth")
    said = runs.refusal(capsys, lambda: run_here(dense_flags(world, tmp_path / "out", distill="true", teacher=teacher)))
    assert "headless.pth: lacks cls_head." in said


@pytest.mark.parametrize("only", ["masked", "pruned"])
def test_a_compressed_teacher_is_refused(only, trained, flags, tmp_path, capsys):
    saved = read_checkpoint(trained / "checkpoint_best.pth")
    if only == "masked":
        del saved["model"]["space_dict"]
    torch.save({**saved, "masked": saved["masked"] if only == "masked" else None}, tmp_path / "x.pth")
    said = runs.refusal(capsys, lambda: run_here(flags(tmp_path / "out", distill="true", teacher=str(tmp_path / "x.pth"))))
    assert "x.pth: is compressed, and a teacher must not be" in said


def test_distilling_from_nothing_is_refused(world, tmp_path, capsys):
    said = runs.refusal(capsys, lambda: run_here(dense_flags(world, tmp_path, distill="true")))
    assert "set the key 'teacher' or 'pretrained'" in said
