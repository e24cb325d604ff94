"""Shared code of the training stages: the optimizer loop, streams of labelled pictures, and the first stage of image encoders."""

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm

from data.shapes.world import COLOURS, LATTICE, SHAPES, SIZES, Scene, draw, random_scene
from madtp.blocks import UNPRUNED, Guidance, TowerRecord, run_blocks
from madtp.packing import Packed, class_tokens, pack
from models.vit import VisionTransformer
from models.weights.reading import read_checkpoint
from transform.images import ImageTransform, eval_transform


class Plan(NamedTuple):
    """The training plan of a stage: steps, samples per step, peak learning rate and warm-up steps."""

    steps: int
    batch: int
    rate: float
    warmup: int = 200


PATCH = 8  # px; a picture has 12 x 12 patches, and each cell of the world's lattice 2 x 2
SIDE = 2 * LATTICE
ATTRIBUTES = (SIZES, COLOURS, SHAPES)  # in the order of a Kind; each is predicted separately, because words name them separately
GROUND_WEIGHT = 0.1
PLACE_WEIGHT = 0.3  # of the position loss, on patches of things only; low, because positions are easy and would dominate
LOG_EVERY = 100
NLVR = Path(__file__).resolve().parents[2] / "pretrained/shapes/nlvr.safetensors"
VISION = Plan(steps=600, batch=32, rate=1e-3, warmup=100)
RETRIEVAL_DATA = ["--tasks", "retrieval", "--size", "1000", "--eval-size", "1000"]
SINGLES = ["--size", "500", "--eval-size", "1000", "--val-size", "500"]
PACKED = Guidance(packed=True)
THIN = 1.5  # higher shows fewer background patches


@dataclass
class Recipe:
    """The training recipe of a task: its uncompressed model, its stages by name, and make_shapes options for its test data.

    A stage is called with a seed and the path of its log.
    """

    model: nn.Module
    stages: dict[str, Callable[[int, Path], None]]
    data: list[str]


def nlvr_weights() -> dict[str, Tensor]:
    """Reads the weights of the published Shapes model for NLVR2."""
    return read_checkpoint(NLVR)["model"]


