"""Visual question answering: what is the answer to the question about the image?"""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import VqaConfig
from data.text import Tokenizer, as_texts, dec_token_id
from data.vqa import (
    QuestionCollate,
    VqaDataset,
    annotated,
    build_datasets,
    build_loaders,
    encode_answers,
    read_answer_list,
    read_test_questions,
)
from engine.experiment import Evaluation
from engine.train import move, progress
from engine.workers import side_by_side
from madtp.blocks import Guidance, TowerRecord
from madtp.rule import PruneSetting
from metrics.vqa import accuracy, agreement
from models.bert import BertSize, CrossAttention, TextEncoder
from models.blip_vqa import (
    ANSWER_TOKENS,
    ANSWERS,
    QUESTION_TOKENS,
    QUESTIONS,
    BlipVqa,
    Question,
    one_sample,
    single_answers,
    weighted_loss,
)
from models.build import learnable_tokens, pruner_factory, text_pruner_factory, vision_transformer
from models.decoder import predicting
from models.weights.blip import load_decoder_weights
from tasks.pairs import SINGLES
from tasks.prediction import HERE, Prediction, Predictor
from tasks.task import Demo, Inputs, Task, bert_vocabulary
from tasks.view import Samples, View
from utils import gather_dicts

SHOWN_ANSWERS = 5  # of the ranked ones
END = 102  # [SEP] of bert-base-uncased, for the reference case

Answered = tuple[list[str], Question, Tensor]


def vqa_from_config(config: VqaConfig, vocab_size: int, start: int, end: int, padding: int) -> BlipVqa:
    """start, end, padding: ids of [DEC], [SEP] and [PAD]"""
    make_text_pruner = text_pruner_factory(config)
    vision = vision_transformer(config, pruner_factory(config))
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    text = TextEncoder(size, lambda i: CrossAttention(size, vision.embed_dim), lambda dim: make_text_pruner(dim, mask_follows=True))
    learnable, released = learnable_tokens(config), config.variant == "released"
    size = replace(size, num_hidden_layers=config.decoder_layers or size.num_hidden_layers)
    return BlipVqa(
        vision, text, size, start, end, padding, config.label_smoothing, learnable, reads_padding=released,
        text_guides=config.text_guides,
    )  # fmt: skip


class VqaView(View):
    """An image and a question. A sample's id is that of its question."""

    image_key = "images"
    text_keys = ("question_ids", "question_mask")
    timed = "questions answered, their pictures read anew for each"

    @staticmethod
    def test_samples(config: VqaConfig, tokenizer: Tokenizer) -> Samples:
        dataset = build_datasets(config)["test"]
        collate = QuestionCollate(tokenizer, config.bert_sizes.max_position_embeddings)
        return Samples(dataset, [str(entry["question_id"]) for entry in dataset.entries], collate)

    def compute(self, batch: dict) -> Answered:
        return self.task.answered(self.model, batch, self.setting)

    def records(self, output: Answered) -> dict[str, TowerRecord]:
        return {"image": output[1].vision, "text": output[1].language}

    def names(self, batch: dict) -> list[str]:
        return [str(question) for question in batch["ids"]]

    def said(self, batch: dict, output: Answered) -> list[list[tuple[str, str]]]:
        """The truth is the most frequent answer of the annotators, where there are any."""
        given = [[("truth", Counter(answers).most_common(1)[0][0])] if answers else [] for answers in batch["answers"]]
        return [[("answer", text), *truth] for text, truth in zip(output[0], given, strict=True)]

    def gflops(self, batch: dict, output: Answered) -> Tensor:
        return output[2]


class VqaPredictor(Predictor):
    wants = "--image once and --text once, the question"

    def fits(self) -> bool:
        return len(self.images) == len(self.texts) == 1

    def shown(self) -> dict:
        name = Path(self.images[0]).name
        entry = {"dataset": "vqa", "image": self.images[0], "question": self.texts[0], "question_id": name}
        item = VqaDataset([entry], HERE, HERE, self.transform, "given")[0]
        collate = QuestionCollate(self.task.tokenizer, self.config.bert_sizes.max_position_embeddings)
        return self.on_device(collate([item]))

    def predict(self) -> Prediction:
        model, batch = self.model, self.shown()
        question = self.task.encode(model, batch, self.opened.setting)
        (answers,), cost = self.task.answer(model, question, SHOWN_ANSWERS)
        whole = replace(question, vision=question.vision.unpruned(), language=question.language.unpruned())
        lengths = question.valid.sum(dim=1), batch["question_mask"].sum(dim=1)  # that the decoder reads: pruned, and whole
        best, *others = (f"{row['answer']} (likelihood {row['score']:.4f})" if "score" in row else row["answer"] for row in answers)
        return Prediction(
            [best, *(f"  or {other}" for other in others)],
            {"prediction": answers[0]["answer"], "score": answers[0].get("score"), "answers": answers},
            *self.costs(lambda read: model.encoding_gflops(read[0]) + cost(read[1]), (question, lengths[0]), (whole, lengths[1])),
            {"image": question.vision, "text": question.language},
        )


