"""What the models with a decoder say: captions and answers as texts, and what they cost in use.

Shapes: B samples.
"""

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from config import CaptionConfig, VqaConfig
from data.text import prompt_ids
from data.vqa import encode_answers, read_answer_list
from engine.train import move
from madtp.pruning import PruneSetting
from models.blip_caption import BlipCaption
from models.blip_vqa import BlipVqa, Question
from models.tower import TowerRecord


class Captioner:
    def __init__(self, config: CaptionConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.prompt = prompt_ids(tokenizer, config.prompt)

    def __call__(self, model: BlipCaption, images: Tensor, setting: PruneSetting) -> tuple[list[str], TowerRecord, Tensor]:
        """Captions of images (B, 3, H, W) without their prompt, the image encoder's record, and (B,) GFLOPs of all that."""
        writing = self.config.writing
        ids, record = model.generate(images, setting, self.config.variant == "paper", **writing)
        texts = self.tokenizer.batch_decode(ids[:, len(self.prompt) :], skip_special_tokens=True)
        return texts, record, model.generation_gflops(record, ids, writing["num_beams"], setting)


class Answerer:
    """Ranks the answer list or writes freely, as the config says.

    Raises:
        UserError: when the answer list cannot be read.
    """

    def __init__(self, config: VqaConfig, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.candidates = read_answer_list(config)
        self.choices = move(encode_answers(tokenizer, self.candidates), device)

    def __call__(self, model: BlipVqa, batch: dict, setting: PruneSetting) -> tuple[list[str], Question, Tensor]:
        """The answers to a batch of `QuestionCollate`, what the encoders read, and (B,) GFLOPs of all that."""
        packed = self.config.variant == "paper"
        question = model.read(batch["images"], batch["question_ids"], batch["question_mask"], setting, packed=packed)
        if self.config.inference == "rank":
            best, cost = model.rank(question, self.choices["input_ids"], self.choices["attention_mask"], self.config.k_test)
            texts = [self.candidates[number] for number in best.tolist()]
        else:
            ids, cost = model.generate(question, self.config.num_beams)
            texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return texts, question, model.reading_gflops(question, setting) + cost