def fit(parameters: list[Tensor], plan: Plan, stream: Iterator, losses: Callable, log: Path) -> None:
    """Trains for the steps of a plan with a cosine learning rate. `losses` maps a batch to the loss and a dict of values to log."""
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
    """Returns the size, colour and shape in each patch, (SIDE * SIDE, 3): 0 is background, else 1 + the index in ATTRIBUTES."""
    attributes = torch.zeros(SIDE, SIDE, 3, dtype=torch.long)
    for thing in scene:
        row, column = 2 * thing.row, 2 * thing.column
        value = torch.tensor([1 + names.index(name) for names, name in zip(ATTRIBUTES, thing.kind, strict=True)])
        if thing.kind.size == "large":
            attributes[row : row + 2, column : column + 2] = value
        else:  # positions in a scene are in quarter pixels
            attributes[thing.y // (4 * PATCH), thing.x // (4 * PATCH)] = value
    return attributes.flatten(0, 1)


class Pictures(IterableDataset):
    """An endless stream of batches of new pictures: images (B, 3, H, W) and the attributes of their patches (B, N, 3)."""

    def __init__(self, seed: int, batch: int, image_size: int):
        self.seed, self.batch, self.transform = seed, batch, eval_transform(image_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in count(0, self.batch):
            streams = [np.random.default_rng((self.seed, start + i)) for i in range(self.batch)]
            scenes = [random_scene(rng) for rng in streams]
            images = [self.transform(draw(rng, scene)) for rng, scene in zip(streams, scenes, strict=True)]
            yield torch.stack(images), torch.stack([patch_attributes(scene) for scene in scenes])


def train_vision(
    encoder: nn.Module,
    tokens_of: Callable[[Tensor], Tensor],
    words: list[Tensor],
    image_size: int,
    plan: Plan,
    seed: int,
    log: Path,
) -> None:
    """Trains an image encoder to predict the attributes and position of each patch, and to count with the class token.

    Args:
        encoder: the image encoder.
        tokens_of: images (B, 3, H, W) -> the encoder's tokens (B, 1 + N, C).
        words: for each attribute, target directions (words, C) for the tokens of patches (see `word_directions`).
        image_size: pixels along one side.
        plan: the training plan.
        seed: of the pictures.
        log: the file for the log.
    """
    encoder.train()
    width = words[0].shape[1]
    place = nn.Linear(width, 2 * SIDE)  # patch token -> logits of its row and of its column
    counter = nn.Linear(width, sum(map(len, ATTRIBUTES)))  # class token -> root of the number of patches with each attribute
    rows = torch.arange(SIDE).repeat_interleave(SIDE).repeat(plan.batch)
    columns = torch.arange(SIDE).repeat(SIDE * plan.batch)

    def losses(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, float]]:
        images, attributes = batch
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens = tokens_of(images)
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
            loss = loss + GROUND_WEIGHT * logits[~things].square().mean()  # background logits near 0: between match and no match
            right[things] &= logits[things].argmax(dim=-1) == said
        figures = {"named": right[things], "in their row": row.argmax(dim=-1) == rows[things], "counting": counting}
        return loss, {name: figure.detach().float().mean().item() for name, figure in figures.items()}

    stream = DataLoader(Pictures(seed, plan.batch, image_size), batch_size=None, num_workers=1)
    parameters = [*encoder.parameters(), *place.parameters(), *counter.parameters()]
    fit(parameters, plan, iter(stream), losses, log)


def word_directions(embeddings: Tensor, ids_of: Callable[[list[str]], list[int]]) -> list[Tensor]:
    """Returns the unit vectors of the embeddings of each attribute's words, (words, C).

    They are the target directions for the tokens of patches that the words name. This aligns the image encoder with the text
    encoder before they are trained together, as in BLIP.
    """
    return [F.normalize(embeddings.detach()[ids_of(list(names))], dim=-1) for names in ATTRIBUTES]


def shown_patches(rng: np.random.Generator, attributes: Tensor, thin: float = 1.0) -> Tensor:
    """Draws the tokens to show, (B, 1 + N) bool: the class token, all patches with things and a share of the background patches.

    The share is u ** `thin`, with u random in 0 to 1 for each picture.

    Args:
        rng: the random generator.
        attributes: (B, N, 3) from `patch_attributes`.
        thin: higher shows fewer background patches.
    """
    things = attributes[..., 0] > 0
    ground = torch.from_numpy(rng.random(things.shape) < rng.random((len(things), 1)) ** thin)
    return F.pad(things | ground, (1, 0), value=True)


def draw_shown(rng: np.random.Generator, scenes: list[Scene], transform: ImageTransform) -> dict[str, Tensor]:
    """Draws scenes. Returns images (B, 3, H, W), attributes (B, N, 3) and shown (B, 1 + N), from `shown_patches` with THIN."""
    attributes = torch.stack([patch_attributes(scene) for scene in scenes])
    images = torch.stack([transform(draw(rng, scene)) for scene in scenes])
    return {"images": images, "attributes": attributes, "shown": shown_patches(rng, attributes, THIN)}


def encode_shown(encoder: VisionTransformer, images: Tensor, shown: Tensor) -> tuple[Tensor, Packed, TowerRecord]:
    """Encodes images (B, 3, H, W) with only the tokens `shown` (B, 1 + N). Returns packed tokens, their layout and the record."""
    x = encoder.patch_embed(images)
    x = torch.cat([encoder.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1) + encoder.pos_embed
    x, layout, record = run_blocks(encoder.blocks, *pack(x, shown), UNPRUNED)
    return encoder.norm(x), layout, record


class ClassContent(nn.Module):
    """Heads that predict, from the class token of every block, the share of thing patches with each attribute.

    They make the class token attend to the things, so that its attention is useful for pruning.
    """

    def __init__(self, blocks: nn.ModuleList, width: int):
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(width, sum(map(len, ATTRIBUTES))) for _ in blocks)
        self._told: list[Tensor] = []
        self._hooks = [block.register_forward_hook(self._listen) for block in blocks]

    def _listen(self, block: nn.Module, inputs: tuple, outputs: tuple) -> None:
        self._told.append(class_tokens(outputs[0], outputs[1]))

    def loss(self, attributes: Tensor) -> Tensor:
        """Returns the loss of the last forward pass: the Kullback-Leibler divergence, averaged over blocks. attributes (B, N, 3)"""
        told, self._told = [F.layer_norm(token, token.shape[-1:]) for token in self._told], []
        shares = [F.one_hot(attributes[..., i], 1 + len(names))[..., 1:].sum(dim=1).float() for i, names in enumerate(ATTRIBUTES)]
        total = 0.0
        for head, token in zip(self.heads, told, strict=True):
            for logits, share in zip(head(token).float().split([part.shape[1] for part in shares], dim=-1), shares, strict=True):
                target = share / share.sum(dim=1, keepdim=True)
                total = total + F.kl_div(F.log_softmax(logits, dim=-1), target, reduction="batchmean")
        return total / len(told)

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()


def start_from_nlvr(model: nn.Module, weights: dict[str, Tensor], text: str = "text_encoder") -> None:
    """Loads the weights of both encoders of an NLVR2 model into `model`.

    NLVR2's text layers have two cross-attentions; the one to the left image is used.

    Args:
        model: the model of another task.
        weights: the weights of the NLVR2 model.
        text: the part of `model` that gets the weights of the text encoder.
    """
    translated = {}
    for name, tensor in weights.items():
        name = name.replace("text_encoder.", f"{text}.").replace("crossattention.self0.", "crossattention.self.")
        translated[name.replace("crossattention.output.dense0.", "crossattention.output.dense.")] = tensor.float()
    expected = model.state_dict()
    found = {name: tensor for name, tensor in translated.items() if name in expected and expected[name].shape == tensor.shape}
    logging.info("%d of %d weights come from the model for NLVR2", len(found), len(expected))
    model.load_state_dict(found, strict=False)