class VqaTask(Task[VqaConfig]):
    config_class = VqaConfig
    columns = {"accuracy, %": ("acc",)}
    view, predictor = VqaView, VqaPredictor
    demo = Demo(
        title="VQA on Shapes: what is the answer to a question about a picture?",
        reductions=(0.5, 0.75),
        shapes="vqa",
        options=SINGLES,
        demo_size=13_000,
        study_size=13_000,  # as many as its epochs draw
        notes=(
            "accuracy: of ten annotators' answers, up to two of them wrong; an answer that three of them gave is right.",
            "A sample is a question with its picture and one answer in a training step: both encoders, and the decoder once. In"
            " deployment the decoder ranks all answers.",
        ),
    )
    load = staticmethod(load_decoder_weights)
    annotated = staticmethod(annotated)

    def build(self, config: VqaConfig) -> BlipVqa:
        words = self.tokenizer
        return vqa_from_config(config, len(words), dec_token_id(words), words.sep_token_id, words.pad_token_id)

    def loaders(self) -> dict[str, Any]:
        loaders = build_loaders(self.config, self.run, self.tokenizer)
        _ = self.choices  # a missing answer list stops the run before it starts
        return loaders

    def inputs(self, batch: dict) -> Inputs:
        names = ("images", "question_ids", "question_mask", "answer_ids", "answer_mask", "answer_counts")
        return tuple(batch[name] for name in names)

    def first_sample(self, batch: dict) -> Inputs:
        return one_sample(self.inputs(batch))

    def losses(self, model: nn.Module, batch: dict, setting: PruneSetting) -> dict[str, Tensor]:
        guidance = self.training_guidance(setting, batch["epoch"])
        output = model(*self.inputs(batch), guidance)
        named = {"task": weighted_loss(output.answer_losses, batch["answer_weights"], len(batch["images"]))}
        if output.similarity is not None:
            named["similarity"] = output.similarity
        if self.teacher is not None:
            said = None if guidance.packed else predicting(batch["answer_mask"])
            taught = Guidance(packed=guidance.packed)  # both give logits of the same tokens
            named |= self.teacher.losses(lambda teacher: teacher(*self.inputs(batch), taught), said)
        return named

    def forward(self, model: nn.Module, batch: dict, setting: PruneSetting) -> None:
        for sample in single_answers(self.inputs(batch)):
            model(*sample, self.guidance(setting))

    @cached_property
    def candidates(self) -> list[str]:
        """The answers to rank; empty where the model writes freely."""
        return read_answer_list(self.config) if self.config.inference == "rank" else []

    @cached_property
    def choices(self) -> dict[str, Tensor]:
        """The candidates as token ids."""
        if not self.candidates:
            return {}
        tokens = encode_answers(self.tokenizer, self.candidates, self.config.bert_sizes.max_position_embeddings)
        return move(tokens, self.run.device)

    def encode(self, model: BlipVqa, batch: dict, setting: PruneSetting) -> Question:
        """Encodes the questions of a batch with their images."""
        return model.encode(batch["images"], batch["question_ids"], batch["question_mask"], self.guidance(setting))

    def answer(self, model: BlipVqa, question: Question, number: int = 1) -> tuple[list[list[dict]], Callable[[Tensor], Tensor]]:
        """Ranks the candidates, or writes freely, as the config says.

        Returns:
            the `number` best answers of each question as {"answer", "score"}, the score their likelihood; written ones have none
            the GFLOPs (B,) of answering, as a function of the questions' lengths (B,)
        """
        if self.writes_texts:
            ids, _ = model.generate(question, self.config.num_beams)
            cost = partial(model.writing_gflops, ids=ids, num_beams=self.config.num_beams)
            return [[{"answer": text}] for text in as_texts(self.tokenizer, ids)], cost
        ids, mask = self.choices["input_ids"], self.choices["attention_mask"]
        likely, _, likelihoods = model.rank(question, ids, mask, self.config.k_test)
        answers = [
            [{"answer": self.candidates[place], "score": score} for place, score in zip(places, scores, strict=True)]
            for places, scores in zip(likely[:, :number].tolist(), likelihoods[:, :number].exp().tolist(), strict=True)
        ]
        return answers, partial(model.ranking_gflops, tokens=mask.sum(dim=1)[likely])

    def answered(self, model: BlipVqa, batch: dict, setting: PruneSetting) -> Answered:
        """Returns the best answers to a batch of questions, the encoded questions, and the GFLOPs (B,) of it all."""
        question = self.encode(model, batch, setting)
        answers, cost = self.answer(model, question)
        texts = [best["answer"] for best, *_ in answers]
        return texts, question, model.encoding_gflops(question) + cost(question.valid.sum(dim=1))

    def deployment(self, model: nn.Module, batch: dict, setting: PruneSetting) -> Tensor:
        return self.answered(model, batch, setting)[2]

    def evaluate(self, model: nn.Module, loader: Any, setting: PruneSetting) -> Evaluation:
        rows, known = {}, {}

        def answered(batch: dict) -> tuple[dict, list[dict], list[float], list[int]]:
            question = self.encode(model, move(batch, self.run.device), setting)
            best = [answers[0] for answers in self.answer(model, question)[0]]
            tokens = encode_answers(self.tokenizer, [found["answer"] for found in best])["attention_mask"].sum(dim=1)
            tokens = tokens.to(self.run.device)
            costs = sum(model.gflops_by_module(question, tokens, torch.ones_like(tokens), len(tokens)).values()).tolist()
            return batch, best, costs, (question.vision.leaving[-1] + question.language.leaving[-1]).tolist()

        batches = progress(loader, "answers", self.run)
        for batch, best, costs, kept in side_by_side(answered, batches, self.run.device, model, self.writes_texts):
            for sample, found, left, cost, given in zip(batch["ids"], best, kept, costs, batch["answers"], strict=True):
                score = {name: value for name, value in found.items() if name == "score"}
                rows[sample] = {"prediction": found["answer"], **score, "tokens_kept": left, "gflops": cost}
                if given is not None:
                    known[sample] = given
        rows, known = gather_dicts(rows), gather_dicts(known)
        metrics = {"acc": accuracy({sample: rows[sample]["prediction"] for sample in known}, known)} if known else {}
        gflops = sum(row["gflops"] for row in rows.values()) / len(rows)
        submission = [{"question_id": sample, "answer": row["prediction"]} for sample, row in rows.items()]
        return Evaluation(metrics, gflops, rows, {"vqa_result.json": submission})

    @property
    def writes_texts(self) -> bool:
        return self.config.inference == "generate"

    @classmethod
    def sample_scores(cls, config: VqaConfig, predictions: dict[str, Any]) -> dict[str, float]:
        answers = {str(entry["question_id"]): entry.get("answer") for entry in read_test_questions(config)}
        rows = {sample: row["prediction"] for sample, row in predictions.items() if answers[sample] is not None}
        return {sample: agreement(prediction, answers[sample]) for sample, prediction in rows.items()}

    @classmethod
    def reference_case(cls, config: VqaConfig) -> tuple[BlipVqa, Inputs]:
        """An image, questions that all read it, and answers that all belong to the first."""
        vocabulary = bert_vocabulary(config)
        questions, answers = torch.randint(5, 30, (QUESTIONS, QUESTION_TOKENS)), torch.randint(5, 30, (ANSWERS, ANSWER_TOKENS))
        image = torch.randn(1, 3, config.image_size, config.image_size)
        inputs = image, questions, torch.ones_like(questions), answers, torch.ones_like(answers), torch.tensor([ANSWERS])
        return vqa_from_config(config, vocabulary, vocabulary - 2, END, 0), inputs

    @staticmethod
    def reference_deployment(config: VqaConfig, model: BlipVqa, inputs: Inputs, guidance: Guidance) -> Tensor:
        """An image with one question, and its answer."""
        images, question_ids, question_mask = inputs[:3]
        question = model.encode(images, question_ids[:1], question_mask[:1], guidance)
        source = question.valid.sum(dim=1)
        if config.inference == "rank":
            answer = model.ranking_gflops(source, torch.full((1, config.k_test), ANSWER_TOKENS))
        else:
            answer = model.writing_gflops(source, torch.full((1, ANSWER_TOKENS), END + 1), config.num_beams)
        return model.encoding_gflops(question) + answer
