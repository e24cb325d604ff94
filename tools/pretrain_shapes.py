"""Train an uncompressed Shapes model from nothing, by stages, each from the weights of the one before.

    python tools/pretrain_shapes.py --task nlvr --work output/pretrain

nlvr            vision   the image encoder names what each patch shows and where it is, the class token counts, as BLIP's image
                         encoder starts from a trained classifier
                reading  the text encoder tells what either picture holds of a statement (how many, in which row), the image
                         encoder frozen; of the ground it sees a random share, so that how much is shown says nothing
                         (PatchDropout, Liu et al., 2023)
                joint    both encoders together, on what is true alone, as they will be compressed
                sparse   the same with little ground shown to the image encoder too, while the class token tells after every
                         block what the things are
retrieval       pairs    from the encoders of the model for NLVR2: pictures and captions find each other among near-alike ones,
                         little of the ground shown, while the class token tells after every block what the things are
retrieval_clip  vision   as above
                pairs    as above
caption         captions from the encoders of the model for NLVR2, the decoder from that of texts: captions are written, little of
                         the ground shown
vqa             answers  from the encoders of the model for NLVR2: questions are answered, little of the ground shown

A stage that has left its weights is not run again. The weights go to pretrained/shapes/TASK.safetensors in half precision, the
logs beside them, with the metrics on fresh test data.
"""

import argparse
import logging
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs.schema import CONFIGS, Config  # noqa: E402
from data.shapes.tasks import vocabulary  # noqa: E402
from engine.restore import build_model  # noqa: E402
from models.weights.blip import read_checkpoint  # noqa: E402
from configs.load import load_config  # noqa: E402
from tools.stages.caption import train_captions  # noqa: E402
from tools.stages.common import Plan, start_from_nlvr, train_vision, word_directions  # noqa: E402
from tools.stages.nlvr import train_joint, train_reading, train_sparse  # noqa: E402
from tools.stages.retrieval import train_pairs  # noqa: E402
from tools.stages.vqa import train_answers  # noqa: E402
from utils import UserError, run_main, seed_everything  # noqa: E402

PRETRAINED = ROOT / "pretrained/shapes"
VISION = Plan(steps=600, batch=32, rate=1e-3, warmup=100)
READING = Plan(steps=6_000, batch=8, rate=3e-4)
JOINT = Plan(steps=2_400, batch=8, rate=1.5e-4, warmup=100)
SPARSE = Plan(steps=2_400, batch=8, rate=2e-4, warmup=100)
BLIP_PAIRS = Plan(steps=1_500, batch=0, rate=3e-4)
CAPTIONS = Plan(steps=1_000, batch=16, rate=5e-4, warmup=100)
ANSWERS = Plan(steps=500, batch=16, rate=4e-4, warmup=50)
CLIP_PAIRS = Plan(steps=3_000, batch=0, rate=5e-4)
Stage = Callable[[int, Path], None]  # seed, log


@dataclass
class Recipe:
    """A task's uncompressed model, its stages by name, and how its test data are made."""

    model: nn.Module
    stages: dict[str, Stage]
    data: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=RECIPES)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    work, out = args.work / args.task, PRETRAINED / f"{args.task}.safetensors"
    work.mkdir(parents=True, exist_ok=True)
    words = PRETRAINED / "vocab.txt"
    words.write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    seed_everything(args.seed)
    config = load_config(CONFIGS[args.task], config_of(args.task), {"p": 0.0, "tokenizer": str(words)})
    recipe = RECIPES[args.task](config)
    for name, train in recipe.stages.items():
        weights = work / f"{name}.pth"
        if weights.exists():
            recipe.model.load_state_dict(read_checkpoint(weights)["model"])
        else:
            train(args.seed, work / f"{name}.log")
            torch.save({"model": recipe.model.state_dict()}, weights)
    publish(recipe.model, out)
    test(args, recipe, words, work)
    lines = [f"# python {' '.join(sys.argv)}"]
    for log in (*(work / f"{name}.log" for name in recipe.stages), work / "test" / "result.json"):
        lines += [f"# {log.relative_to(work)}", *log.read_text().splitlines()]
    out.with_suffix(".log").write_text("\n".join(lines) + "\n", encoding="utf-8")


def config_of(task: str) -> Path:
    return ROOT / f"configs/shapes/{task}.yaml"


