"""The stages of the uncompressed Shapes models for retrieval: BLIP's starts from the one for NLVR2, CLIP's from nothing."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from configs.schema import RetrievalConfig
from data.captions import PairCollate
from data.shapes.families import distinctive_caption, draw_family
from data.text import Tokenizer
from madtp.blocks import Encoded
from madtp.packing import class_tokens, pack, select
from models.clip_retrieval import ClipRetrieval
from models.momentum import MomentumModel, hard_negatives
from tasks.registry import build_model
from tools.stages.common import (
    PACKED,
    RETRIEVAL_DATA,
    ClassContent,
    Plan,
    Recipe,
    draw_shown,
    encode_shown,
    fit,
    nlvr_weights,
    start_from_nlvr,
)
from transform.images import eval_transform

PAIRS = Plan(steps=1_500, batch=0, rate=3e-4)
FAMILIES = 8  # a batch: siblings are the negatives that teach most


class Families(IterableDataset):
    """Endless fresh families with a caption a picture, a batch an item: as of PairCollate, and of draw_shown."""

    def __init__(self, seed: int, config: RetrievalConfig, tokenizer: Tokenizer):
        self.seed, self.transform = seed, eval_transform(config.image_size)
        self.collate = PairCollate(tokenizer, config.max_text_tokens)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in count():
            rng = np.random.default_rng((self.seed, number))
            families = [draw_family(rng) for _ in range(FAMILIES)]
            captions = [
                distinctive_caption(rng, scene, [sibling for sibling in family if sibling is not scene])
                for family in families
                for scene in family
            ]
            shown = draw_shown(rng, list(chain.from_iterable(families)), self.transform)
            items = [
                {"image": image, "caption": caption, "image_id": place}
                for place, (image, caption) in enumerate(zip(shown["images"], captions, strict=True))
            ]
            yield {**shown, **self.collate(items)}


def train_pairs(model: MomentumModel, config: RetrievalConfig, tokenizer: Tokenizer, plan: Plan, seed: int, log: Path) -> None:
    """Images and texts of a batch find each other, by their features and, where the model has it, by the matching head, while the
    image's class token tells after every block what the things are.

    Without momentum encoders and queues: batches are fresh, and siblings are harder than what a queue holds.
    """
    model.train()
    matching = hasattr(model, "match")
    width = model.visual.conv1.out_channels if isinstance(model, ClipRetrieval) else model.visual_encoder.embed_dim
    content = ClassContent(model.branches["vision"], width)

    def losses(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        model.limit_contrastive_temperature()
        text, own = (batch["input_ids"], batch["attention_mask"]), batch["image_ids"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            image, words = encode_shown_images(model, batch), model.encode_text(*text, PACKED)
            told = content.loss(batch["attributes"])
        similarities = image.feature @ words.feature.t() / model.contrastive_temperature
        loss = (F.cross_entropy(similarities, own) + F.cross_entropy(similarities.t(), own)) / 2
        figures = {"contrastive": loss.item(), "first": (similarities.argmax(dim=1) == own).float().mean().item()}
        if matching:
            others = hard_negatives(image.feature, words.feature, own, own, model.contrastive_temperature)
            others_images = hard_negatives(words.feature, image.feature, own, own, model.contrastive_temperature)
            picked = torch.cat([own, own, others_images])
            three = [torch.cat([part, part[others], part]) for part in text]
            with torch.autocast("cpu", dtype=torch.bfloat16):
                logits, _ = model.match(*three, select(image.tokens, image.layout, picked))
            targets = (torch.arange(len(picked)) < len(own)).long()
            match = F.cross_entropy(logits.float(), targets)
            loss = loss + match
            figures |= {"matching": match.item(), "matched rightly": (logits.argmax(dim=1) == targets).float().mean().item()}
        return loss + told, {**figures, "content": told.item()}

    stream = DataLoader(Families(seed, config, tokenizer), batch_size=None, num_workers=1)
    online = [parameter for parameter in model.parameters() if parameter.requires_grad]
    fit([*online, *content.parameters()], plan, iter(stream), losses, log)
    content.remove()


def encode_shown_images(model: MomentumModel, batch: dict[str, Tensor]) -> Encoded:
    """What `encode_image` gives when the image encoder sees the tokens that are shown alone."""
    images, shown = batch["images"], batch["shown"]
    if isinstance(model, ClipRetrieval):
        encoded = model.visual.encode(*pack(model.visual.embed(images), shown))
        return replace(encoded, feature=F.normalize(encoded.feature.float(), dim=-1))
    tokens, layout, record = encode_shown(model.visual_encoder, images, shown)
    feature = model.vision_proj(class_tokens(tokens, layout))
    return Encoded(tokens, layout, F.normalize(feature.float(), dim=-1), record)


def recipe(config: RetrievalConfig) -> Recipe:
    model, tokenizer = build_model(config)
    start_from_nlvr(model, nlvr_weights())
    stages = {"pairs": lambda seed, log: train_pairs(model, config, tokenizer, PAIRS, seed, log)}
    return Recipe(model, stages, RETRIEVAL_DATA)
