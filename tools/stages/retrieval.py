"""The training stage `pairs` of the uncompressed Shapes models for retrieval. BLIP's starts from the NLVR2 model."""

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
FAMILIES = 8  # per batch; siblings are the most useful negatives


class Families(IterableDataset):
    """An endless stream of batches of new families with a caption per picture: the entries of PairCollate and of draw_shown."""

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
    """Trains the model on the contrastive loss and, if it has a matching head, the matching loss.

    Heads on the class token of every image block must name the things. Momentum encoders and queues are not used: every batch is
    new, and siblings are harder negatives than a queue would hold.
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
    """Returns the same as `encode_image`, with only the tokens batch["shown"] in the image encoder."""
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
