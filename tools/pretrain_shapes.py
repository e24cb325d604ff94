"""Train the uncompressed Shapes model from nothing, by stages, each from the weights of the one before.

    python tools/pretrain_shapes.py --work output/pretrain --out pretrained/shapes/nlvr.safetensors

1 vision   the image encoder names what each patch shows and where it is, the class token counts, as BLIP's image encoder
           starts from a trained classifier
2 reading  the text encoder tells what either picture holds of a statement (how many, in which row), the image encoder frozen;
           of the ground it sees a random share, so that how much is shown says nothing (PatchDropout, Liu et al., 2023)
3 joint    both encoders together, on what is true alone, as they will be compressed

A stage that has left its weights is not run again. The logs are gathered beside the weights, with the accuracy on fresh test data.
"""

import argparse
import logging
import math
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import NlvrConfig  # noqa: E402
from data.nlvr import NlvrCollate  # noqa: E402
from data.shapes.search import FULL, PAIRS_PER_CHUNK, Level, make_chunk  # noqa: E402
from data.shapes.statements import evidence  # noqa: E402
from data.shapes.tasks import vocabulary  # noqa: E402
from data.shapes.world import COLOURS, LATTICE, SHAPES, SIZES, Scene, draw, random_scene  # noqa: E402
from data.text import load_tokenizer  # noqa: E402
from madtp.packing import pack  # noqa: E402
from models.blip_nlvr import BlipNlvr  # noqa: E402
from models.build import nlvr_from_config  # noqa: E402
from models.pretrained import read_checkpoint  # noqa: E402
from models.tower import class_tokens, halves  # noqa: E402
from options import load_config  # noqa: E402
from transform.images import eval_transform  # noqa: E402
from utils import UserError, run_main, seed_everything  # noqa: E402

CONFIG = ROOT / "configs/shapes/nlvr.yaml"
PATCH = 8  # px, in 12 x 12 patches, two to a cell of the world's lattice
SIDE = 2 * LATTICE
ATTRIBUTES = (SIZES, COLOURS, SHAPES)  # in the order of a Kind; named one by one, as words will name them
GROUND_WEIGHT = 0.1
PLACE_WEIGHT = 0.3  # of things alone; places are easy, and would drown what the patches show
LOOK = 2.0  # how sharply words look for their patches at first
EVIDENCE = 32  # counts and rows are smaller
EASIER_TOO = (Level(most=6), FULL)  # in turn: words are easier to tell apart where there is little to see
LOG_EVERY = 250


