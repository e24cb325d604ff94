"""What the models with a decoder say: captions and answers as texts, and what they cost in use.

Shapes: B samples.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from configs.schema import CaptionConfig, VqaConfig
from data.text import as_texts, prompt_ids
from data.vqa import encode_answers, read_answer_list
from engine.train import move
from madtp.pruning import PruneSetting
from models.blip_caption import BlipCaption
from models.blip_vqa import BlipVqa, Question
from madtp.blocks import TowerRecord


class Captioner:
    def __init__(self, config: CaptionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.prompt = prompt_ids(tokenizer, config.prompt)

    def __call__(self, model: BlipCaption, images: Tensor, setting: PruneSetting) -> tuple[list[str], TowerRecord, Tensor]:
        """Captions of images (B, 3, H, W) without their prompt, the image encoder's record, and (B,) GFLOPs of all that."""
        texts, record, cost = self.write(model, images, setting)
        return texts, record, cost(record, setting)

    def write(
        self, model: BlipCaption, images: Tensor, setting: PruneSetting
    ) -> tuple[list[str], TowerRecord, Callable[[TowerRecord, PruneSetting], Tensor]]:
        """As a call; and what GFLOPs, (B,), the same captions cost with a record and a setting."""
        writing = self.config.writing
        ids, record = model.generate(images, setting, self.config.packed, **writing)
        texts = as_texts(self.tokenizer, ids[:, len(self.prompt) :])
        return texts, record, lambda record, setting: model.generation_gflops(record, ids, writing["num_beams"], setting)


class Answerer:
    """Ranks the answer list or writes freely, as the config says.

    Raises:
        UserError: when the answer list cannot be read.
    """

    def __init__(self, config: VqaConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.candidates, self.choices = [], {}
        if config.inference == "rank":
            self.candidates = read_answer_list(config)
            self.choices = move(encode_answers(tokenizer, self.candidates, config.bert_sizes.max_position_embeddings), device)

    def __call__(self, model: BlipVqa, batch: dict, setting: PruneSetting) -> tuple[list[str], Question, Tensor]:
        """The answers to a batch of `QuestionCollate`, what the encoders read, and (B,) GFLOPs of all that."""
        question = self.read(model, batch, setting)
        answers, cost = self.answer(model, question)
        texts = [best["answer"] for best, *_ in answers]
        return texts, question, model.reading_gflops(question, setting) + cost(question.valid.sum(dim=1))

    def read(self, model: BlipVqa, batch: dict, setting: PruneSetting) -> Question:
        packed = self.config.packed
        return model.read(batch["images"], batch["question_ids"], batch["question_mask"], setting, packed=packed)

    def answer(self, model: BlipVqa, question: Question, number: int = 1) -> tuple[list[list[dict]], Callable[[Tensor], Tensor]]:
        """Of each question the `number` best answers as {"answer", "score", its likelihood}, one without a score where it writes
        freely; and what GFLOPs, (B,), that costs questions of given lengths (B,)."""
        if self.config.inference == "generate":
            ids, _ = model.generate(question, self.config.num_beams)
            texts = as_texts(self.tokenizer, ids)
            return [[{"answer": text}] for text in texts], partial(model.writing_gflops, ids=ids, num_beams=self.config.num_beams)
        ids, mask = self.choices["input_ids"], self.choices["attention_mask"]
        likely, _, likelihoods = model.rank(question, ids, mask, self.config.k_test)
        answers = [
            [{"answer": self.candidates[place], "score": score} for place, score in zip(places, scores, strict=True)]
            for places, scores in zip(likely[:, :number].tolist(), likelihoods[:, :number].exp().tolist(), strict=True)
        ]
        return answers, partial(model.ranking_gflops, tokens=mask.sum(dim=1)[likely])
