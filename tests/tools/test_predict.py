"""Predictions on one's own pictures are those of the entry scripts' evaluation; and what the program says when it cannot."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from configs.load import parse_command_line, save_config
from data.shapes.write import make_shapes
from madtp.sparsity.layers import sparse_weights
from tasks.ranking import rank
from tasks.registry import TASKS, build_model, open_checkpoint
from tests import runs, tiny
from tests.runs import ROOT, read
from tools import predict

PICTURES = 4  # of a split
P, RULE = 0.4, {"method": "dtp", "variant": "paper", "keep": "instance", "p": 0.4}
SIZES = {
    "vit.depth": 2, "vit.embed_dim": 32, "bert.hidden_size": 32, "bert.num_hidden_layers": 2, "bert.intermediate_size": 64,
    "clip.vision_width": 32, "clip.vision_layers": 2, "clip.text_width": 32, "clip.text_layers": 2, "clip.embed_dim": 16,
}  # fmt: skip
SHARED = {"sd_num": 8, "sd_dim": 32, "batch_size_test": 3, "calibration_size": 3, "num_workers": 0, "amp": "false"}
RETRIEVAL = {"queue_size": 8, "k_test": 20, "embed_dim": 16}
OWN = {"retrieval": RETRIEVAL, "retrieval_clip": RETRIEVAL}
PAIRS = pytest.mark.parametrize("task", OWN)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    make_shapes(folder, seed=22, size=60, tasks=("nlvr", "caption", "vqa", "retrieval"), eval_size=PICTURES, workers=1)
    return folder


@pytest.fixture(scope="module")
def evaluated(world, tmp_path_factory):
    """Task -> the folder of an evaluation of random weights, which lie in it; made when first asked for."""
    folder, made = tmp_path_factory.mktemp("runs"), {}

    def run(task: str, **settings) -> Path:
        out = folder / "-".join([task, *settings.values()])
        if out not in made:
            made[out] = evaluate(task, world, out, **settings)
        return out

    return run


def random_run(task: str, world: Path, out: Path, **settings) -> list[str]:
    """The checkpoint and the config of random weights; and the command line that evaluates them."""
    out.mkdir()
    files = {**dict.fromkeys(TASKS[task].config_class.image_keys, world / "images"), "ann_root": world / "annotations"}
    files["tokenizer"] = world / "annotations" / "vocab.txt"
    sizes = {key: size for key, size in SIZES.items() if key.startswith("clip.") == (task == "retrieval_clip")}
    values = {**files, **SHARED, **sizes, **OWN.get(task, {}), **settings}
    argv = ["--config", str(ROOT / f"configs/shapes/{task}.yaml"), "--output_dir", str(out), "--device", "cpu", "--evaluate"]
    argv += ["--p", str(P), "--pretrained", str(out / "checkpoint_best.pth"), *(f"--set={k}={v}" for k, v in values.items())]
    config = parse_command_line("", TASKS[task].config_class, argv)
    model = tiny.with_lively_weights(build_model(config)[0])
    state = {"temperature": 3.0, "prune_from": 1, "batch_size": 3, **RULE}
    if config.pattern:
        sparse = sparse_weights(model, config.pattern, config.sparse_layers)
        sparse.select(sparse.weights)
        state |= {"masked": sorted(sparse.masks), "sparsity_type": config.sparsity_type, "sparse_layers": config.sparse_layers}
    saved = {"model": model.state_dict(), **state}
    torch.save(saved, out / "checkpoint_best.pth")
    save_config(config, out / "config.yaml")
    return argv


def evaluate(task: str, world: Path, out: Path, **settings) -> None:
    argv = random_run(task, world, out, **settings)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", "")  # no Java: the scores of captions do not matter here, and take long
        runs.run_here(f"compress_{task}_dtp", argv)


@pytest.fixture
def ask(evaluated, monkeypatch, capsys):
    """(task, pictures, texts, further arguments) -> what the program prints."""

    def run(task: str, images: list, texts: list[str] = (), *more: object, **settings) -> Any:
        given = [word for image in images for word in ("--image", image)] + [word for text in texts for word in ("--text", text)]
        argv = ["--checkpoint", evaluated(task, **settings) / "checkpoint_best.pth", "--device", "cpu", "--json", *given, *more]
        capsys.readouterr()
        monkeypatch.setattr("sys.argv", ["predict.py", *map(str, argv)])
        predict.main()
        return json.loads(capsys.readouterr().out)

    return run


def shouted(text: str) -> str:
    """Another text, of which cleaning makes the same."""
    return f"{text.upper()}!"


def entries(world: Path, name: str) -> list[dict]:
    return read(world / "annotations", f"{name}.json")


def test_a_statement_is_judged_as_in_evaluation(ask, evaluated, world) -> None:
    rows = read(evaluated("nlvr"), "predictions_test.json")
    for number, entry in enumerate(entries(world, "nlvr_test")):
        said = ask("nlvr", [world / "images" / name for name in entry["images"]], [shouted(entry["sentence"])])
        row = rows[f"nlvr_test-{number}"]
        assert (said["task"], said["prediction"]) == ("nlvr", row["prediction"])
        assert said["score"] == pytest.approx(row["score"], abs=1e-6)
        assert said["gflops"] == pytest.approx(row["gflops"]) and said["gflops"] < said["gflops_uncompressed"]
        tokens = said["tokens"]
        assert [len(tokens[tower]["kept"]) for tower in ("image", "text")] == [2, 1]
        assert sum(tokens["image"]["kept"] + tokens["text"]["kept"]) == row["tokens_kept"]


def test_sparse_weights_count_for_the_answer_and_not_for_the_uncompressed_one(ask, evaluated, world) -> None:
    sample, sparse = one_sample("nlvr", world), {"sparsity_type": "2:4"}
    dense, said = ask("nlvr", *sample), ask("nlvr", *sample, **sparse)
    assert said["gflops_uncompressed"] == pytest.approx(dense["gflops_uncompressed"], rel=1e-6)
    masked = len(torch.load(evaluated("nlvr", **sparse) / "checkpoint_best.pth")["masked"])
    assert dense["sparse_kernels"] == {"used": 0, "of": 0} and said["sparse_kernels"] == {"used": 0, "of": masked} and masked
    (row, *_), entry = read(evaluated("nlvr", **sparse), "predictions_test.json").values(), entries(world, "nlvr_test")[0]
    said = ask("nlvr", [world / "images" / name for name in entry["images"]], [entry["sentence"]], **sparse)
    assert said["gflops"] == pytest.approx(row["gflops"]) and said["score"] == pytest.approx(row["score"], abs=1e-6)


def test_a_caption_is_written_as_in_evaluation(ask, evaluated, world) -> None:
    for name, row in read(evaluated("caption"), "predictions_test.json").items():
        said = ask("caption", [world / "images" / name])
        assert said["prediction"] == row["prediction"] and said["gflops"] == pytest.approx(row["gflops"])
        assert said["tokens"]["image"]["kept"] == [row["tokens_kept"]]


@pytest.mark.parametrize("inference", ["rank", "generate"])
def test_a_question_is_answered_as_in_evaluation(ask, evaluated, world, inference) -> None:
    rows = read(evaluated("vqa", inference=inference), "predictions_test.json")
    for entry in entries(world, "vqa_test"):
        said = ask("vqa", [world / "images" / entry["image"]], [shouted(entry["question"])], inference=inference)
        row = rows[str(entry["question_id"])]
        assert said["prediction"] == row["prediction"] and said["gflops"] < said["gflops_uncompressed"]
        assert said["tokens"]["image"]["kept"][0] + said["tokens"]["text"]["kept"][0] == row["tokens_kept"]
        scores = [answer.get("score") for answer in said["answers"]]
        assert scores == [None] if inference == "generate" else 1 > scores[0] >= scores[-1] > 0


@PAIRS
def test_texts_and_pictures_are_ranked_as_in_evaluation(ask, evaluated, world, task) -> None:
    rows, captioned = read(evaluated(task), "predictions_test.json"), entries(world, "flickr30k_test")
    texts, names = [text for entry in captioned for text in entry["caption"]], [entry["image"] for entry in captioned]
    said = ask(task, [world / "images" / names[1]], list(map(shouted, texts)))
    best = [texts.index(row["text"].lower().rstrip("!")) for row in said["ranking"][:10]]
    assert best == [texts.index(texts[number]) for number in rows["captions"][names[1]]]
    said = ask(task, [world / "images" / name for name in names], [texts[3]])
    assert [row["image"] for row in said["ranking"]] == [str(world / "images" / name) for name in rows["pictures"]["3"]]


@PAIRS
def test_scores_of_pairs_are_those_of_the_ranking(ask, evaluated, world, task) -> None:
    opened = open_checkpoint(evaluated(task) / "checkpoint_best.pth", device="cpu")
    split, matching = opened.task.loaders()["test"], task == "retrieval"
    with torch.no_grad():
        by_image, _ = rank(opened.model, split, opened.task.guidance(opened.setting), opened.task.run, 20, matching)
    said = ask(task, [world / "images" / split.names[2]], split.captions)["ranking"]
    assert [row["score"] for row in said] == pytest.approx(by_image.scores[2].tolist(), abs=1e-5)
    if matching:
        logits = torch.tensor([row["score"] - row["similarity"] for row in said])
        assert all(0 < row["match"] < 1 for row in said) and len({float(logit) for logit in logits}) > 1
    else:
        assert all(row["score"] == row["similarity"] and "match" not in row for row in said)


def one_sample(task: str, world: Path) -> tuple[list[Path], list[str]]:
    """Two pictures or one, and a text where the task wants one."""
    return sorted((world / "images").rglob("*.jpg"))[: 1 + (task == "nlvr")], ["a red star"] * (task != "caption")


@pytest.fixture
def ask_weights(ask, evaluated, world, tmp_path):
    """(task, names) -> what its model says of a sample as bare weights without those that one of the names is part of."""

    def run(task: str, *left_out: str) -> Any:
        weights = torch.load(evaluated(task) / "checkpoint_best.pth")["model"]
        kept = {name: tensor.clone() for name, tensor in weights.items() if not any(part in name for part in left_out)}
        save_file(kept, file := tmp_path / "weights.safetensors")
        return ask(task, *one_sample(task, world), "--config", evaluated(task) / "config.yaml", "--checkpoint", file)

    return run


@pytest.mark.parametrize("task", ["nlvr", *OWN])
def test_dense_weights_run_dense_and_cost_what_a_pruned_model_calls_uncompressed(ask, ask_weights, world, task) -> None:
    pruned, said = ask(task, *one_sample(task, world)), ask_weights(task, "pruner", "space_dict")
    assert said["gflops"] == said["gflops_uncompressed"] == pytest.approx(pruned["gflops_uncompressed"])
    assert pruned["gflops"] < said["gflops"]
    assert said["tokens"]["image"]["kept"] == said["tokens"]["image"]["of"] == pruned["tokens"]["image"]["of"]


def test_weights_without_which_an_answer_would_be_random_are_refused(ask_weights, capsys) -> None:
    said = runs.refusal(capsys, lambda: ask_weights("nlvr", "pruner", "space_dict", "cls_head"))
    assert "weights.safetensors: lacks cls_head.0.weight, so its answers would be random" in said


def test_pruned_weights_without_their_temperature_are_refused(ask_weights, capsys) -> None:
    assert "pruned weights without their temperature" in runs.refusal(capsys, lambda: ask_weights("nlvr", "cls_head.0.bias"))


def test_an_authors_temperature_is_not_taken_for_one_of_the_papers_formula(ask, evaluated, world, tmp_path, capsys) -> None:
    """Theirs divides, the paper's multiplies."""
    weights = torch.load(evaluated("nlvr") / "checkpoint_best.pth")["model"]
    torch.save({"model": weights, "temperature": 500.0, "epoch": 3}, file := tmp_path / "authors.pth")
    asked = ("nlvr", *one_sample("nlvr", world), "--config", evaluated("nlvr") / "config.yaml", "--checkpoint", file)
    assert "its temperature is of the authors' formulas; set variant: released" in runs.refusal(capsys, lambda: ask(*asked))


