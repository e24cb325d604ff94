"""NLVR2: is the sentence true of the two images?"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from configs.schema import NlvrConfig
from data.nlvr import NlvrCollate, NlvrDataset, annotated, build_datasets, build_loaders, read_statements
from data.text import Tokenizer
from engine.experiment import Evaluation
from engine.train import move, progress
from engine.workers import side_by_side
from madtp.blocks import TowerRecord
from madtp.rule import PruneSetting
from models.bert import FIRST_MERGE_LAYER, BertSize, PairedCrossAttention, TextEncoder
from models.blip_nlvr import REFERENCE_TEXT_TOKENS, BlipNlvr, NlvrOutput, per_sentence
from models.build import learnable_tokens, pruner_factory, text_pruner_factory, vision_transformer
from models.weights.blip import load_nlvr_weights
from tasks.prediction import HERE, Prediction, Predictor
from tasks.task import Demo, Inputs, Task, bert_vocabulary
from tasks.view import Samples, View
from utils import gather_dicts


def nlvr_from_config(config: NlvrConfig, vocab_size: int) -> BlipNlvr:
    make_text_pruner = text_pruner_factory(config)
    vision = vision_transformer(config, pruner_factory(config))
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    text = TextEncoder(size, lambda i: PairedCrossAttention(size, vision.embed_dim, i >= FIRST_MERGE_LAYER), make_text_pruner)
    return BlipNlvr(vision, text, learnable_tokens(config), config.text_guides)


class NlvrView(View):
    """Two images and a sentence."""

    labels = ("left", "right")
    image_key = "images"
    timed = "the whole forward pass"

    @staticmethod
    def test_samples(config: NlvrConfig, tokenizer: Tokenizer) -> Samples:
        dataset = build_datasets(config)["test"]
        collate = NlvrCollate(tokenizer, config.bert_sizes.max_position_embeddings)
        return Samples(dataset, [entry["id"] for entry in dataset.entries], collate)

    def compute(self, batch: dict) -> NlvrOutput:
        return self.model(*self.inputs(batch), self.guidance)

    def records(self, output: NlvrOutput) -> dict[str, TowerRecord]:
        return {"image": output.vision, "text": output.language}

    def headings(self, batch: dict, output: NlvrOutput) -> list[str]:
        scores = output.logits.float().softmax(dim=-1)[:, 1].tolist()
        said = [f"predicted {score > 0.5} ({score:.2f})" for score in scores]
        if "targets" not in batch:
            return said
        return [f"{start}, truth {truth}" for start, truth in zip(said, batch["targets"].bool().tolist(), strict=True)]

    def names(self, batch: dict) -> list[str]:
        return batch["ids"]


class NlvrPredictor(Predictor):
    wants = "--image twice, the left one first, and --text once"

    def fits(self) -> bool:
        return len(self.images) == 2 and len(self.texts) == 1

    def shown(self) -> dict:
        name = " and ".join(Path(path).name for path in self.images)
        entry = {"sentence": self.texts[0], "label": "True", "images": list(self.images), "id": name}
        item = NlvrDataset([entry], HERE, self.transform, images=self.config.images)[0]
        batch = NlvrCollate(self.task.tokenizer, self.config.bert_sizes.max_position_embeddings)([item])
        del batch["targets"]  # the truth is not known
        return self.on_device(batch)

    def predict(self) -> Prediction:
        output = self.model(*self.task.inputs(self.shown()), self.guidance)
        whole = replace(output, vision=output.vision.unpruned(), language=output.language.unpruned())
        score = float(output.logits.float().softmax(dim=-1)[0, 1])
        return Prediction(
            [f"{score > 0.5} (probability {max(score, 1 - score):.4f})"],
            {"prediction": score > 0.5, "score": score},
            *self.costs(self.model.gflops, output, whole),
            {"image": output.vision, "text": output.language},
        )


class NlvrTask(Task[NlvrConfig]):
    config_class = NlvrConfig
    columns = {"accuracy, %": ("acc",)}
    view, predictor = NlvrView, NlvrPredictor
    demo = Demo(
        title="NLVR2 on Shapes: does a sentence hold for two images?",
        reductions=(0.5, 0.8),
        shapes="nlvr",
        options="--statements-per-pair 8 --eval-size 4000 --val-size 1000",
        demo_size=9_000,
        study_size=40_000,
    )
    load = staticmethod(load_nlvr_weights)
    annotated = staticmethod(annotated)

    def build(self, config: NlvrConfig) -> BlipNlvr:
        return nlvr_from_config(config, len(self.tokenizer))

    def loaders(self) -> dict[str, Any]:
        return build_loaders(self.config, self.run, self.tokenizer)

    def inputs(self, batch: dict) -> Inputs:
        return batch["images"], batch["input_ids"], batch["attention_mask"]

    def losses(self, model: nn.Module, batch: dict, setting: PruneSetting) -> dict[str, Tensor]:
        output = model(*self.inputs(batch), self.training_guidance(setting, batch["epoch"]))
        named = {"task": F.cross_entropy(output.logits.float(), batch["targets"], label_smoothing=self.config.label_smoothing)}
        if output.similarity is not None:
            named["similarity"] = output.similarity
        if self.teacher is not None:
            named |= self.teacher.losses(lambda teacher: teacher(*self.inputs(batch), self.guidance()))
        return named

    def gflops(self, model: nn.Module, batch: dict, setting: PruneSetting) -> Tensor:
        return model.gflops(model(*self.inputs(batch), self.guidance(setting)))

    def pairs(self, vision: Tensor, language: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        left, right = vision.chunk(2)
        groups = per_sentence(torch.arange(len(left), device=left.device), len(language))
        return ((left + right) / 2)[groups], language, groups

    def evaluate(self, model: nn.Module, loader: Any, setting: PruneSetting) -> Evaluation:
        rows, right = {}, {}

        def judged(batch: dict) -> tuple[dict, list[float], list[int], list[float]]:
            output = model(*self.inputs(move(batch, self.run.device)), self.guidance(setting))
            scores = output.logits.float().softmax(dim=-1)[:, 1].tolist()
            return batch, scores, model.tokens_kept(output).tolist(), model.gflops(output).tolist()

        batches = progress(loader, "evaluate", self.run)
        for batch, scores, kept, costs in side_by_side(judged, batches, self.run.device, model):
            for sample, target, score, tokens, cost in zip(
                batch["ids"], batch["targets"].tolist(), scores, kept, costs, strict=True
            ):
                rows[sample] = {"prediction": score > 0.5, "score": score, "tokens_kept": tokens, "gflops": cost}
                right[sample] = rows[sample]["prediction"] == bool(target)
        rows, right = gather_dicts(rows), gather_dicts(right)
        gflops = sum(row["gflops"] for row in rows.values()) / len(rows)
        return Evaluation({"acc": 100 * sum(right.values()) / len(right)}, gflops, rows)

    @classmethod
    def sample_scores(cls, config: NlvrConfig, predictions: dict[str, Any]) -> dict[str, float]:
        labels = {entry["id"]: entry["label"] == "True" for entry in read_statements(config.annotation_file(config.test_file))}
        return {sample: float(row["prediction"] == labels[sample]) for sample, row in predictions.items()}

    @classmethod
    def reference_case(cls, config: NlvrConfig) -> tuple[BlipNlvr, Inputs]:
        """A random image twice, so that `keep: instance` pads neither, and a text of the reference length or the longest one."""
        tokens = min(REFERENCE_TEXT_TOKENS, config.bert_sizes.max_position_embeddings)
        images = torch.randn(1, 1, 3, config.image_size, config.image_size).expand(1, 2, -1, -1, -1)
        text = torch.randint(5, 30, (1, tokens))
        return nlvr_from_config(config, bert_vocabulary(config)), (images, text, torch.ones_like(text))
