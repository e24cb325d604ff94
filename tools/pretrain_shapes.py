"""Train the uncompressed Shapes model from nothing, by stages, each from the weights of the one before.

    python tools/pretrain_shapes.py --work output/pretrain --out pretrained/shapes/nlvr.safetensors

1 vision   the image encoder names what each patch shows and where it is, as BLIP's starts from a trained classifier
2 words    few things in a picture: the text encoder learns what words mean, the image encoder frozen
3 world    all statements about the whole world, the image encoder still frozen
4 whole    everything together

Stages 2 to 4 are runs of compress_nlvr_dtp.py with --p 0; a stage that has left its checkpoint is not run again. The log of every
epoch is gathered beside the weights.
"""

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import NlvrConfig, load_config  # noqa: E402
from data.shapes.world import COLOURS, LATTICE, SHAPES, SIZES, Scene, draw, random_scene  # noqa: E402
from data.text import load_tokenizer  # noqa: E402
from models.build import nlvr_from_config  # noqa: E402
from models.pretrained import read_checkpoint  # noqa: E402
from transform.images import eval_transform  # noqa: E402
from utils import UserError, run_main, seed_everything  # noqa: E402

CONFIG = ROOT / "configs/shapes/nlvr.yaml"
PATCH = 8  # px, in 12 x 12 patches, two to a cell of the world's lattice
SIDE = 2 * LATTICE
ATTRIBUTES = (SIZES, COLOURS, SHAPES)  # in the order of a Kind; named one by one, as words will name them
VISION = {"steps": 500, "batch": 32, "rate": 1e-3, "warmup": 100}
GROUND_WEIGHT = 0.2  # most patches show ground
PLACE_WEIGHT = 0.1

# The words that a picture can tell; masking the others teaches grammar instead.
MASKED = (
    *SIZES, *COLOURS, *SHAPES, "circles", "squares", "triangles", "stars", "crosses", "thing", "things",
    "more", "fewer", "higher", "lower", "above", "one", "two", "three", "four",
)  # fmt: skip

# name: (data set arguments, settings). Statements that share a pair cost little more than one.
DATA = {
    "easy": ["--size", "20000", "--most-things", "4", "--templates", "both,pair", "--eval-size", "500"],
    "full": ["--size", "60000", "--eval-size", "2000"],
}
STAGES = {
    "words": ("easy", {"freeze_vit": True, "init_lr": 3e-4, "max_epoch": 4, "word_weight": 1.0}),
    "world": ("full", {"freeze_vit": True, "init_lr": 3e-4, "max_epoch": 6, "word_weight": 1.0}),
    "whole": ("full", {"freeze_vit": False, "init_lr": 3e-4, "max_epoch": 4, "word_weight": 0.5}),
}
COMMON = {
    "batch_size_train": 4, "statements_per_pair": 12, "lr_schedule": "step", "clip_grad": 1.0, "warmup_steps": 200,
    "method": "none", "word_rate": 0.5, "word_list": list(MASKED),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the weights, .safetensors in half precision")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    weights = args.work / "vision.pth"
    if not weights.exists():
        easy = make_data(args.work / "easy", DATA["easy"], args.seed)
        train_vision(weights, easy / "annotations" / "vocab.txt", args.seed)
    for name, (data, settings) in STAGES.items():
        best = args.work / name / "checkpoint_best.pth"
        if not best.exists():
            folder = make_data(args.work / data, DATA[data], args.seed)
            train_stage(name, args, folder, weights, settings)
        weights = best
    publish(args.work, weights, args.out)


def make_data(folder: Path, arguments: list[str], seed: int) -> Path:
    if not (folder / "annotations" / "nlvr_train.json").exists():
        command = [sys.executable, "tools/make_shapes.py", "--out", str(folder), "--seed", str(seed), "--tasks", "nlvr"]
        run([*command, "--statements-per-pair", "14", *arguments])
    return folder


def train_stage(name: str, args: argparse.Namespace, data: Path, weights: Path, settings: dict) -> None:
    """One run of the entry script; a run that was cut off goes on where it was."""
    folder = args.work / name
    values = {
        **COMMON, **settings,
        "image_root": data / "images", "ann_root": data / "annotations", "tokenizer": data / "annotations" / "vocab.txt",
    }  # fmt: skip
    command = [sys.executable, "compress_nlvr_dtp.py", "--config", str(CONFIG), "--p", "0", "--output_dir", str(folder)]
    command += ["--pretrained", str(weights), "--seed", str(args.seed), "--amp"]
    for key, value in values.items():
        command += ["--set", f"{key}={json.dumps(value) if isinstance(value, bool | list) else value}"]
    run(command + (["--resume"] if (folder / "checkpoint_last.pth").exists() else []))


def run(command: list[str]) -> None:
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"{command[1]} failed; its message stands above; mend it and start again: finished stages are kept")


