"""Visual question answering: VQA v2 and questions of Visual Genome, in the format of BLIP's annotation files."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from configs.schema import VqaConfig
from configs.table import TablePart
from data.loading import (
    CHECKED,
    Annotated,
    Loader,
    build_loader,
    calibration_subset,
    check_images,
    load_image,
    read_entries,
    read_json,
    with_slashes,
)
from data.text import clean_sentence, dec_token_id, enc_token_id, encode
from transform.images import ImageTransform, eval_transform, keeps_truth, train_transform
from utils import Run, UserError, logger

# Shapes: B questions, each with its own image; L tokens in the longest question; A answers to all B questions; M tokens in the
# longest answer.

MAX_WORDS, MAX_TOKENS = 50, 35  # in a question
MAX_POSITIONS = 512  # position embeddings of BERT
VG_WEIGHT = 0.2  # weight of the single answer to a question of Visual Genome, as published
ANNOTATORS = 10  # of a question, by whose answers the official accuracy is defined
HELD_OUT = 0.02  # share of the training images held out to select the checkpoint when there is no val_file

_COCO_ID = re.compile(r"(?:COCO_\w+_)?(\d{12})")

Entry = dict[str, Any]


class VqaDataset(Dataset):
    """The data set of questions about images.

    An item is a dict of image (3, H, W), question (cleaned), id (the entry's question_id) and answers, whose form depends on
    the argument `answers`:

    "weighted", for training: the distinct answers; `weights` holds the share of annotators who gave each (VG_WEIGHT for VG).
    "likeliest", for calibration: the most frequent answer, in the same form with weight 1. The first one wins a tie.
    "given", for evaluation: the answers of all annotators, or None if the entry has none.

    Raises:
        UserError: when the images of the first entries are missing. Reading an item raises one when its image is missing or
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
        image = _read_picture(self.roots, (entry["dataset"], entry["image"]))
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
    """Collates items into a batch for evaluation.

    The batch is a dict of images (B, 3, H, W); question_ids and question_mask (B, L), starting with [ENC]; and ids and
    answers, lists of B, unchanged.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, positions: int = MAX_POSITIONS) -> None:
        """Stores the tokenizer and `positions`, the longest text that the model can read, in tokens."""
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
    """Collates items into a batch for training and calibration.

    The batch is a dict of images, question_ids, question_mask and ids, as for evaluation; answer_ids and answer_mask (A, M),
    in the order of the questions; answer_weights (A,); and answer_counts (B,), the number of answers to each question.
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
    """Encodes answers, without cleaning, to input_ids and attention_mask (A, M): [DEC] first and [SEP] last."""
    return encode(tokenizer, answers, max_tokens, dec_token_id(tokenizer))


def build_datasets(config: VqaConfig) -> dict[str, Dataset]:
    """Builds the data sets "train", "calibration" (a fixed subset of "train" without augmentation), "val" and "test".

    Without a `val_file`, "val" is the part of the training files that `held_out` sets aside. Only its VQA questions are used:
    the accuracy needs the answers of several annotators, which Visual Genome lacks.

    Raises:
        UserError: when the annotations are not in VQA's format, when `val_file` or `test_file` is also trained on, or when the
            training files are too small to hold images out.
    """
    train = [entry for name in config.train_files for entry in _read(config.annotation_file(name), ("vqa", "vg"))]
    if not config.val_file:
        train, held = held_out(train)
        val = [entry for entry in held if entry["dataset"] == "vqa"]
        if not train or not val:
            names = ", ".join(config.train_files)
            raise UserError(f"{names}: too few images to hold {HELD_OUT:.0%} of them out for selection; set the key 'val_file'")
    elif config.annotation_file(config.val_file) in map(config.annotation_file, config.train_files):
        raise UserError(f"val_file: {config.val_file} is among the train_files; leave it empty to hold out some images")
    else:
        val = _read(config.annotation_file(config.val_file))
    val = _evaluated(val, config.val_file or ", ".join(config.train_files))
    if not config.evaluate and config.annotation_file(config.test_file) in map(config.annotation_file, config.train_files):
        raise UserError(f"test_file: {config.test_file} is among the train_files; name a file that is not trained on")
    test = _evaluated(read_test_questions(config), config.test_file)
    roots, untouched = (config.vqa_root, config.vg_root), eval_transform(config.image_size, config.text_only, config.pictures)
    augmented = train_transform(config.image_size, config.augment, config.text_only, config.pictures)
    calibration = VqaDataset(train, *roots, untouched, "likeliest")
    return {
        "train": VqaDataset(train, *roots, augmented, "weighted"),
        "calibration": calibration_subset(calibration, config.calibration_size),
        "val": VqaDataset(val, *roots, untouched, "given"),
        "test": VqaDataset(test, *roots, untouched, "given"),
    }


def build_loaders(config: VqaConfig, run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Loader]:
    """Builds the loaders "train" (unless `config.evaluate`) and "calibration" with encoded answers, and "val" and "test"."""
    positions = config.bert_sizes.max_position_embeddings
    answered, asked = AnsweredCollate(tokenizer, positions), QuestionCollate(tokenizer, positions)
    shared = {"run": run, "num_workers": config.num_workers, "seed": config.seed}
    loaders = {}
    for split, dataset in build_datasets(config).items():
        if split == "train":
            if not config.evaluate:
                loaders[split] = build_loader(
                    dataset,
                    config.batch_size_train,
                    train=True,
                    collate=answered,
                    epoch_steps=config.epoch_batches,
                    replace_bad=config.skips_bad(split),
                    **shared,
                )
        else:
            collate = answered if split == "calibration" else asked
            skips = config.skips_bad(split)
            loaders[split] = build_loader(
                dataset, config.batch_size_test, train=False, collate=collate, replace_bad=skips, **shared
            )
    return loaders


def read_test_questions(config: VqaConfig) -> list[Entry]:
    """Reads the questions of the test split, with their answers where the file has them."""
    return _read(config.annotation_file(config.test_file), answered=False)


def annotated(config: VqaConfig, split: str, name: str) -> Annotated:
    """Reads the annotation file `name` of a split; for "val" without a name, the part of the training files that is held out.

    Raises:
        UserError: when a file has another format.
    """
    if split == "val" and not name:
        train = (entry for file in config.train_files for entry in _read(config.annotation_file(file), ("vqa", "vg")))
        entries = [entry for entry in held_out(train)[1] if entry["dataset"] == "vqa"]
    else:
        datasets = ("vqa", "vg") if split == "train" else ("vqa",)
        entries = _read(config.annotation_file(name), datasets, answered=split != "test")
    pictures = dict.fromkeys((entry["dataset"], entry["image"]) for entry in entries)
    return Annotated(len(entries), list(pictures), partial(_read_picture, {"vqa": config.vqa_root, "vg": config.vg_root}))


def _read_picture(roots: dict[str, Path], picture: tuple[str, str]) -> Image.Image:
    dataset, name = picture
    return load_image(roots[dataset] / name, f"{dataset}_root")


def read_answer_list(config: VqaConfig) -> list[str]:
    """Reads the candidate answers that are ranked for each question; of a table those of its training split, frequent ones first.

    Raises:
        UserError: when the file is not a list of texts, or is empty.
    """
    file = config.annotation_file(config.answer_list)
    if isinstance(file, TablePart):
        return [answer for answer, _ in Counter(answer for entry in _read(file) for answer in entry["answer"]).most_common()]
    answers = read_json(file)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) and answer for answer in answers):
        raise UserError(f"{file}: must be a list of texts, and not empty; set the key 'answer_list' to such a file")
    return answers


