"""The training stage of the uncompressed Shapes model for VQA, which starts from the encoders of the NLVR2 model."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedTokenizerBase

from configs.schema import VqaConfig
from data.shapes.tasks import ask
from data.shapes.world import random_scene
from data.text import enc_token_id, encode
from data.vqa import MAX_TOKENS, encode_answers
from models.blip_vqa import BlipVqa
from tasks.registry import build_model
from tools.stages.common import (
    PACKED,
    SINGLES,
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

PLAN = Plan(steps=500, batch=16, rate=4e-4, warmup=50)
QUESTIONS = 12  # per picture


class Questions(IterableDataset):
    """An endless stream of batches of new pictures with QUESTIONS questions each.

    A batch is a dict with the entries of draw_shown, and question_ids and question_mask (S, L), answer_ids and answer_mask
    (S, M), in the order of the pictures.
    """

    def __init__(self, seed: int, config: VqaConfig, tokenizer: PreTrainedTokenizerBase, plan: Plan):
        self.seed, self.plan, self.tokenizer = seed, plan, tokenizer
        self.transform = eval_transform(config.image_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for number in count():
            rng = np.random.default_rng((self.seed, self.plan.steps, number))
            scenes = [random_scene(rng) for _ in range(self.plan.batch)]
            _, questions, answers = zip(*(ask(rng, scene) for scene in scenes for _ in range(QUESTIONS)), strict=True)
            asked = encode(self.tokenizer, list(questions), MAX_TOKENS, enc_token_id(self.tokenizer))
            answered = encode_answers(self.tokenizer, list(answers))
            yield {
                **draw_shown(rng, scenes, self.transform),
                "question_ids": asked["input_ids"],
                "question_mask": asked["attention_mask"],
                "answer_ids": answered["input_ids"],
                "answer_mask": answered["attention_mask"],
            }


def train_answers(model: BlipVqa, config: VqaConfig, tokenizer: PreTrainedTokenizerBase, plan: Plan, seed: int, log: Path) -> None:
    """Trains the model to answer questions, while heads on the class token of every block must name the things."""
    model.train()
    content = ClassContent(model.visual_encoder.blocks, model.visual_encoder.embed_dim)

    def losses(batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        answers, mask = batch["answer_ids"], batch["answer_mask"]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            seen = encode_shown(model.visual_encoder, batch["images"], batch["shown"])
            told = content.loss(batch["attributes"])
            question = model.encode_question(seen, batch["question_ids"], batch["question_mask"], PACKED)
            each, logits = model.answer(question, answers, mask, torch.ones_like(answers[:, 0]))
        loss = each.mean()
        right = (logits[:, 0].argmax(dim=-1) == answers[:, 1]).float().mean().item()
        return loss + told, {"loss": loss.item(), "answered rightly": right, "content": told.item()}

    stream = DataLoader(Questions(seed, config, tokenizer, plan), batch_size=None, num_workers=1)
    fit([*model.parameters(), *content.parameters()], plan, iter(stream), losses, log)
    content.remove()


def recipe(config: VqaConfig) -> Recipe:
    model, tokenizer = build_model(config)
    start_from_nlvr(model, nlvr_weights())
    stages = {"answers": lambda seed, log: train_answers(model, config, tokenizer, PLAN, seed, log)}
    return Recipe(model, stages, ["--tasks", "vqa", *SINGLES])
