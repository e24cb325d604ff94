"""Trains an uncompressed Shapes model from scratch, in stages. Each stage starts from the weights of the one before.

    python tools/pretrain_shapes.py --task nlvr --work output/pretrain

nlvr            vision   the image encoder learns to name the content and position of each patch, and the class token to count,
                         since BLIP's image encoder also starts from a trained classifier
                reading  the text encoder learns to tell the evidence for a statement in either picture (a count or a row), with the
                         image encoder frozen; it sees a random share of the background patches, so that their number carries no
                         information (PatchDropout, Liu et al., 2023)
                joint    both encoders learn together whether statements are true, as in compression
                sparse   the same, but the image encoder too sees only a few background patches, and a head on the class token of
                         every block must name the things
retrieval       pairs    starts from the NLVR2 model's encoders; contrastive and matching losses on similar pictures and captions,
                         with few background patches and heads on the class tokens as above
retrieval_clip  vision   as for nlvr
                pairs    as for retrieval
caption         captions starts from the NLVR2 model, whose text encoder initialises the decoder; caption loss, with few background
                         patches
vqa             answers  starts from the NLVR2 model's encoders; answer loss, with few background patches

A stage whose weights exist is skipped. The weights are written to pretrained/shapes/TASK.safetensors in half precision, with a log
next to them that ends with the metrics on new test data.
"""

import argparse
import logging
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import torch
from safetensors.torch import save_file
from torch import nn

import tools.stages
from configs.load import load_config
from data.shapes.tasks import vocabulary
from models.weights.reading import read_checkpoint
from tasks.registry import TASKS
from tools.stages.common import Recipe
from utils import UserError, run_main, seed_everything, user_path

ROOT = Path(__file__).resolve().parents[1]
PRETRAINED = ROOT / "pretrained/shapes"
SHARED = ("common",)  # modules of tools/stages that belong to no task


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", required=True, choices=recipes())
    parser.add_argument("--work", type=user_path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    work, out = args.work / args.task, PRETRAINED / f"{args.task}.safetensors"
    work.mkdir(parents=True, exist_ok=True)
    words = PRETRAINED / "vocab.txt"
    words.write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    seed_everything(args.seed)
    config = load_config(TASKS[args.task].config_class, config_of(args.task), {"p": 0.0, "tokenizer": str(words)})
    recipe: Recipe = import_module(f"tools.stages.{args.task}").recipe(config)
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


def recipes() -> list[str]:
    """Returns the tasks that have a module in tools/stages."""
    return sorted(module.name for module in iter_modules(tools.stages.__path__) if module.name not in SHARED)


def config_of(task: str) -> Path:
    return ROOT / f"configs/shapes/{task}.yaml"


def publish(model: nn.Module, out: Path) -> None:
    """Writes the weights in half precision, without momentum encoders (which start as copies) and buffers such as queues."""
    weights = {name: weight for name, weight in model.named_parameters() if not name.split(".")[0].endswith("_m")}
    save_file({name: weight.detach().half().contiguous() for name, weight in weights.items()}, out)


def test(args: argparse.Namespace, recipe: Recipe, words: Path, work: Path) -> None:
    """Evaluates the published weights on samples that no stage has seen."""
    data = work / "data"
    run([sys.executable, "tools/make_shapes.py", "--out", str(data), "--seed", str(args.seed + 1), *recipe.data])
    script = TASKS[args.task].config_class.script
    command = [script, "--config", str(config_of(args.task)), "--p", "0", "--evaluate", "--output_dir", str(work / "test")]
    command.append("--overwrite")  # of an earlier start of this program
    folders = {**dict.fromkeys(TASKS[args.task].config_class.image_keys, data / "images"), "ann_root": data / "annotations"}
    for key, value in {**folders, "tokenizer": words}.items():
        command += ["--set", f"{key}={value}"]
    run([sys.executable, *command])


def run(command: list[str]) -> None:
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"{command[1]} failed; see its message above, fix the cause and start again: finished stages are kept")


if __name__ == "__main__":
    run_main(main)