class Plan(NamedTuple):
    """How a stage is trained: steps, samples a step, learning rate at its height and steps until then."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200


VISION = Plan(steps=600, batch=32, rate=1e-3, warmup=100)
READING = Plan(steps=6_000, batch=8, rate=3e-4)
JOINT = Plan(steps=2_400, batch=8, rate=1.5e-4, warmup=100)
STATEMENTS = 12  # a pair; those that share one cost little more than a single one
TEST_SIZE = 4_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for data and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="the weights, .safetensors in half precision")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    words = args.work / "vocab.txt"
    words.write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[logging.StreamHandler(sys.stdout)])
    seed_everything(args.seed)
    config = load_config(NlvrConfig, CONFIG, {"p": 0.0, "tokenizer": words})
    model = nlvr_from_config(config, len(load_tokenizer(words)))
    for name, train in STAGES.items():
        weights = args.work / f"{name}.pth"
        if weights.exists():
            model.load_state_dict(read_checkpoint(weights)["model"])
        else:
            train(model, config, args.seed, args.work / f"{name}.log")
            torch.save({"model": model.state_dict()}, weights)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, args.out)
    test(args, words)
    lines = [f"# python {' '.join(sys.argv)}"]
    for log in (*(args.work / f"{name}.log" for name in STAGES), args.work / "test" / "result.json"):
        lines += [f"# {log.relative_to(args.work)}", *log.read_text().splitlines()]
    args.out.with_suffix(".log").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.out.parent / "vocab.txt").write_text(words.read_text(), encoding="utf-8")


def test(args: argparse.Namespace, words: Path) -> None:
    """Evaluates what was saved, on pairs that no stage has seen."""
    data = args.work / "data"
    command = ["tools/make_shapes.py", "--out", str(data), "--seed", str(args.seed + 1), "--tasks", "nlvr", "--size", "1000"]
    run([sys.executable, *command, "--statements-per-pair", "8", "--eval-size", str(TEST_SIZE)])
    command = ["compress_nlvr_dtp.py", "--config", str(CONFIG), "--p", "0", "--evaluate", "--output_dir", str(args.work / "test")]
    for key, value in {"image_root": data / "images", "ann_root": data / "annotations", "tokenizer": words}.items():
        command += ["--set", f"{key}={value}"]
    run([sys.executable, *command, "--pretrained", str(args.out)])


def run(command: list[str]) -> None:
    print("$ " + " ".join(["python", *command[1:]]), flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"{command[1]} failed; its message stands above; mend it and start again: finished stages are kept")


def fit(parameters: list[Tensor], plan: Plan, stream: Iterator, losses: Callable, log: Path) -> None:
    """The steps of a plan, the learning rate on a cosine. `losses` maps a batch to the loss and figures to log by name."""
    optimizer = torch.optim.AdamW(parameters, lr=plan.rate, weight_decay=0.05)
    lines = []
    for step, batch in enumerate(bar := tqdm(islice(stream, plan.steps), desc=log.stem, total=plan.steps, disable=None), 1):
        for group in optimizer.param_groups:
            group["lr"] = plan.rate * min(1, step / plan.warmup) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))
        loss, figures = losses(batch)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % LOG_EVERY == 0 or step == plan.steps:
            lines.append(f"{log.stem}, step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in figures.items()))
            logging.info(lines[-1])
            bar.set_postfix(loss=f"{loss.item():.3f}")
    log.write_text("\n".join(lines) + "\n")


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


def train_vision(model: BlipNlvr, config: NlvrConfig, seed: int, log: Path) -> None:
    """Stage 1. The text encoder stays random."""
    encoder = model.visual_encoder.train()
    words = word_directions(model, config.tokenizer)
    place = nn.Linear(encoder.embed_dim, 2 * SIDE)  # the row of a patch, its column
    counter = nn.Linear(encoder.embed_dim, sum(map(len, ATTRIBUTES)))  # of the class token: how many patches show each attribute
    rows = torch.arange(SIDE).repeat_interleave(SIDE).repeat(VISION.batch)
    columns = torch.arange(SIDE).repeat(SIDE * VISION.batch)

    def losses(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        images, attributes = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = encoder(images)[0]
            where, counts = place(tokens[:, 1:]).float(), counter(tokens[:, 0]).float()
        things = attributes[..., 0].flatten() > 0
        row, column = where.flatten(0, 1)[things].chunk(2, dim=-1)
        loss = PLACE_WEIGHT * (F.cross_entropy(row, rows[things]) + F.cross_entropy(column, columns[things]))
        shown = [F.one_hot(attributes[..., i], 1 + len(names))[..., 1:].sum(dim=1) for i, names in enumerate(ATTRIBUTES)]
        counting = F.mse_loss(counts, torch.cat(shown, dim=-1).float().sqrt())
        loss, right = loss + counting, torch.ones_like(things)
        for index, directions in enumerate(words):
            logits = tokens[:, 1:].float().flatten(0, 1) @ directions.t()
            said = attributes[..., index].flatten()[things] - 1
            loss = loss + F.binary_cross_entropy_with_logits(logits[things], F.one_hot(said, logits.shape[-1]).float())
            loss = loss + GROUND_WEIGHT * logits[~things].square().mean()  # between what fits a word and what does not
            right[things] &= logits[things].argmax(dim=-1) == said
        figures = {"named": right[things], "in their row": row.argmax(dim=-1) == rows[things], "counting": counting}
        return loss, {name: figure.detach().float().mean().item() for name, figure in figures.items()}

    stream = DataLoader(Pictures(seed, VISION.batch, config.image_size), batch_size=None, num_workers=1)
    parameters = [*encoder.parameters(), *place.parameters(), *counter.parameters()]
    fit(parameters, VISION, iter(stream), losses, log)


class Pairs(IterableDataset):
    """Endless fresh pairs with STATEMENTS each, a batch an item: NLVR2's batch, "evidence" (S, 2) of left and right, and
    "shown" (2 B, 1 + N), left first: which tokens are read, the class token, all things and a share of the ground."""

    def __init__(self, seed: int, config: NlvrConfig, plan: Plan, levels: Sequence[Level]):
        self.seed, self.plan, self.levels, self.transform = seed, plan, levels, eval_transform(config.image_size)
        self.collate = NlvrCollate(load_tokenizer(config.tokenizer), config.bert_sizes.max_position_embeddings)

    def __iter__(self) -> Iterator[dict]:
        for number in count():
            rng = np.random.default_rng((self.seed, self.plan.steps, number))
            chunk = make_chunk(rng, PAIRS_PER_CHUNK, STATEMENTS + 2, self.levels[number % len(self.levels)])
            pairs = [pair for pair in chunk if len(pair[2]) >= STATEMENTS]
            for start in range(0, len(pairs) - self.plan.batch, self.plan.batch):
                yield self.batch_of(rng, pairs[start : start + self.plan.batch])

    def batch_of(self, rng: np.random.Generator, pairs: list[tuple[Scene, Scene, list]]) -> dict:
        items, found, things = [], [], ([], [])
        for left, right, told in pairs:
            told = told[:STATEMENTS]
            found += [evidence(statement, left, right) for statement, _ in told]
            images = {side: self.transform(draw(rng, scene)) for side, scene in (("left", left), ("right", right))}
            sentences, labels = [statement.text() for statement, _ in told], [int(label) for _, label in told]
            items.append({**images, "sentences": sentences, "labels": labels, "ids": labels})
            for side, scene in zip(things, (left, right), strict=True):
                side.append(patch_attributes(scene)[:, 0] > 0)
        things = torch.stack([*things[0], *things[1]])
        ground = torch.from_numpy(rng.random(things.shape) < rng.random((len(things), 1)))
        shown = F.pad(things | ground, (1, 0), value=True)
        return {**self.collate(items), "evidence": torch.tensor(found).long(), "shown": shown}


def train_reading(model: BlipNlvr, config: NlvrConfig, seed: int, log: Path) -> None:
    """Stage 2. What either picture holds is plain to learn, and what is true follows from it; truth alone is a long plateau."""
    model.train().visual_encoder.requires_grad_(False)
    look_for_words(model)
    evidence_head = nn.Linear(model.text_encoder.hidden_size, 2 * EVIDENCE)

    def losses(batch: dict) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                tokens, _, _ = model.visual_encoder(batch["images"].transpose(0, 1).flatten(0, 1))
            images = halves(*pack(tokens, batch["shown"]))
            text, layout, _ = model.text_encoder(batch["input_ids"], batch["attention_mask"], images, packed=True)
            told = class_tokens(text, layout)
            found = evidence_head(told).float().unflatten(-1, (2, EVIDENCE))
            logits = model.cls_head(told).float()
        reading = F.cross_entropy(found.flatten(0, 1), batch["evidence"].flatten())
        loss = 2 * reading + F.cross_entropy(logits, batch["targets"])
        right = (found.argmax(dim=-1) == batch["evidence"]).float().mean().item()
        true = (logits.argmax(dim=-1) == batch["targets"]).float().mean().item()
        return loss, {"reading": reading.item(), "read rightly": right, "judged rightly": true}

    stream = DataLoader(Pairs(seed, config, READING, EASIER_TOO), batch_size=None, num_workers=1)
    parameters = [p for p in [*model.parameters(), *evidence_head.parameters()] if p.requires_grad]
    fit(parameters, READING, iter(stream), losses, log)
    model.visual_encoder.requires_grad_(True)


def train_joint(model: BlipNlvr, config: NlvrConfig, seed: int, log: Path) -> None:
    """Stage 3."""
    model.train()

    def losses(batch: dict) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch["images"], batch["input_ids"], batch["attention_mask"], packed=True)
        loss = F.cross_entropy(output.logits.float(), batch["targets"])
        true = (output.logits.argmax(dim=-1) == batch["targets"]).float().mean().item()
        return loss, {"loss": loss.item(), "judged rightly": true}

    stream = DataLoader(Pairs(seed, config, JOINT, (FULL,)), batch_size=None, num_workers=1)
    fit(list(model.parameters()), JOINT, iter(stream), losses, log)


STAGES = {"vision": train_vision, "reading": train_reading, "joint": train_joint}


def word_directions(model: BlipNlvr, vocabulary: Path) -> list[Tensor]:
    """Of each attribute, the unit vectors of its words' embeddings, (words, C).

    Patches are to lie in the direction of the words that name them. So the encoders are aligned before they meet, as BLIP's are.
    """
    tokenizer = load_tokenizer(vocabulary)
    embeddings = model.text_encoder.embeddings.word_embeddings.weight.detach()
    return [F.normalize(embeddings[tokenizer.convert_tokens_to_ids(list(names))], dim=-1) for names in ATTRIBUTES]


@torch.no_grad()
def look_for_words(model: BlipNlvr) -> None:
    """Keys of the cross-attentions start as their queries: a word then looks at the patches that lie in its direction."""
    for layer in model.text_encoder.encoder.layer:
        for heads in (layer.crossattention.self0, layer.crossattention.self1):
            heads.key.weight.copy_(LOOK * heads.query.weight)


if __name__ == "__main__":
    run_main(main)
