"""The entry script from the command line to its files, on a tiny Shapes world: alone, twice, interrupted, in two processes."""

import gc
import json
import os
import pickle
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch

from configs.load import load_config, parse_command_line
from configs.schema import NlvrConfig
from data.shapes.write import make_shapes
from data.text import load_tokenizer
from tasks.nlvr import nlvr_from_config
from tests import runs
from tests.runs import FILES, ROOT, assert_same_run, log_of, read

EVAL_SIZE = 31  # two processes with batches of 8 do not share it evenly
P = 0.5  # what the random weights of any seed can reach
TINY = {
    "vit.depth": 2, "vit.embed_dim": 32, "bert.hidden_size": 32, "bert.num_hidden_layers": 2, "bert.intermediate_size": 64,
    "sd_num": 8, "sd_dim": 32, "sd_init_std": 0.02, "batch_size_train": 8, "statements_per_pair": 1, "batch_size_test": 8,
    "calibration_size": 16, "num_workers": 0,
    "amp": "false", "max_epoch": 2, "ramp_epochs": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=3, size=40, tasks=("nlvr",), eval_size=EVAL_SIZE, workers=1)
    return folder


def flags(world: Path, out: Path, *more: str, **settings) -> list[str]:
    """The command line of a tiny run; keys in `settings` go before those of TINY."""
    files = {"image_root": world / "images", "ann_root": world / "annotations", "tokenizer": world / "annotations" / "vocab.txt"}
    sets = [f"--set={key}={value}" for key, value in {**files, **TINY, **settings}.items()]
    config = str(ROOT / "configs/shapes/nlvr.yaml")
    return ["--config", config, "--output_dir", str(out), "--device", "cpu", "--pretrained", "", "--p", str(P), *sets, *more]