@pytest.mark.parametrize("task", TASKS)
def test_what_survives_is_drawn_beside_the_same_answer(ask, world, tmp_path, task) -> None:
    sample, out = one_sample(task, world), tmp_path / "kept" / "out.png"
    assert ask(task, *sample, "--explain", out) == ask(task, *sample)
    assert Image.open(out).size[1] > 150


@PAIRS
def test_a_drawing_a_pair(ask, world, tmp_path, task) -> None:
    images = sorted((world / "images").rglob("*.jpg"))[:2]
    for number in (1, 2):
        ask(task, images[:number], ["a red star"], "--explain", tmp_path / f"{number}.png")
    one, two = (Image.open(tmp_path / f"{number}.png").size[1] for number in (1, 2))
    assert one * 2 == pytest.approx(two, abs=2)


@pytest.mark.parametrize(
    ("task", "label", "settings"),
    [("caption", "written", {}), ("vqa", "answer", {}), ("vqa", "answer", {"inference": "generate"})],
)
def test_a_drawing_says_what_the_model_writes(ask, world, tmp_path, monkeypatch, task, label, settings) -> None:
    drawn = []
    monkeypatch.setattr(predict, "write_drawings", lambda samples, out: drawn.extend(samples))
    images, texts = one_sample(task, world)
    said = ask(task, images, texts, "--explain", tmp_path / "out.png", **settings)
    (sample,) = drawn
    assert sample.said == [(label, said["prediction"])] and sample.heading.startswith(f"{images[0].name}, p = {P} ")
    assert sample.heading.endswith(f"{said['gflops']:.4g} GFLOPs")
    ((_, _, patches),) = sample.pictures
    assert patches.shape == (2, 12, 12) and patches[-1].sum() <= said["tokens"]["image"]["kept"][0] - 1
    assert [words for words, _ in sample.texts] == [["a", "red", "star", "[SEP]"]] * (task == "vqa")


