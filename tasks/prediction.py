"""What each task's model says of given pictures and texts, on its evaluation's path from files to an answer.

Shapes: I pictures, T texts. A single sample is a batch of one, so under `keep: max` or `mean` it is pruned by its own count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils.data import Dataset

from data.captions import CaptionImages, CaptionTexts, PairCollate, TextCollate, collate_images
from data.nlvr import NlvrCollate, NlvrDataset
from data.vqa import QuestionCollate, VqaDataset
from engine.restore import Opened
from engine.train import move
from tasks.writing import Answerer, Captioner
from madtp.flops import GIGA
from madtp.pruning import OFF, PruneSetting
from madtp.sparsity.masks import counted_dense
from madtp.blocks import Encoded, TowerRecord
from tasks.view import Sample, Samples
from tasks.views import VIEWS
from transform.images import eval_transform
from utils import UserError

SHOWN_ANSWERS = 5  # of the ranked ones
T = TypeVar("T")
HERE = Path()  # the root of paths that the user gave


@dataclass
class Prediction:
    """An answer, and what it cost.

    lines: for a reader, the answer first
    values: for a program; as in predictions_test.json where that has them
    gflops, uncompressed: of the whole answer in deployment, and of the same answer with nothing pruned
    records: of the towers, by name
    order: of the drawings, as the batch of `Predictor.shown` has them
    """

    lines: list[str]
    values: dict
    gflops: Tensor
    uncompressed: Tensor
    records: dict[str, TowerRecord]
    order: Sequence[int] = (0,)

    def tokens(self) -> dict[str, dict[str, list[int]]]:
        """Tower -> tokens of each of its pictures or texts after the last block, and before the first."""
        return {
            tower: {"kept": record.leaving[-1].tolist(), "of": record.entering[0].tolist()}
            for tower, record in self.records.items()
        }

    def costs(self) -> str:
        fewer = 100 * (1 - float(self.gflops / self.uncompressed))
        return f"{float(self.gflops):.4g} GFLOPs, uncompressed {float(self.uncompressed):.4g} ({fewer:.1f} % fewer)"

    def report(self) -> str:
        """For a reader."""
        tokens = (f"{tower} {sum(n['kept'])} of {sum(n['of'])}" for tower, n in self.tokens().items())
        return "\n".join([*self.lines, self.costs(), f"tokens kept: {', '.join(tokens)}"])

    def content(self) -> dict:
        """For a program."""
        gflops = {"gflops": float(self.gflops), "gflops_uncompressed": float(self.uncompressed)}
        return {**self.values, **gflops, "tokens": self.tokens()}


class Predictor:
    """A task: what it takes, its evaluation's path from files to an answer, and what is drawn of it.

    wants: pictures and texts, in words
    """

    wants = ""

    def __init__(self, opened: Opened, images: Sequence[str], texts: Sequence[str]):
        self.opened, self.images, self.texts = opened, images, texts
        self.config, self.model, self.setting = opened.config, opened.model, opened.setting
        self.packed = self.config.packed
        self.transform = eval_transform(self.config.image_size, self.config.text_only)
        if not self.fits():
            raise UserError(f"task {self.config.task!r} wants {self.wants}; got {len(images)} --image and {len(texts)} --text")

    def fits(self) -> bool:
        """Whether there are as many pictures and texts as the task wants."""
        raise NotImplementedError

    def predict(self) -> Prediction:
        raise NotImplementedError

    def shown(self) -> dict:
        """What is drawn: a batch of the task's view, the answers not known."""
        raise NotImplementedError

    def costs(self, cost: Callable[[T, PruneSetting], Tensor], pruned: T, whole: T) -> tuple[Tensor, Tensor]:
        """`cost` of what was computed, and of the same with nothing pruned and all weights."""
        with counted_dense(self.opened.sparse):
            uncompressed = cost(whole, OFF).sum()
        return cost(pruned, self.setting).sum(), uncompressed

    def on_device(self, batch: dict) -> dict:
        return move(batch, self.opened.run.device)

    def samples(self, batch: dict, prediction: Prediction) -> list[Sample]:
        """The drawings of the batch that `shown` gave, the best first."""
        names = [Path(path).name for path in self.images]
        view = VIEWS[self.config.task](self.opened, Samples((), names, None))
        drawn = view.samples(batch)
        return [drawn[place] for place in prediction.order]


