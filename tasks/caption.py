"""Captioning: describe the image."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import CaptionConfig
from data.captions import CaptionImages, Split, annotated, build_loaders, coco_results
from data.text import Tokenizer, as_texts, dec_token_id, prompt_ids
from engine.experiment import Evaluation, mean_cost
from engine.train import progress
from madtp.blocks import Guidance, TowerRecord
from madtp.rule import PruneSetting
from metrics.caption import caption_scores
from models.bert import BertSize
from models.blip_caption import REFERENCE_TEXT_TOKENS, BlipCaption
from models.build import learnable_tokens, pruner_factory, vision_transformer
from models.decoder import predicting
from models.weights.blip import load_decoder_weights
from tasks.pairs import SINGLES, PairView
from tasks.prediction import HERE, Prediction, Predictor
from tasks.task import BERT_VOCABULARY, Demo, Inputs, Task, bert_vocabulary
from tasks.view import Samples
from utils import gather_dicts, logger, on_main

PROMPT, END = [BERT_VOCABULARY - 2], 102  # [DEC] and [SEP] of bert-base-uncased, for the reference case


def caption_from_config(config: CaptionConfig, vocab_size: int, prompt: list[int], end: int, padding: int) -> BlipCaption:
    """
    Args:
        prompt: ids that every caption begins with, [DEC] first.
        end, padding: ids of [SEP] and [PAD].
    """
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    vision = vision_transformer(config, pruner_factory(config))
    learnable = learnable_tokens(config)
    return BlipCaption(vision, size, prompt, end, padding, config.label_smoothing, learnable, config.mag_projection)


Written = tuple[list[str], TowerRecord, Tensor]


class CaptionView(PairView):
    """An image, whose caption the model writes."""

    timed = "captions written, of the config's way to write them"

    @staticmethod
    def test_samples(config: CaptionConfig, tokenizer: Tokenizer) -> Samples:
        return PairView.test_samples(config, tokenizer, config.prompt, dec_token_id(tokenizer))

    def compute(self, batch: dict) -> Written:
        return self.task.write(self.model, batch["image"], self.setting)

    def records(self, output: Written) -> dict[str, TowerRecord]:
        return {"image": output[1]}

    def said(self, batch: dict, output: Written) -> list[list[tuple[str, str]]]:
        """The truth is the first caption, where there is one."""
        written = [[("written", text)] for text in output[0]]
        if "input_ids" not in batch:
            return written
        truths = as_texts(self.tokenizer, batch["input_ids"][:, len(self.task.prompt) :])
        return [[*said, ("truth", truth)] for said, truth in zip(written, truths, strict=True)]

    def gflops(self, batch: dict, output: Written) -> Tensor:
        return output[2]


class CaptionPredictor(Predictor):
    wants = "--image once and no --text"

    def fits(self) -> bool:
        return len(self.images) == 1 and not self.texts

    def shown(self) -> dict:
        image = CaptionImages([{"image": self.images[0]}], HERE, self.transform)[0]["image"]
        return self.on_device({"image": image[None], "image_ids": torch.tensor([0])})

    def predict(self) -> Prediction:
        ids, record = self.task.generate(self.model, self.shown()["image"], self.opened.setting)
        (text,) = self.task.texts(ids)
        costs = self.costs(lambda record: self.task.writing_gflops(self.model, record, ids), record, record.unpruned())
        return Prediction([text], {"prediction": text}, *costs, {"image": record})


class CaptionTask(Task[CaptionConfig]):
    config_class = CaptionConfig
    score = "CIDEr"
    columns = {"CIDEr": ("CIDEr",), "BLEU-4": ("Bleu_4",), "ROUGE-L": ("ROUGE_L",)}
    view, predictor = CaptionView, CaptionPredictor
    demo = Demo(
        title="Captioning on Shapes: what is in the picture?",
        reductions=(0.5,),
        shapes="caption",
        options=SINGLES,
        demo_size=13_000,
        study_size=13_000,  # as many as its epochs draw
        notes=(
            "CIDEr, BLEU-4 and ROUGE-L against the five captions of a picture, times 100.",
            "A sample is a picture with a caption in a training step: the image encoder, and the decoder once over the caption. In"
            " deployment the decoder writes one, word by word.",
        ),
    )
    load = staticmethod(load_decoder_weights)
    annotated = staticmethod(annotated)

    @cached_property
    def prompt(self) -> list[int]:
        """The ids that every caption begins with."""
        return prompt_ids(self.tokenizer, self.config.prompt)

    def build(self, config: CaptionConfig) -> BlipCaption:
        words = self.tokenizer
        return caption_from_config(config, len(words), self.prompt, words.sep_token_id, words.pad_token_id)

    def loaders(self) -> dict[str, Any]:
        return build_loaders(self.config, self.run, self.tokenizer, self.config.prompt, dec_token_id(self.tokenizer))

    def inputs(self, batch: dict) -> Inputs:
        return batch["image"], batch["input_ids"], batch["attention_mask"]

    def losses(self, model: nn.Module, batch: dict, setting: PruneSetting) -> dict[str, Tensor]:
        guidance = self.training_guidance(setting, batch["epoch"])
        named = model(*self.inputs(batch), guidance).losses
        if self.teacher is not None:
            said = None if guidance.packed else predicting(batch["attention_mask"], given=len(self.prompt))
            taught = Guidance(packed=guidance.packed)  # both give logits of the same tokens
            named |= self.teacher.losses(lambda teacher: teacher(*self.inputs(batch), taught), said)
        return named

    def forward(self, model: nn.Module, batch: dict, setting: PruneSetting) -> None:
        image, ids, mask = self.inputs(batch)
        for one, words, inside in zip(image, ids, mask.bool(), strict=True):
            model(one[None], words[None, inside], inside[None, inside].long(), self.guidance(setting))

    def generate(self, model: BlipCaption, images: Tensor, setting: PruneSetting) -> tuple[Tensor, TowerRecord]:
        """Writes captions of images (B, 3, H, W) as the config says; returns their ids and the image encoder's record."""
        return model.generate(images, self.guidance(setting), **self.config.writing)

    def texts(self, ids: Tensor) -> list[str]:
        """Returns generated captions without their prompt."""
        return as_texts(self.tokenizer, ids[:, len(self.prompt) :])

    def writing_gflops(self, model: BlipCaption, record: TowerRecord, ids: Tensor) -> Tensor:
        return model.generation_gflops(record, ids, self.config.writing["num_beams"])

    def write(self, model: BlipCaption, images: Tensor, setting: PruneSetting) -> Written:
        """Returns captions of images (B, 3, H, W), the image encoder's record, and the GFLOPs (B,)."""
        ids, record = self.generate(model, images, setting)
        return self.texts(ids), record, self.writing_gflops(model, record, ids)

    @property
    def writes_texts(self) -> bool:
        return True

    def deployment(self, model: nn.Module, batch: dict, setting: PruneSetting) -> Tensor:
        return self.write(model, batch["image"], setting)[2]

    def evaluate(self, model: nn.Module, split: Split, setting: PruneSetting) -> Evaluation:
        rows = {}
        for batch in progress(split.images, "captions", self.run):
            texts, record, costs = self.write(model, batch["image"].to(self.run.device, non_blocking=True), setting)
            for name, text, kept, cost in zip(batch["ids"], texts, record.leaving[-1].tolist(), costs.tolist(), strict=True):
                rows[name] = {"prediction": text, "tokens_kept": kept, "gflops": cost}
        rows = gather_dicts(rows)
        captions = {name: rows[name]["prediction"] for name in split.names}
        cost = mean_cost(model, split.pairs, self.gflops, setting, self.run)
        found = on_main(lambda: caption_scores(captions, split.references, slow=split.is_test), self.run)
        for name, reason in found.not_computed.items():
            logger.info("%s is not computed: %s", name, reason)
        scoring = {"tokenizer": found.tokenizer, "not_computed": found.not_computed}
        return Evaluation(found.scores, cost, rows, {"caption_result.json": coco_results(captions)}, scoring)

    @classmethod
    def reference_case(cls, config: CaptionConfig) -> tuple[BlipCaption, Inputs]:
        """An image and a caption of the reference length."""
        model = caption_from_config(config, bert_vocabulary(config), PROMPT, END, 0)
        text = torch.randint(5, 30, (1, REFERENCE_TEXT_TOKENS))
        return model, (torch.randn(1, 3, config.image_size, config.image_size), text, torch.ones_like(text))

    @staticmethod
    def reference_deployment(config: CaptionConfig, model: BlipCaption, inputs: Inputs, guidance: Guidance) -> Tensor:
        """The longest caption that may be written."""
        _, _, record = model.encode(inputs[0], guidance)
        longest = torch.full((1, config.max_length), END + 1)
        return model.generation_gflops(record, longest, config.writing["num_beams"])
