"""The training stage of the uncompressed Shapes model for captioning, which starts from the NLVR2 model."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from configs.schema import CaptionConfig
from data.shapes.tasks import caption
from data.shapes.world import random_scene
from data.text import dec_token_id, encode
from madtp.packing import padded
from models.blip_caption import BlipCaption
from tasks.registry import build_model
from tools.stages.common import SINGLES, ClassContent, Plan, Recipe, draw_shown, encode_shown, fit, nlvr_weights, start_from_nlvr
from transform.images import eval_transform

PLAN = Plan(steps=1_000, batch=16, rate=5e-4, warmup=100)
CAPTIONS = 2  # per picture; its captions differ little


class Captions(IterableDataset):
    """An endless stream of batches of new pictures with CAPTIONS captions each.

    A batch is a dict with the entries of draw_shown, and input_ids and attention_mask (S, L): the captions, with the prompt in
    front, in the order of the pictures.
    """

    def __init__(self, seed: int, config: CaptionConfig, tokenizer: PreTrainedTokenizerBase, plan: Plan):
        self.seed, self.config, self.plan, self.tokenizer = seed, config, plan, tokenizer
        self.transform = eval_transform(config.image_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in count():
            rng = np.random.default_rng((self.seed, self.plan.steps, number))
            scenes = [random_scene(rng) for _ in range(self.plan.batch)]
            captions = [self.config.prompt + caption(rng, scene) for scene in scenes for _ in range(CAPTIONS)]
            text = encode(self.tokenizer, captions, self.config.max_text_tokens, dec_token_id(self.tokenizer))
            yield {**draw_shown(rng, scenes, self.transform), **text}


def train_captions(
    model: BlipCaption, config: CaptionConfig, tokenizer: PreTrainedTokenizerBase, plan: Plan, seed: int, log: Path
) -> None:
    """Trains the model to write captions, while heads on the class token of every block must name the things."""
    model.train()
    content = ClassContent(model.visual_encoder.blocks, model.visual_encoder.embed_dim)

    def losses(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            tokens, layout, _ = encode_shown(model.visual_encoder, batch["images"], batch["shown"])
            told = content.loss(batch["attributes"])
            image = [part.repeat_interleave(CAPTIONS, dim=0) for part in (padded(tokens, layout)[0], layout.valid)]
            output = model.decode(*image, ids, mask)
        counted = mask[:, len(model.prompt) :].bool()
        found = output.logits[:, len(model.prompt) - 1 : -1].argmax(dim=-1) == ids[:, len(model.prompt) :]
        figures = {"loss": output.loss.item(), "next word right": found[counted].float().mean().item(), "content": told.item()}
        return output.loss + told, figures

    stream = DataLoader(Captions(seed, config, tokenizer, plan), batch_size=None, num_workers=1)
    fit([*model.parameters(), *content.parameters()], plan, iter(stream), losses, log)
    content.remove()


def recipe(config: CaptionConfig) -> Recipe:
    model, tokenizer = build_model(config)
    start_from_nlvr(model, nlvr_weights(), text="text_decoder.bert")
    stages = {"captions": lambda seed, log: train_captions(model, config, tokenizer, PLAN, seed, log)}
    return Recipe(model, stages, ["--tasks", "caption", *SINGLES])
