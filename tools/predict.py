"""What a checkpoint says of your own pictures, and what that costs. Of any task's run; its config.yaml lies beside it.

    python tools/predict.py --checkpoint output/nlvr_p0.5/checkpoint_best.pth --image left.jpg --image right.jpg --text "Both are red."
    python tools/predict.py --checkpoint output/vqa_p0.5/checkpoint_best.pth --image a.jpg --text "What is on the table?"
    python tools/predict.py --checkpoint output/caption_p0.4/checkpoint_best.pth --image a.jpg
    python tools/predict.py --checkpoint output/coco_p0.45/checkpoint_best.pth --image a.jpg --text "a dog" --text "a cat"

Retrieval ranks several texts for one picture, or several pictures for one text. The weights of dense models (.safetensors, or .pth
without a temperature) want a --config and run dense. GFLOPs are those of the whole answer, "uncompressed" of the same answer with
nothing pruned. --explain draws what survives in each block, as tools/visualize.py.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from config import CONFIGS  # noqa: E402
from data.captions import CaptionImages, CaptionTexts, PairCollate, TextCollate, collate_images  # noqa: E402
from data.nlvr import NlvrCollate, NlvrDataset  # noqa: E402
from data.text import clean_sentence  # noqa: E402
from data.vqa import QuestionCollate, VqaDataset, encode_answers, read_answer_list  # noqa: E402
from engine.saved import Opened, open_checkpoint  # noqa: E402
from engine.train import Precision, move  # noqa: E402
from madtp.flops import GIGA  # noqa: E402
from madtp.pruning import OFF, PruneSetting  # noqa: E402
from models.tower import Encoded, TowerRecord, count_tokens  # noqa: E402
from tools.views import VIEWS, Sample  # noqa: E402
from tools.visualize import write_drawings  # noqa: E402
from transform.images import eval_transform  # noqa: E402
from utils import UserError, run_main  # noqa: E402

SHOWN_ANSWERS = 5  # of the ranked ones
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
        self.packed = self.config.variant == "paper"
        self.transform = eval_transform(self.config.image_size)
        if not self.fits():
            raise UserError(f"task {self.config.task!r} wants {self.wants}; got {len(images)} --image and {len(texts)} --text")

    def fits(self) -> bool:
        """Whether there are as many pictures and texts as the task wants."""
        raise NotImplementedError

    def predict(self) -> Prediction:
        raise NotImplementedError

    def shown(self) -> dict:
        """What is drawn: a batch of the task's view."""
        raise NotImplementedError

    def on_device(self, batch: dict) -> dict:
        return move(batch, self.opened.run.device)

    def samples(self, prediction: Prediction) -> list[Sample]:
        """The drawings, the best first."""
        config, model, setting, tokenizer, run = self.opened
        view = VIEWS[config.task].over(config, run, setting, model, tokenizer, (), self.images, None)
        drawn = view.samples(self.shown())
        return [drawn[place] for place in prediction.order]


class NlvrPredictor(Predictor):
    wants = "--image twice, the left one first, and --text once"

    def fits(self) -> bool:
        return len(self.images) == 2 and len(self.texts) == 1

    def shown(self) -> dict:
        name = " and ".join(Path(path).name for path in self.images)
        entry = {"sentence": self.texts[0], "label": "True", "images": list(self.images), "id": name}
        ablation = {"images": self.config.images, "text_only": self.config.text_only}
        item = NlvrDataset([entry], HERE, self.transform, **ablation)[0]
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
            self.model.gflops(output, self.setting)[0],
            self.model.gflops(whole, OFF)[0],
            {"image": output.vision, "text": output.language},
        )


class CaptionPredictor(Predictor):
    wants = "--image once and no --text"

    def fits(self) -> bool:
        return len(self.images) == 1 and not self.texts

    def predict(self) -> Prediction:
        config, model = self.config, self.model
        image = CaptionImages([{"image": self.images[0]}], HERE, self.transform)[0]
        lengths = {"max_length": config.max_length, "min_length": config.min_length}
        batch = self.on_device(collate_images([image]))
        ids, record = model.generate(batch["image"], self.setting, self.packed, config.num_beams, **lengths)
        (text,) = self.opened.tokenizer.batch_decode(ids[:, len(model.prompt) :], skip_special_tokens=True)
        return Prediction(
            [text],
            {"prediction": text},
            model.generation_gflops(record, ids, config.num_beams, self.setting)[0],
            model.generation_gflops(record.unpruned(), ids, config.num_beams, OFF)[0],
            {"image": record},
        )


