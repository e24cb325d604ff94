"""Visual question answering: VQA v2 with Visual Genome's questions beside it, in BLIP's annotation files."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from configs.schema import VqaConfig
from data.loading import CHECKED, Loader, build_loader, calibration_subset, check_images, load_image, read_entries, read_json
from data.text import clean_sentence, dec_token_id, enc_token_id, encode
from transform.images import ImageTransform, eval_transform, keeps_truth, train_transform
from utils import Run, UserError

# B questions, each about a picture of its own; L tokens of the longest; A answers to all of them, M tokens of the longest

MAX_WORDS, MAX_TOKENS = 50, 35  # of a question
MAX_POSITIONS = 512  # BERT's
VG_WEIGHT = 0.2  # of the one answer that a question of Visual Genome has, as published
HELD_OUT = 0.02  # share of the training images that selects the checkpoint where there is no file for that

_COCO_ID = re.compile(r"(?:COCO_\w+_)?(\d{12})")

Entry = dict[str, Any]


class VqaDataset(Dataset):
    """An item is image (3, H, W), question (cleaned), id, the entry's question_id, and answers, as `answers` says:

    "weighted", for training: the distinct ones, and weights, the share of the annotators who gave each (VG_WEIGHT for VG's).
    "likeliest", for calibration: in the same form the one that most gave, the first of several.
    "given", for evaluation: those of all annotators, or None where the entry has none.

    Raises:
        UserError: when the pictures of the first entries are not there; an item raises one for a picture that is missing or
            broken.
    """

    def __init__(
        self,
        entries: list[Entry],
        vqa_root: str | Path,
        vg_root: str | Path,
        transform: ImageTransform,
        answers: Literal["weighted", "likeliest", "given"],
    ) -> None:
        self.entries = entries
        self.roots = {"vqa": Path(vqa_root), "vg": Path(vg_root)}
        self.transform = transform
        self.answers = answers
        for dataset, root in self.roots.items():
            names = [entry["image"] for entry in entries if entry["dataset"] == dataset]
            check_images(root, names[:CHECKED], f"{dataset}_root")

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        question = clean_sentence(entry["question"], "question", MAX_WORDS)
        answers = self._answers(entry)
        may_flip = all(map(keeps_truth, [question, *(answers["answers"] or [])]))
        image = load_image(self.roots[entry["dataset"]] / entry["image"], f"{entry['dataset']}_root")
        return {"image": self.transform(image, may_flip), "question": question, **answers, "id": entry["question_id"]}

    def _answers(self, entry: Entry) -> dict[str, Any]:
        if self.answers == "given":
            return {"answers": entry.get("answer")}
        if entry["dataset"] == "vqa":
            weights = {answer: number / len(entry["answer"]) for answer, number in Counter(entry["answer"]).items()}
        else:
            weights = {entry["answer"]: VG_WEIGHT}
        if self.answers == "likeliest":
            weights = {max(weights, key=weights.get): 1.0}
        return {"answers": list(weights), "weights": list(weights.values())}


class QuestionCollate:
    """Items to a batch for evaluation: images (B, 3, H, W); question_ids and question_mask (B, L), [ENC] first; ids and
    answers, B of them, as the items have them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int = MAX_POSITIONS) -> None:
        """positions: the longest text that the model can read, in tokens."""
        self.tokenizer, self.positions = tokenizer, positions

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.questions(items), "answers": [item["answers"] for item in items]}

    def questions(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        longest = min(MAX_TOKENS, self.positions)
        text = encode(self.tokenizer, [item["question"] for item in items], longest, enc_token_id(self.tokenizer))
        return {
            "images": torch.stack([item["image"] for item in items]),
            "question_ids": text["input_ids"],
            "question_mask": text["attention_mask"],
            "ids": [item["id"] for item in items],
        }


class AnsweredCollate(QuestionCollate):
    """Items to a batch for training and calibration: images, question_ids, question_mask and ids as for evaluation;

    answer_ids and answer_mask (A, M), the answers to the first question, then those to the next; answer_weights (A,);
    answer_counts (B,), how many each question has.
    """

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        text = encode_answers(self.tokenizer, [answer for item in items for answer in item["answers"]], self.positions)
        return {
            **self.questions(items),
            "answer_ids": text["input_ids"],
            "answer_mask": text["attention_mask"],
            "answer_counts": torch.tensor([len(item["answers"]) for item in items]),
            "answer_weights": torch.tensor([weight for item in items for weight in item["weights"]]),
        }


def encode_answers(
    tokenizer: PreTrainedTokenizerBase, answers: list[str], max_tokens: int = MAX_POSITIONS
) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (A, M) of answers as they are: [DEC] first and [SEP] last."""
    return encode(tokenizer, answers, max_tokens, dec_token_id(tokenizer))


def build_datasets(config: VqaConfig) -> dict[str, Dataset]:
    """The datasets "train", "calibration" (a fixed part of the training entries, untouched), "val" and "test".

    Where there is no `val_file`, "val" is what `held_out` takes from the training files; of it only VQA's questions, which
    have the answers that the accuracy needs.

    Raises:
        UserError: for annotations that are not VQA's, when `val_file` is trained on, or when nothing is held out.
    """
    train = [entry for name in config.train_files for entry in _read(config.annotation_file(name), ("vqa", "vg"))]
    if not config.val_file:
        train, held = held_out(train)
        val = [entry for entry in held if entry["dataset"] == "vqa"]
        if not train or not val:
            names = ", ".join(config.train_files)
            raise UserError(f"{names}: too few images to hold {HELD_OUT:.0%} of them out for selection; set the key 'val_file'")
    elif config.annotation_file(config.val_file) in map(config.annotation_file, config.train_files):
        raise UserError(f"val_file: {config.val_file} is among the train_files; leave it empty, and some images are held out")
    else:
        val = _read(config.annotation_file(config.val_file))
    if not config.evaluate and config.annotation_file(config.test_file) in map(config.annotation_file, config.train_files):
        raise UserError(f"test_file: {config.test_file} is among the train_files; what is trained on tests nothing")
    test = _read(config.annotation_file(config.test_file), answered=False)
    roots, untouched = (config.vqa_root, config.vg_root), eval_transform(config.image_size, config.text_only)
    augmented = train_transform(config.image_size, config.augment, config.text_only)
    calibration = VqaDataset(train, *roots, untouched, "likeliest")
    return {
        "train": VqaDataset(train, *roots, augmented, "weighted"),
        "calibration": calibration_subset(calibration, config.calibration_size),
        "val": VqaDataset(val, *roots, untouched, "given"),
        "test": VqaDataset(test, *roots, untouched, "given"),
    }


def build_loaders(config: VqaConfig, run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Loader]:
    """The loaders "train" (not for an evaluation) and "calibration" of answered questions, "val" and "test" of questions."""
    positions = config.bert_sizes.max_position_embeddings
    answered, asked = AnsweredCollate(tokenizer, positions), QuestionCollate(tokenizer, positions)
    shared = {"run": run, "num_workers": config.num_workers, "seed": config.seed}
    loaders = {}
    for split, dataset in build_datasets(config).items():
        if split == "train":
            if not config.evaluate:
                loaders[split] = build_loader(
                    dataset, config.batch_size_train, train=True, collate=answered, epoch_steps=config.epoch_steps, **shared
                )
        else:
            collate = answered if split == "calibration" else asked
            loaders[split] = build_loader(dataset, config.batch_size_test, train=False, collate=collate, **shared)
    return loaders


def read_answer_list(config: VqaConfig) -> list[str]:
    """The answers that questions are ranked over.

    Raises:
        UserError: when the file is no list of texts.
    """
    file = config.annotation_file(config.answer_list)
    answers = read_json(file)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) and answer for answer in answers):
        raise UserError(f"{file}: must be a list of texts with something in it; set the key 'answer_list' to such a file")
    return answers


def held_out(entries: Iterable[Entry], share: float = HELD_OUT) -> tuple[list[Entry], list[Entry]]:
    """The entries to train on and those held out: all questions about some `share` of the images, the same in every run.

    An image is known by its id in COCO, where its file is named by that, and else by its path. Pictures of COCO that Visual
    Genome has numbered anew are not recognised: BLIP's files do not say which they are.
    """
    parts: tuple[list[Entry], list[Entry]] = [], []
    for entry in entries:
        parts[_place(entry["image"]) < share].append(entry)
    return parts


def _place(image: str) -> float:
    """Where an image lies in the order of being held out, 0 to 1: its hash."""
    coco = _COCO_ID.fullmatch(PurePosixPath(image).stem)
    digest = hashlib.sha256((coco[1] if coco else image).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read(file: Path, datasets: tuple[str, ...] = ("vqa",), answered: bool = True) -> list[Entry]:
    return read_entries(file, partial(_problem, datasets=datasets, answered=answered))


def _problem(entry: Entry, datasets: tuple[str, ...], answered: bool) -> str | None:
    """What is wrong with an entry, if anything; it is to be of one of the `datasets`, and to have an answer where `answered`."""
    if not isinstance(entry.get("question"), str):
        return "has no 'question' that is text"
    if not isinstance(entry.get("question_id"), str | int):
        return "has no 'question_id' that is text or a whole number"
    if not isinstance(entry.get("image"), str) or not entry["image"]:
        return "has no 'image' that is a path"
    if entry.get("dataset") not in datasets:
        return f"has the 'dataset' {entry.get('dataset')!r}, not {' or '.join(map(repr, datasets))}"
    answer = entry.get("answer")
    if answer is None and not answered:
        return None
    if entry["dataset"] == "vg":
        return None if isinstance(answer, str) else "has no 'answer' that is text, as one of 'vg' has"
    if not isinstance(answer, list) or not answer or not all(isinstance(text, str) for text in answer):
        return "has no 'answer' that is a list of texts"
    return None