def test_a_reader_gets_the_answer_first(evaluated, world, monkeypatch, capsys) -> None:
    (left, right), (text,) = one_sample("nlvr", world)
    argv = ["--checkpoint", evaluated("nlvr") / "checkpoint_best.pth", "--image", left, "--image", right, "--text", text]
    monkeypatch.setattr("sys.argv", ["predict.py", *map(str, argv), "--device", "cpu"])
    capsys.readouterr()
    predict.main()
    answer, cost, tokens = capsys.readouterr().out.splitlines()
    assert answer.split()[0] in ("True", "False") and "probability" in answer
    assert "GFLOPs, uncompressed" in cost and "% fewer" in cost and tokens.startswith("tokens kept: image ")


@pytest.mark.parametrize(
    ("task", "images", "texts", "said"),
    [
        ("nlvr", 1, 1, "task 'nlvr' wants --image twice, the left one first, and --text once; got 1 --image and 1 --text"),
        ("vqa", 1, 0, "task 'vqa' wants --image once and --text once, the question; got 1 --image and 0 --text"),
        ("caption", 1, 1, "task 'caption' wants --image once and no --text; got 1 --image and 1 --text"),
        ("retrieval_clip", 2, 2, "or --text once and --image once or more; got 2 --image and 2 --text"),
    ],
)
def test_a_wrong_number_of_pictures_or_texts_is_named(ask, world, capsys, task, images, texts, said) -> None:
    pictures = sorted((world / "images").rglob("*.jpg"))[:images]
    assert said in runs.refusal(capsys, lambda: ask(task, pictures, ["a star"] * texts))


def test_what_cannot_be_read_is_named(ask, evaluated, world, tmp_path, capsys) -> None:
    def refusal(*given) -> str:
        return runs.refusal(capsys, lambda: ask("caption", *given))

    (picture := tmp_path / "broken.jpg").write_bytes(b"no picture")
    whole = next((world / "images").rglob("*.jpg"))
    assert f"{picture}: not a readable picture" in refusal([picture])
    assert "nowhere.jpg: no such picture; give the path of one with --image" in refusal(["nowhere.jpg"])
    assert "--text '...': has no words" in refusal([whole], ["..."])
    assert "must end in .png" in refusal([whole], [], "--explain", "out.jpg")
    assert "nowhere.yaml: No such file" in refusal([whole], [], "--config", "nowhere.yaml")
    (config := tmp_path / "config.yaml").write_text("task: poetry\n")
    assert "its key 'task' is 'poetry'" in refusal([whole], [], "--config", config)
    said = refusal([whole], [], "--config", evaluated("nlvr") / "config.yaml")
    assert "checkpoint_best.pth: lacks text_encoder" in said and "is it a checkpoint of this kind of model?" in said