def patch_attributes(scene: Scene) -> Tensor:
    """Size, colour and shape of what each patch shows, (SIDE * SIDE, 3): 0 is ground, else 1 + the index of the attribute."""
    attributes = torch.zeros(SIDE, SIDE, 3, dtype=torch.long)
    for thing in scene:
        row, column = 2 * thing.row, 2 * thing.column
        value = torch.tensor([1 + names.index(name) for names, name in zip(ATTRIBUTES, thing.kind, strict=True)])
        if thing.kind.size == "large":
            attributes[row : row + 2, column : column + 2] = value
        else:  # world places are in quarters of a pixel
            attributes[thing.y // (4 * PATCH), thing.x // (4 * PATCH)] = value
    return attributes.flatten(0, 1)


class Pictures(IterableDataset):
    """Endless fresh pictures, a batch an item: images (B, 3, H, W) and what their patches show (B, N, 3)."""

    def __init__(self, seed: int, batch: int, image_size: int):
        self.seed, self.batch, self.transform = seed, batch, eval_transform(image_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in count(0, self.batch):
            streams = [np.random.default_rng((self.seed, start + i)) for i in range(self.batch)]
            scenes = [random_scene(rng) for rng in streams]
            images = [self.transform(draw(rng, scene)) for rng, scene in zip(streams, scenes, strict=True)]
            yield torch.stack(images), torch.stack([patch_attributes(scene) for scene in scenes])


def train_vision(path: Path, vocabulary: Path, seed: int) -> None:
    """Stage 1. Saves a whole model whose text encoder is still random."""
    seed_everything(seed)
    config = load_config(NlvrConfig, CONFIG, {"p": 0.0})
    model = nlvr_from_config(config, len(load_tokenizer(vocabulary)))
    encoder = model.visual_encoder.train()
    classes = [1 + len(names) for names in ATTRIBUTES]
    head = nn.Linear(encoder.embed_dim, sum(classes) + SIDE * SIDE)
    parameters = [*encoder.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=VISION["rate"], weight_decay=config.weight_decay)
    places = torch.arange(SIDE * SIDE).repeat(VISION["batch"])
    stream = DataLoader(Pictures(seed, VISION["batch"], config.image_size), batch_size=None, num_workers=1)
    steps = islice(stream, VISION["steps"])
    for step, (images, attributes) in enumerate(bar := tqdm(steps, desc="vision", total=VISION["steps"], disable=None)):
        cosine = 0.5 * (1 + math.cos(math.pi * step / VISION["steps"]))
        for group in optimizer.param_groups:
            group["lr"] = VISION["rate"] * min(1, (step + 1) / VISION["warmup"]) * cosine
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(encoder(images)[0][:, 1:]).float()
        *what, where = logits.split([*classes, SIDE * SIDE], dim=-1)
        loss = PLACE_WEIGHT * F.cross_entropy(where.flatten(0, 1), places)
        for index, named in enumerate(what):
            weight = torch.ones(classes[index])
            weight[0] = GROUND_WEIGHT
            loss = loss + F.cross_entropy(named.flatten(0, 1), attributes[..., index].flatten(), weight=weight)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 49:
            named = torch.stack([logits.argmax(-1) for logits in what], dim=-1) == attributes
            right = named.all(dim=-1)[attributes[..., 0] > 0].float().mean().item()
            bar.set_postfix(loss=f"{loss.item():.3f}", right=f"{100 * right:.1f} %")
    print(
        f"vision: {100 * right:.1f} % of the patches that show a thing are named rightly after {VISION['steps']} steps",
        flush=True,
    )
    torch.save({"model": model.state_dict()}, path)


def publish(work: Path, weights: Path, out: Path) -> None:
    """Half precision weights, and beside them the command and the log of every stage."""
    out.parent.mkdir(parents=True, exist_ok=True)
    state = read_checkpoint(weights)["model"]
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()}, out)
    lines = [f"# python {' '.join(sys.argv)}"]
    for name in STAGES:
        lines += [f"# {name}", *(work / name / "log.txt").read_text().splitlines()]
        lines.append(json.dumps(json.loads((work / name / "result.json").read_text())))
    out.with_suffix(".log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = work / STAGES["whole"][0]
    (out.parent / "vocab.txt").write_text((data / "annotations" / "vocab.txt").read_text(), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