def publish(model: nn.Module, out: Path) -> None:
    """Half precision; momentum weights, which start as the others, and buffers such as queues are left out."""
    weights = {name: weight for name, weight in model.named_parameters() if not name.split(".")[0].endswith("_m")}
    save_file({name: weight.detach().half().contiguous() for name, weight in weights.items()}, out)


def test(args: argparse.Namespace, recipe: Recipe, words: Path, work: Path) -> None:
    """Evaluates what was published, on samples that no stage has seen."""
    data = work / "data"
    run([sys.executable, "tools/make_shapes.py", "--out", str(data), "--seed", str(args.seed + 1), *recipe.data])
    script = CONFIGS[args.task].script
    command = [script, "--config", str(config_of(args.task)), "--p", "0", "--evaluate", "--output_dir", str(work / "test")]
    folders = {**dict.fromkeys(CONFIGS[args.task].image_keys, data / "images"), "ann_root": data / "annotations"}
    for key, value in {**folders, "tokenizer": words}.items():
        command += ["--set", f"{key}={value}"]
    run([sys.executable, *command])


def run(command: list[str]) -> None:
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"{command[1]} failed; its message stands above; mend it and start again: finished stages are kept")


def nlvr(config: Config) -> Recipe:
    model, tokenizer = build_model(config)
    encoder, embeddings = model.visual_encoder, model.text_encoder.embeddings.word_embeddings.weight

    def vision(seed: int, log: Path) -> None:
        directions = word_directions(embeddings, tokenizer.convert_tokens_to_ids)
        train_vision(encoder, lambda images: encoder(images)[0], directions, config.image_size, VISION, seed, log)

    stages = {
        "vision": vision,
        "reading": lambda seed, log: train_reading(model, config, READING, seed, log),
        "joint": lambda seed, log: train_joint(model, config, JOINT, seed, log),
        "sparse": lambda seed, log: train_sparse(model, config, SPARSE, seed, log),
    }
    return Recipe(model, stages, ["--tasks", "nlvr", "--size", "1000", "--statements-per-pair", "8", "--eval-size", "4000"])


RETRIEVAL_DATA = ["--tasks", "retrieval", "--size", "1000", "--eval-size", "1000"]


def retrieval(config: Config) -> Recipe:
    model, tokenizer = build_model(config)
    start_from_nlvr(model, read_checkpoint(PRETRAINED / "nlvr.safetensors")["model"])
    stages = {"pairs": lambda seed, log: train_pairs(model, config, tokenizer, BLIP_PAIRS, seed, log)}
    return Recipe(model, stages, RETRIEVAL_DATA)


def retrieval_clip(config: Config) -> Recipe:
    model, tokenizer = build_model(config)

    def vision(seed: int, log: Path) -> None:
        directions = word_directions(model.token_embedding.weight, lambda names: [tokenizer.words(name)[0] for name in names])
        tokens_of = lambda images: model.encode_image(images).tokens  # noqa: E731
        train_vision(model.visual, tokens_of, directions, config.image_size, VISION, seed, log)

    stages = {"vision": vision, "pairs": lambda seed, log: train_pairs(model, config, tokenizer, CLIP_PAIRS, seed, log)}
    return Recipe(model, stages, RETRIEVAL_DATA)


SINGLES = ["--size", "500", "--eval-size", "1000", "--val-size", "500"]


def caption(config: Config) -> Recipe:
    model, tokenizer = build_model(config)
    start_from_nlvr(model, read_checkpoint(PRETRAINED / "nlvr.safetensors")["model"], text="text_decoder.bert")
    stages = {"captions": lambda seed, log: train_captions(model, config, tokenizer, CAPTIONS, seed, log)}
    return Recipe(model, stages, ["--tasks", "caption", *SINGLES])


def vqa(config: Config) -> Recipe:
    model, tokenizer = build_model(config)
    start_from_nlvr(model, read_checkpoint(PRETRAINED / "nlvr.safetensors")["model"])
    stages = {"answers": lambda seed, log: train_answers(model, config, tokenizer, ANSWERS, seed, log)}
    return Recipe(model, stages, ["--tasks", "vqa", *SINGLES])


RECIPES = {"nlvr": nlvr, "retrieval": retrieval, "retrieval_clip": retrieval_clip, "caption": caption, "vqa": vqa}


if __name__ == "__main__":
    run_main(main)
