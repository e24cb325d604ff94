"""The training stages of the uncompressed Shapes model for NLVR2."""

from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from configs.schema import NlvrConfig
from data.nlvr import NlvrCollate
from data.shapes.search import FULL, PAIRS_PER_CHUNK, Level, make_chunk
from data.shapes.statements import evidence
from data.shapes.world import Scene, draw
from data.text import load_tokenizer
from madtp.packing import class_tokens, halves, pack
from models.blip_nlvr import BlipNlvr
from tasks.registry import build_model
from tools.stages.common import (
    PACKED,
    THIN,
    VISION,
    ClassContent,
    Plan,
    Recipe,
    encode_shown,
    fit,
    patch_attributes,
    shown_patches,
    train_vision,
    word_directions,
)
from transform.images import eval_transform

READING = Plan(steps=6_000, batch=8, rate=3e-4)
JOINT = Plan(steps=2_400, batch=8, rate=1.5e-4, warmup=100)
SPARSE = Plan(steps=2_400, batch=8, rate=2e-4, warmup=100)
LOOK = 2.0  # initial sharpness of the attention from words to patches
EVIDENCE = 32  # number of classes of evidence; counts and rows are smaller
EASIER_TOO = (Level(most=6), FULL)  # levels in turn; the meaning of words is easier to learn with few things in the picture
STATEMENTS = 12  # per pair; they share the encoded images, so they cost little more than a single one


class Pairs(IterableDataset):
    """An endless stream of batches of new pairs with STATEMENTS statements each.

    A batch is that of NlvrCollate, and
    evidence (S, 2): in the left and right picture
    attributes (2 B, N, 3): from patch_attributes, left pictures first
    shown (2 B, 1 + N): from shown_patches
    """

    def __init__(self, seed: int, config: NlvrConfig, plan: Plan, levels: Sequence[Level], thin: float = 1.0):
        self.seed, self.plan, self.levels, self.thin = seed, plan, levels, thin
        self.transform = eval_transform(config.image_size)
        self.collate = NlvrCollate(load_tokenizer(config.tokenizer), config.bert_sizes.max_position_embeddings)

    def __iter__(self) -> Iterator[dict]:
        for number in count():
            rng = np.random.default_rng((self.seed, self.plan.steps, number))
            chunk = make_chunk(rng, PAIRS_PER_CHUNK, STATEMENTS + 2, self.levels[number % len(self.levels)])
            pairs = [pair for pair in chunk if len(pair[2]) >= STATEMENTS]
            for start in range(0, len(pairs) - self.plan.batch, self.plan.batch):
                yield self.batch_of(rng, pairs[start : start + self.plan.batch])

    def batch_of(self, rng: np.random.Generator, pairs: list[tuple[Scene, Scene, list]]) -> dict:
        items, found = [], []
        for left, right, told in pairs:
            told = told[:STATEMENTS]
            found += [evidence(statement, left, right) for statement, _ in told]
            images = {side: self.transform(draw(rng, scene)) for side, scene in (("left", left), ("right", right))}
            sentences, labels = [statement.text() for statement, _ in told], [int(label) for _, label in told]
            items.append({**images, "sentences": sentences, "labels": labels, "ids": labels})
        attributes = torch.stack([patch_attributes(pair[side]) for side in (0, 1) for pair in pairs])
        shown = shown_patches(rng, attributes, self.thin)
        return {**self.collate(items), "evidence": torch.tensor(found).long(), "attributes": attributes, "shown": shown}


def train_reading(model: BlipNlvr, config: NlvrConfig, plan: Plan, seed: int, log: Path) -> None:
    """Trains the text encoder to predict the evidence in each picture and the truth of the statement.

    Evidence is easy to learn, and the truth follows from it. With the truth alone, the loss stays on a plateau for long.
    """
    model.train().visual_encoder.requires_grad_(False)
    look_for_words(model)
    evidence_head = nn.Linear(model.text_encoder.hidden_size, 2 * EVIDENCE)

    def losses(batch: dict) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            with torch.no_grad():
                tokens, _, _ = model.visual_encoder(batch["images"].transpose(0, 1).flatten(0, 1))
            images = halves(*pack(tokens, batch["shown"]))
            text, layout, _ = model.text_encoder(batch["input_ids"], batch["attention_mask"], images, PACKED)
            told = class_tokens(text, layout)
            found = evidence_head(told).float().unflatten(-1, (2, EVIDENCE))
            logits = model.cls_head(told).float()
        reading = F.cross_entropy(found.flatten(0, 1), batch["evidence"].flatten())
        loss = 2 * reading + F.cross_entropy(logits, batch["targets"])
        right = (found.argmax(dim=-1) == batch["evidence"]).float().mean().item()
        true = (logits.argmax(dim=-1) == batch["targets"]).float().mean().item()
        return loss, {"reading": reading.item(), "read rightly": right, "judged rightly": true}

    stream = DataLoader(Pairs(seed, config, plan, EASIER_TOO), batch_size=None, num_workers=1)
    parameters = [p for p in [*model.parameters(), *evidence_head.parameters()] if p.requires_grad]
    fit(parameters, plan, iter(stream), losses, log)
    model.visual_encoder.requires_grad_(True)


def train_joint(model: BlipNlvr, config: NlvrConfig, plan: Plan, seed: int, log: Path) -> None:
    """Trains both encoders together, on the truth of the statements only."""
    model.train()

    def losses(batch: dict) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(batch["images"], batch["input_ids"], batch["attention_mask"], PACKED)
        loss = F.cross_entropy(output.logits.float(), batch["targets"])
        true = (output.logits.argmax(dim=-1) == batch["targets"]).float().mean().item()
        return loss, {"loss": loss.item(), "judged rightly": true}

    stream = DataLoader(Pairs(seed, config, plan, (FULL,)), batch_size=None, num_workers=1)
    fit(list(model.parameters()), plan, iter(stream), losses, log)


def train_sparse(model: BlipNlvr, config: NlvrConfig, plan: Plan, seed: int, log: Path) -> None:
    """Trains both encoders with a random, often small share of the background patches, and with heads on the class tokens.

    Answers then do not depend on the amount of background, and class attention finds the things.
    """
    model.train()
    content = ClassContent(model.visual_encoder.blocks, model.visual_encoder.embed_dim)

    def losses(batch: dict) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens, layout, _ = encode_shown(model.visual_encoder, batch["images"].transpose(0, 1).flatten(0, 1), batch["shown"])
            images = halves(tokens, layout)
            text, layout, _ = model.text_encoder(batch["input_ids"], batch["attention_mask"], images, PACKED)
            logits = model.cls_head(class_tokens(text, layout)).float()
            told = content.loss(batch["attributes"])
        loss = F.cross_entropy(logits, batch["targets"])
        true = (logits.argmax(dim=-1) == batch["targets"]).float().mean().item()
        return loss + told, {"loss": loss.item(), "judged rightly": true, "content": told.item()}

    stream = DataLoader(Pairs(seed, config, plan, (FULL,), thin=THIN), batch_size=None, num_workers=1)
    fit([*model.parameters(), *content.parameters()], plan, iter(stream), losses, log)
    content.remove()


@torch.no_grad()
def look_for_words(model: BlipNlvr) -> None:
    """Initialises the key weights of the cross-attentions with their query weights.

    A word then attends to patches whose tokens lie in the direction of its embedding.
    """
    for layer in model.text_encoder.encoder.layer:
        for heads in (layer.crossattention.self0, layer.crossattention.self1):
            heads.key.weight.copy_(LOOK * heads.query.weight)


def recipe(config: NlvrConfig) -> Recipe:
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