class NlvrPredictor(Predictor):
    wants = "--image twice, the left one first, and --text once"

    def fits(self) -> bool:
        return len(self.images) == 2 and len(self.texts) == 1

    def shown(self) -> dict:
        name = " and ".join(Path(path).name for path in self.images)
        entry = {"sentence": self.texts[0], "label": "True", "images": list(self.images), "id": name}
        item = NlvrDataset([entry], HERE, self.transform, images=self.config.images)[0]
        batch = NlvrCollate(self.opened.tokenizer, self.config.bert_sizes.max_position_embeddings)([item])
        del batch["targets"]  # whether the sentence is true is not known
        return self.on_device(batch)

    def predict(self) -> Prediction:
        batch = self.shown()
        output = self.model(batch["images"], batch["input_ids"], batch["attention_mask"], self.setting, packed=self.packed)
        whole = replace(output, vision=output.vision.unpruned(), language=output.language.unpruned())
        score = float(output.logits.float().softmax(dim=-1)[0, 1])
        return Prediction(
            [f"{score > 0.5} (probability {max(score, 1 - score):.4f})"],
            {"prediction": score > 0.5, "score": score},
            *self.costs(self.model.gflops, output, whole),
            {"image": output.vision, "text": output.language},
        )


class CaptionPredictor(Predictor):
    wants = "--image once and no --text"

    def fits(self) -> bool:
        return len(self.images) == 1 and not self.texts

    def shown(self) -> dict:
        image = CaptionImages([{"image": self.images[0]}], HERE, self.transform)[0]["image"]
        return self.on_device({"image": image[None], "image_ids": torch.tensor([0])})

    def predict(self) -> Prediction:
        captioner = Captioner(self.config, self.opened.tokenizer)
        (text,), record, cost = captioner.write(self.model, self.shown()["image"], self.setting)
        return Prediction([text], {"prediction": text}, *self.costs(cost, record, record.unpruned()), {"image": record})


class VqaPredictor(Predictor):
    wants = "--image once and --text once, the question"

    def fits(self) -> bool:
        return len(self.images) == len(self.texts) == 1

    def shown(self) -> dict:
        name = Path(self.images[0]).name
        entry = {"dataset": "vqa", "image": self.images[0], "question": self.texts[0], "question_id": name}
        item = VqaDataset([entry], HERE, HERE, self.transform, "given")[0]
        collate = QuestionCollate(self.opened.tokenizer, self.config.bert_sizes.max_position_embeddings)
        return self.on_device(collate([item]))

    def predict(self) -> Prediction:
        model, batch = self.model, self.shown()
        answerer = Answerer(self.config, self.opened.tokenizer, self.opened.run.device)
        question = answerer.read(model, batch, self.setting)
        (answers,), cost = answerer.answer(model, question, SHOWN_ANSWERS)
        whole = replace(question, vision=question.vision.unpruned(), language=question.language.unpruned())
        lengths = question.valid.sum(dim=1), batch["question_mask"].sum(dim=1)  # of what the decoder reads: pruned, and whole
        best, *others = (f"{row['answer']} (likelihood {row['score']:.4f})" if "score" in row else row["answer"] for row in answers)
        return Prediction(
            [best, *(f"  or {other}" for other in others)],
            {"prediction": answers[0]["answer"], "score": answers[0].get("score"), "answers": answers},
            *self.costs(
                lambda read, setting: model.reading_gflops(read[0], setting) + cost(read[1]),
                (question, lengths[0]),
                (whole, lengths[1]),
            ),
            {"image": question.vision, "text": question.language},
        )