run_here = partial(runs.run_here, "compress_nlvr_dtp")
run_script = partial(runs.run_script, ROOT / "compress_nlvr_dtp.py")


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory) -> Path:
    """The folder of a run from the command line."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    done = run_script(flags(world, out))
    assert done.returncode == 0, done.stderr
    return out


def test_a_run_leaves_its_files(trained):
    assert FILES <= {path.name for path in trained.iterdir()} and not list(trained.glob("*.tmp"))
    config = load_config(NlvrConfig, trained / "config.yaml")
    assert config.output_dir == trained and config.p == P and config.vit_sizes.depth == 2
    assert [entry["epoch"] for entry in log_of(trained)] == [0, 1]
    learning = [entry["alignment"] for entry in log_of(trained)]
    assert 0 < learning[0]["moved"]["distance"] < learning[1]["moved"]["distance"]
    assert learning[1]["gradient"]["task"] == 0 < learning[1]["gradient"]["similarity"]
    assert 0 <= learning[1]["decisions"]["changed_redrawn"] <= 1 and 0 <= learning[1]["pairs"]["auc"] <= 1


def test_the_result_has_every_key_of_the_contract(trained):
    result = read(trained, "result.json")
    assert {key: result[key] for key in ("task", "method", "variant", "keep", "reduce_ratio", "seed")} == {
        "task": "nlvr", "method": "dtp", "variant": "paper", "keep": "instance", "reduce_ratio": P, "seed": 42,
    }  # fmt: skip
    assert result["temperature"] > 0 and result["prune_from"] in (0, 1) and result["epoch"] in (0, 1)
    assert result["versions"]["torch"] == torch.__version__
    gflops = result["gflops"]
    assert set(gflops) == {
        "uncompressed", "target", "measured", "tokens", "weights", "val", "test", "reference", "deployment",
    }  # fmt: skip
    assert gflops["tokens"] == gflops["measured"] and gflops["weights"] == gflops["uncompressed"]  # no sparse weights
    assert gflops["target"] == pytest.approx((1 - P) * gflops["uncompressed"])
    assert gflops["measured"] == pytest.approx(gflops["target"], rel=0.01)
    assert all(gflops[split] == pytest.approx(gflops["target"], rel=0.15) for split in ("val", "test"))  # 16 samples calibrate
    assert 0 < result["params"]["nonzero"] <= result["params"]["total"]
    assert set(result["metrics"]) == {"val", "test"}
    best = torch.load(trained / "checkpoint_best.pth")
    assert (best["temperature"], best["prune_from"], best["epoch"]) == (
        result["temperature"],
        result["prune_from"],
        result["epoch"],
    )
    assert result["params"]["total"] == sum(tensor.numel() for tensor in best["model"].values())


def test_redrawn_learnable_tokens_are_evaluated_at_the_same_gflops(trained, world, tmp_path):
    checkpoint = ["--evaluate", "--pretrained", str(trained / "checkpoint_best.pth")]
    run_here(flags(world, tmp_path, *checkpoint, sd_redraw="true"))
    redrawn, result = read(tmp_path, "result.json"), read(trained, "result.json")
    assert redrawn["temperature"] != result["temperature"]
    assert redrawn["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.01)


@pytest.mark.parametrize(
    ("settings", "share"), [({"method": "stp"}, 0.4), ({"method": "tome"}, 0.3), ({"mag": "false"}, 0.4)], ids=str
)
def test_every_method_meets_its_target_and_is_restored(settings, share, world, tmp_path):
    """A share that the method reaches with random weights: ToMe leaves the text whole."""
    out, p = tmp_path / "run", ("--p", str(share))
    run_here(flags(world, out, "--epoch", "1", *p, **settings, ramp_epochs=0))
    result = read(out, "result.json")
    assert result["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.01)
    assert result["method"] == settings.get("method", "dtp")
    assert ("similarity" in log_of(out)[0]["loss"]) is (settings.get("method") == "stp")
    run_here(flags(world, tmp_path / "again", "--evaluate", "--pretrained", str(out / "checkpoint_best.pth"), *p, **settings))
    again = read(tmp_path / "again", "result.json")
    assert again["temperature"] == result["temperature"] and again["metrics"] == result["metrics"]


def test_one_checkpoint_serves_every_budget_of_its_range_without_training(world, dense_weights, tmp_path):
    out = tmp_path / "run"
    run_here(flags(world, out, "--epoch", "1", train_budget="[0.4, 0.5]", distill="true", teacher=dense_weights))
    temperatures = []
    for share in (0.4, 0.45, 0.5):
        where, p = tmp_path / str(share), ("--p", str(share))
        run_here(flags(world, where, "--evaluate", "--pretrained", str(out / "checkpoint_best.pth"), *p))
        result = read(where, "result.json")
        assert result["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.01)
        temperatures.append((result["prune_from"], result["temperature"]))
    assert len(set(temperatures)) == 3


def test_the_deployment_form_is_evaluated_at_the_same_gflops(trained, world, tmp_path):
    checkpoint = ["--evaluate", "--pretrained", str(trained / "checkpoint_best.pth")]
    run_here(flags(world, tmp_path, *checkpoint, keep="fixed"))
    fixed, result = read(tmp_path, "result.json"), read(trained, "result.json")
    assert fixed["temperature"] == result["temperature"] and fixed["keep"] == "fixed"
    assert fixed["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.05)
    tokens = {row["tokens_kept"] for row in read(tmp_path, "predictions_test.json").values()}
    assert len(tokens) < len({row["tokens_kept"] for row in read(trained, "predictions_test.json").values()})


def test_words_that_guide_are_trained_saved_and_not_taken_for_another_rule(world, tmp_path):
    out = tmp_path / "run"
    run_here(flags(world, out, "--epoch", "1", guide="text", token_gradient="decision", ramp_epochs=0))
    result = read(out, "result.json")
    assert result["gflops"]["measured"] == pytest.approx(result["gflops"]["target"], rel=0.01)
    assert log_of(out)[0]["alignment"]["gradient"]["task"] > 0
    again = ["--evaluate", "--pretrained", str(out / "checkpoint_best.pth")]
    for guide, same in (("text", True), ("shared", False)):
        run_here(flags(world, tmp_path / guide, *again, guide=guide))
        assert (read(tmp_path / guide, "result.json")["temperature"] == result["temperature"]) is same


@pytest.mark.parametrize(("split", "file"), [("val", "nlvr_dev"), ("test", "nlvr_test")])
def test_the_metrics_are_those_of_the_predictions(trained, world, split, file):
    result, predictions = read(trained, "result.json"), read(trained, f"predictions_{split}.json")
    labels = [entry["label"] == "True" for entry in read(world / "annotations", f"{file}.json")]
    rows = [predictions[f"{file}-{i}"] for i in range(EVAL_SIZE)]
    assert len(predictions) == EVAL_SIZE
    assert all(row["prediction"] == (row["score"] > 0.5) and 0 < row["score"] < 1 and row["tokens_kept"] >= 3 for row in rows)
    correct = sum(row["prediction"] == label for row, label in zip(rows, labels, strict=True))
    assert result["metrics"][split]["acc"] == pytest.approx(100 * correct / EVAL_SIZE)
    assert result["gflops"][split] == pytest.approx(sum(row["gflops"] for row in rows) / EVAL_SIZE)
    assert len({row["tokens_kept"] for row in rows}) > 3  # each sample its own


def test_evaluating_holds_one_batch_at_a_time_however_long_the_split(trained, world, tmp_path, monkeypatch):
    """Bytes of all tensors that are alive when a batch is asked for."""
    from tasks import nlvr

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # with more threads, as many batches and one more
    alive = []

    def watched(loader, *rest):
        for batch in loader:
            gc.collect()
            real = (t for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))  # an export leaves fake ones
            storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real if t.device.type == "cpu"}
            alive.append(sum(storages.values()))
            del real
            yield batch

    monkeypatch.setattr(nlvr, "progress", watched)
    run_here(flags(world, tmp_path, "--evaluate", "--pretrained", str(trained / "checkpoint_best.pth"), batch_size_test=3))
    split = alive[: len(alive) // 2]  # of two splits; its last batch is smaller
    assert len(split) > 8 and max(split[2:-1]) - min(split[2:-1]) < 0.01 * max(split)


def test_the_same_seed_gives_the_same_run(trained, world, tmp_path):
    run_here(flags(world, tmp_path))
    assert_same_run(trained, tmp_path)


def test_another_seed_gives_another_run(trained, world, tmp_path):
    run_here(flags(world, tmp_path, "--seed", "43", "--epoch", "1"))
    assert log_of(trained)[0]["loss"] != log_of(tmp_path)[0]["loss"]


def test_a_resumed_run_gives_the_same_result_as_one_that_was_not_interrupted(trained, world, tmp_path):
    runs.interrupt_in_the_second_epoch(lambda: run_here(flags(world, tmp_path)))
    assert [entry["epoch"] for entry in log_of(tmp_path)] == [0] and not (tmp_path / "result.json").exists()
    run_here(flags(world, tmp_path, "--resume"))
    assert_same_run(trained, tmp_path)


@pytest.fixture(scope="module")
def dense_weights(world, tmp_path_factory) -> Path:
    """Weights without learnable tokens, for the uncompressed model."""
    config = parse_command_line("", NlvrConfig, flags(world, Path("unused"), "--p", "0"))
    path = tmp_path_factory.mktemp("dense") / "dense.pth"
    torch.manual_seed(1)
    torch.save({"model": nlvr_from_config(config, len(load_tokenizer(config.tokenizer))).state_dict()}, path)
    return path


@pytest.fixture(scope="module")
def cases(world, trained, dense_weights) -> dict[str, tuple]:
    """Name -> what the command line adds: for two processes the same, with half the batch where it is for training."""
    return {
        "uncompressed": (("--evaluate", "--p", "0", "--pretrained", str(dense_weights)), {}),
        "pruned": (("--evaluate", "--pretrained", str(trained / "checkpoint_best.pth")), {}),
        "untrained": (("--evaluate",), {}),
        "trained": (
            ("--epoch", "1", "--pretrained", str(trained / "checkpoint_best.pth")),
            {"lr_schedule": "step", "batch_size_train": 4},
        ),
    }


@pytest.fixture(scope="module")
def two_processes(world, cases, tmp_path_factory) -> Path:
    """The folder of the runs of all cases in two processes, started once."""
    folder = tmp_path_factory.mktemp("two")
    arguments = [flags(world, folder / name, *more, **settings) for name, (more, settings) in cases.items()]
    runs.run_in_two_processes(folder, [["compress_nlvr_dtp", *more] for more in arguments])
    return folder


@pytest.mark.parametrize("case", ["uncompressed", "pruned"])
def test_two_processes_evaluate_as_one(two_processes, world, cases, tmp_path, case):
    more, settings = cases[case]
    run_here(flags(world, tmp_path, *more, **settings))
    one, two = read(tmp_path, "result.json"), read(two_processes / case, "result.json")
    assert two["metrics"] == one["metrics"] and two["temperature"] == one["temperature"]
    assert two["gflops"] == pytest.approx(one["gflops"])
    for split in ("val", "test"):
        alone, shared = (read(folder, f"predictions_{split}.json") for folder in (tmp_path, two_processes / case))
        assert alone.keys() == shared.keys() and len(shared) == EVAL_SIZE
        for sample, row in alone.items():
            assert shared[sample] == {**row, "score": pytest.approx(row["score"], abs=1e-5)}
    assert (one["temperature"] is None) == (case == "uncompressed")


def test_two_processes_with_half_the_batch_train_as_one(two_processes, world, cases, tmp_path):
    """The gradient is that of the whole batch. Rounding may prune a token more or less: hence the tolerance."""
    more, settings = cases["trained"]
    run_here(flags(world, tmp_path, *more, **{**settings, "batch_size_train": 8}))
    one, two = log_of(tmp_path)[0], log_of(two_processes / "trained")[0]
    assert two["loss"] == pytest.approx(one["loss"], rel=2e-3)
    weights, shared = (torch.load(folder / "checkpoint_last.pth")["model"] for folder in (tmp_path, two_processes / "trained"))
    start = torch.load(more[-1])["model"]
    moved = {name: (weights[name] - start[name]).norm() for name in weights}
    apart = {name: (weights[name] - shared[name]).norm() for name in weights}
    assert sum(apart.values()) < 0.2 * sum(moved.values())


def test_two_accumulated_half_batches_take_the_step_of_the_whole(world, trained, tmp_path):
    start = trained / "checkpoint_best.pth"
    settings = {"bert.dropout": 0, "drop_path": 0, "epoch_steps": 1, "ramp_epochs": 0, "lr_schedule": "step", "init_lr": 1e-3}
    for name, batches in {"whole": {"batch_size_train": 8}, "halves": {"batch_size_train": 4, "accumulate": 2}}.items():
        run_here(flags(world, tmp_path / name, "--epoch", "1", "--pretrained", str(start), **settings, **batches))
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert log_of(halves)[0]["loss"] == pytest.approx(log_of(whole)[0]["loss"], rel=1e-5)
    before = torch.load(start)["model"]
    ours, theirs = (torch.load(folder / "checkpoint_last.pth") for folder in (halves, whole))
    assert ours["step"] == theirs["step"] == 1
    moments = [[state["exp_avg"] for state in each["optimizer"]["state"].values()] for each in (ours, theirs)]
    for mine, wanted in zip(*moments, strict=True):  # the gradient, whose sign alone the first step of AdamW shows
        torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-5 * float(wanted.abs().max()) + 1e-9)
    assert any(not torch.equal(theirs["model"][name], before[name]) for name in before)


def test_two_processes_draw_the_same_new_weights(two_processes, world, cases, tmp_path):
    """New weights are, for example, the learnable tokens of a model that is evaluated before any training."""
    more, settings = cases["untrained"]
    run_here(flags(world, tmp_path, *more, **settings))
    alone, shared = (read(folder, "predictions_val.json") for folder in (tmp_path, two_processes / "untrained"))
    assert all(shared[sample]["tokens_kept"] == row["tokens_kept"] for sample, row in alone.items())


def test_the_best_checkpoint_gives_the_result_again(trained, world, cases, tmp_path):
    run_here(flags(world, tmp_path, *cases["pruned"][0]))
    expected, result = read(trained, "result.json"), read(tmp_path, "result.json")
    assert result == expected


class Code:
    def __reduce__(self):
        return os.system, ("touch ran",)


def refusal(capsys, argv: list[str]) -> str:
    return runs.refusal(capsys, lambda: run_here(argv))


def test_a_refused_run_ends_with_one_line_and_exit_code_2(world, tmp_path):
    done = run_script(flags(world, tmp_path, "--p", "1.2"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: command line: key 'p' must be below 1, got '1.2'\n"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"ann_root": "/nowhere"}, "/nowhere/nlvr_train.json: No such file or directory; set the key 'ann_root'"),
        ({"image_root": "/nowhere"}, "/nowhere/nlvr/train/00000/0000000a.jpg: no such picture; set the key 'image_root'"),
        ({"sd_mum": 3}, "unknown key 'sd_mum'; did you mean 'sd_num'?"),
        ({"p": 1.2}, "key 'p' must be below 1, got 1.2"),
        ({"pretrained": "/nowhere.pth"}, "/nowhere.pth: no such checkpoint"),
        ({"tokenizer": "/nowhere"}, "/nowhere: No such file or directory; set the key 'tokenizer'"),
    ],
)
def test_settings_that_cannot_be_are_named(world, tmp_path, capsys, settings, said):
    argv = [flag for flag in flags(world, tmp_path, **settings)]
    for key in settings.keys() & {"p", "pretrained"}:  # flags go before --set
        del argv[argv.index(f"--{key}") : argv.index(f"--{key}") + 2]
    assert said in refusal(capsys, argv)


def test_damaged_data_are_named(world, tmp_path, capsys):
    broken = tmp_path / "world"
    shutil.copytree(world, broken)
    annotations = broken / "annotations" / "nlvr_dev.json"
    whole = annotations.read_text()
    annotations.write_text(whole[: len(whole) // 2])
    assert "nlvr_dev.json: not valid JSON at line 1" in refusal(capsys, flags(broken, tmp_path / "out"))
    annotations.write_text(whole)
    picture = broken / "images" / json.loads(whole)[20]["images"][1]
    picture.write_bytes(picture.read_bytes()[:100])
    assert f"{picture}: not a readable picture" in refusal(capsys, flags(broken, tmp_path / "out", "--epoch", "1"))


def test_a_p_out_of_reach_names_the_range(world, tmp_path, capsys):
    said = refusal(capsys, flags(world, tmp_path, "--p", "0.99"))
    low, high = (float(part) for part in said.split("pruning removes ")[1].split(" of the")[0].split(" to "))
    assert 0 <= low < P < high < 0.99


def test_weights_that_do_not_fit_are_named(world, trained, tmp_path, capsys):
    best = str(trained / "checkpoint_best.pth")
    said = refusal(capsys, flags(world, tmp_path, "--pretrained", best, **{"vit.embed_dim": 48}))
    assert f"{best}: shapes do not fit: " in said and "visual_encoder.cls_token is 1x1x32, the model's 1x1x48" in said
    said = refusal(capsys, flags(world, tmp_path, "--pretrained", best, "--p", "0"))
    assert f"{best}: holds space_dict" in said and "it prunes tokens, and here p is 0" in said


def test_weights_that_would_run_code_are_refused(world, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": Code()}, protocol=2))
    assert "could run code" in refusal(capsys, flags(world, tmp_path / "out", "--pretrained", "evil.pth"))
    assert not (tmp_path / "ran").exists()


def test_resuming_from_nothing_is_refused(world, tmp_path, capsys):
    assert "no such checkpoint to resume from" in refusal(capsys, flags(world, tmp_path, "--resume"))


def test_a_checkpoint_of_the_authors_code_is_evaluated_by_their_formulas_or_not_unasked(world, trained, tmp_path, capsys):
    theirs, temperature = tmp_path / "theirs.pth", 2.5
    weights = torch.load(trained / "checkpoint_best.pth", weights_only=True)["model"]
    torch.save({"model": weights, "temperature": temperature, "epoch": 4}, theirs)
    command = flags(world, tmp_path / "out", "--evaluate", "--pretrained", str(theirs), keep="max")
    said = runs.refusal(capsys, partial(run_here, command))
    assert f"{theirs}: is a compressed checkpoint of the authors' code" in said and "--set variant=released" in said
    run_here([*command, "--set", "variant=released"])
    result = read(tmp_path / "out", "result.json")
    assert (result["variant"], result["temperature"], result["epoch"]) == ("released", temperature, 4)
    removed = 1 - result["gflops"]["measured"] / result["gflops"]["uncompressed"]
    assert result["reduce_ratio"] == pytest.approx(removed) != P