class VqaPredictor(Predictor):
    wants = "--image once and --text once, the question"

    def fits(self) -> bool:
        return len(self.images) == len(self.texts) == 1

    def predict(self) -> Prediction:
        model, tokenizer = self.model, self.opened.tokenizer
        entry = {"dataset": "vqa", "image": self.images[0], "question": self.texts[0], "question_id": "yours"}
        item = VqaDataset([entry], HERE, HERE, self.transform, "given")[0]
        batch = self.on_device(QuestionCollate(tokenizer)([item]))
        inputs = batch["images"], batch["question_ids"], batch["question_mask"]
        question = model.read(*inputs, self.setting, packed=self.packed)
        whole = replace(question, vision=question.vision.unpruned(), language=question.language.unpruned())
        lengths = question.valid.sum(dim=1), batch["question_mask"].sum(dim=1)  # of what the decoder reads: pruned, and whole
        if self.config.inference == "rank":
            answers, costs = self._rank(question, lengths)
        else:
            ids, _ = model.generate(question, self.config.num_beams)
            costs = [model.writing_gflops(length, ids, self.config.num_beams) for length in lengths]
            answers = [{"answer": text} for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        best, *others = (f"{row['answer']} (likelihood {row['score']:.4f})" if "score" in row else row["answer"] for row in answers)
        return Prediction(
            [best, *(f"  or {other}" for other in others)],
            {"prediction": answers[0]["answer"], "answers": answers},
            (model.reading_gflops(question, self.setting) + costs[0])[0],
            (model.reading_gflops(whole, OFF) + costs[1])[0],
            {"image": question.vision, "text": question.language},
        )

    def _rank(self, question, lengths: Sequence[Tensor]) -> tuple[list[dict], list[Tensor]]:
        """The best answers; and what ranking costs questions of each of these `lengths`."""
        candidates = read_answer_list(self.config)
        choices = self.on_device(encode_answers(self.opened.tokenizer, candidates))
        likely, losses = self.model.likeliest(question, choices["input_ids"], choices["attention_mask"], self.config.k_test)
        rows = [
            {"answer": candidates[likely[0, place]], "score": float((-losses[0, place]).exp())}
            for place in losses[0].argsort(stable=True)[:SHOWN_ANSWERS].tolist()
        ]
        tokens = choices["attention_mask"].sum(dim=1)[likely]
        return rows, [self.model.ranking_gflops(length, tokens) for length in lengths]


class PairPredictor(Predictor):
    """Retrieval: all pictures with all texts, one of which is single. By similarity alone; BLIP adds its matching."""

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
        model, setting, number = self.model, self.setting, len(self.texts)
        images = self.on_device(collate_images(self._pictures()))["image"]
        batch = self.on_device(TextCollate(self.opened.tokenizer, self.config.max_text_tokens)(self._captions()))
        words = batch["input_ids"], batch["attention_mask"]
        image = model.encode_image(images, setting, packed=self.packed)
        text = model.encode_text(*words, setting, packed=self.packed)
        with torch.autocast(images.device.type, enabled=False):  # as when a split is ranked
            scores = (image.feature @ text.feature.t()).flatten()
        pairs = [{"image": path, "text": said} for path in self.images for said in self.texts]
        rows = [{**pair, "similarity": value} for pair, value in zip(pairs, scores.tolist(), strict=True)]
        records = {"image": image.record, "text": text.record}
        gflops, uncompressed = (
            self._encoding_gflops(image, text, setting),
            self._encoding_gflops(*map(unpruned, (image, text)), OFF),
        )
        if self.config.task == "retrieval":
            repeated = (part.repeat(len(self.images), 1) for part in words)
            logits, record = model.match(*repeated, (image.tokens, image.layout), setting)
            records["matching"] = record
            entering, leaving = (
                tokens.repeat_interleave(number) for tokens in (image.record.entering[0], image.record.leaving[-1])
            )
            gflops = gflops + model.matching_gflops(record, leaving, setting).sum()
            uncompressed = uncompressed + model.matching_gflops(record.unpruned(), entering, OFF).sum()
            scores = scores + logits[:, 1].float()
            for row, match in zip(rows, logits.float().softmax(dim=-1)[:, 1].tolist(), strict=True):
                row["match"] = match
        order = scores.argsort(descending=True, stable=True).tolist()
        ranking = [rows[place] for place in order]
        return Prediction([self._line(row) for row in ranking], {"ranking": ranking}, gflops, uncompressed, records, order)

    def _encoding_gflops(self, image: Encoded, text: Encoded, setting: PruneSetting) -> Tensor:
        """Of all pictures and all texts."""
        return sum(flops.double().sum() for flops in self.model.tower_flops(image, text, setting)) / GIGA

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


def check_inputs(images: Sequence[str], texts: Sequence[str], explain: Path | None) -> None:
    """What can be said before there is a model.

    Raises:
        UserError: for a picture that is not there, a text without words, or a drawing that is no .png.
    """
    for path in images:
        if not Path(path).exists():
            raise UserError(f"{path}: no such picture; give the path of one with --image")
    for text in texts:
        if not clean_sentence(text, "caption", 1):
            raise UserError(f"--text {text!r}: has no words; write what the model is to read")
    if explain is not None and explain.suffix != ".png":
        raise UserError(f"--explain {explain}: must end in .png")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint", required=True, metavar="FILE", help="the weights that a run made, or those of a dense model"
    )
    parser.add_argument("--config", metavar="FILE", help="the run's config.yaml, where it does not lie beside the checkpoint")
    parser.add_argument("--task", choices=CONFIGS, help="where the file has no key 'task'")
    parser.add_argument("--image", action="append", default=[], metavar="FILE", help="a picture; may come again")
    parser.add_argument("--text", action="append", default=[], metavar="TEXT", help="a sentence or a question; may come again")
    parser.add_argument("--explain", type=Path, metavar="PNG", help="draw what survives in each block")
    parser.add_argument("--device", help="cpu or cuda; cuda when there is one")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    args = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)  # else a run's log goes to where the answer goes
    check_inputs(args.image, args.text, args.explain)
    opened = open_checkpoint(args.checkpoint, args.config, args.device, args.task)
    predictor = PREDICTORS[opened.config.task](opened, args.image, args.text)
    if args.explain and opened.config.task not in VIEWS:
        raise UserError(f"--explain: runs of task {opened.config.task!r} cannot be shown yet; those of {', '.join(VIEWS)} can")
    with Precision(opened.run.device, opened.config.amp).autocast():
        prediction = predictor.predict()
    if args.explain:
        write_drawings(predictor.samples(prediction), args.explain)
    print(json.dumps({"task": opened.config.task, **prediction.content()}) if args.json else prediction.report())


if __name__ == "__main__":
    run_main(main)