class PairPredictor(Predictor):
    """Retrieval: all pictures with all texts, by similarity; BLIP adds the logit of its matching. All of a side are one batch."""

    wants = "--image once and --text once or more, or --text once and --image once or more"

    def fits(self) -> bool:
        return min(len(self.images), len(self.texts)) == 1

    def shown(self) -> dict:
        items = [
            {"image": image["image"], "caption": text["caption"], "image_id": number}
            for number, image in enumerate(self._pictures())
            for text in self._captions()
        ]
        return self.on_device(PairCollate(self.opened.tokenizer, self.config.max_text_tokens)(items))

    def _pictures(self) -> list[dict]:
        return items_of(CaptionImages([{"image": path} for path in self.images], HERE, self.transform))

    def _captions(self) -> list[dict]:
        return items_of(CaptionTexts([{"caption": self.texts}]))

    def predict(self) -> Prediction:
        images = self.on_device(collate_images(self._pictures()))["image"]
        batch = self.on_device(TextCollate(self.opened.tokenizer, self.config.max_text_tokens)(self._captions()))
        words = batch["input_ids"], batch["attention_mask"]
        image = self.model.encode_image(images, self.setting, packed=self.packed)
        text = self.model.encode_text(*words, self.setting, packed=self.packed)
        with torch.autocast(images.device.type, enabled=False):  # as when a split is ranked
            scores = (image.feature @ text.feature.t()).flatten()
        pairs = [{"image": path, "text": said} for path in self.images for said in self.texts]
        rows = [{**pair, "similarity": value} for pair, value in zip(pairs, scores.tolist(), strict=True)]
        records = {"image": image.record, "text": text.record}
        costs = self.costs(self._encoding_gflops, (image, text), (unpruned(image), unpruned(text)))
        if self.config.task == "retrieval":
            logits, records["matching"], more = self._matched(words, image)
            costs = tuple(cost + matching for cost, matching in zip(costs, more, strict=True))
            scores = scores + logits[:, 1]
            rows = [{**row, "match": match} for row, match in zip(rows, logits.softmax(dim=-1)[:, 1].tolist(), strict=True)]
        order = scores.argsort(descending=True, stable=True).tolist()
        ranking = [{**rows[place], "score": float(scores[place])} for place in order]
        return Prediction([self._line(row) for row in ranking], {"ranking": ranking}, *costs, records, order)

    def _matched(self, words: tuple[Tensor, ...], image: Encoded) -> tuple[Tensor, TowerRecord, tuple[Tensor, Tensor]]:
        """The matching of every picture with every text: logits (I * T, 2), the record, GFLOPs, and these with nothing pruned."""
        texts = (part.repeat(len(self.images), 1) for part in words)
        logits, record = self.model.match(*texts, (image.tokens, image.layout), self.setting)
        left, whole = (tokens.repeat_interleave(len(self.texts)) for tokens in (image.record.leaving[-1], image.record.entering[0]))
        costs = self.costs(
            lambda matched, setting: self.model.matching_gflops(*matched, setting), (record, left), (record.unpruned(), whole)
        )
        return logits.float(), record, costs

    def _encoding_gflops(self, pairs: tuple[Encoded, Encoded], setting: PruneSetting) -> Tensor:
        """Of all pictures and all texts."""
        return sum(flops.double().sum() for flops in self.model.tower_flops(*pairs, setting)) / GIGA

    def _line(self, row: dict) -> str:
        numbers = ", ".join(f"{name} {row[name]:.4f}" for name in ("similarity", "match") if name in row)
        return f"{row['image'] if len(self.images) > 1 else row['text']} ({numbers})"


PREDICTORS: dict[str, type[Predictor]] = {
    "nlvr": NlvrPredictor,
    "caption": CaptionPredictor,
    "vqa": VqaPredictor,
    "retrieval": PairPredictor,
    "retrieval_clip": PairPredictor,
}


def unpruned(encoded: Encoded) -> Encoded:
    """With the record that is left when nothing is pruned."""
    return replace(encoded, record=encoded.record.unpruned())


def items_of(dataset: Dataset) -> list[dict]:
    return [dataset[index] for index in range(len(dataset))]