def held_out(entries: Iterable[Entry], share: float = HELD_OUT) -> tuple[list[Entry], list[Entry]]:
    """Splits the entries into those to train on and those held out: all questions about a `share` of the images.

    The split is the same in every run. An image is identified by its COCO id if its file name holds one, else by its path.
    Visual Genome renumbers images of COCO; these are not recognised, because BLIP's files do not give the COCO id.
    """
    parts: tuple[list[Entry], list[Entry]] = [], []
    for entry in entries:
        parts[_place(entry["image"]) < share].append(entry)
    return parts


def _place(image: str) -> float:
    """Hashes an image's identity to a number from 0 to 1. Images with the smallest numbers are held out first."""
    coco = _COCO_ID.fullmatch(PurePosixPath(image).stem)
    digest = hashlib.sha256((coco[1] if coco else image).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _read(file: Path | TablePart, datasets: tuple[str, ...] = ("vqa",), answered: bool = True) -> list[Entry]:
    return read_entries(file, partial(_problem, datasets=datasets, answered=answered), _tidy)


def _evaluated(entries: list[Entry], source: str) -> list[Entry]:
    """Checks the entries to evaluate, whose predictions are kept by question id; logs questions with few answers.

    Raises:
        UserError: when a question id is not the only one.
    """
    seen: dict[str, int] = {}  # ids as text, as they are keys of the file of predictions
    for index, entry in enumerate(entries):
        if (first := seen.setdefault(str(entry["question_id"]), index)) != index:
            raise UserError(
                f"{source}: the questions {first} and {index} share the question_id {entry['question_id']!r}; give each its own"
            )
    if few := sum(0 < len(entry.get("answer") or ()) < ANNOTATORS for entry in entries):
        logger.info(
            "%s: %d of %d questions have fewer than %d answers; docs/data.md says how they are scored",
            source, few, len(entries), ANNOTATORS,
        )  # fmt: skip
    return entries


def _tidy(entry: Entry) -> Entry:
    """Returns the entry with its data set, `vqa` where it names none, slashes in its path, and its answers as texts."""
    entry = {"dataset": "vqa", **entry, "image": with_slashes(entry.get("image"))}
    if isinstance(answers := entry.get("answer"), list):
        entry["answer"] = [answer.get("answer") if isinstance(answer, dict) else answer for answer in answers]
    return entry


def _problem(entry: Entry, datasets: tuple[str, ...], answered: bool) -> str | None:
    """Returns the error in an entry, or None. Its dataset must be one of `datasets`; `answered` requires an answer."""
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
