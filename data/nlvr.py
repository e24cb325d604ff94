"""NLVR2: pairs of images, each with sentences that are true or false."""

import re
from functools import partial
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from configs.schema import NlvrConfig
from configs.table import TablePart
from data.loading import (
    CHECKED,
    Annotated,
    Loader,
    build_loader,
    calibration_subset,
    load_image,
    no_such_picture,
    read_entries,
    with_slashes,
)
from data.text import clean_sentence, enc_token_id, encode
from transform.images import ImageTransform, eval_transform, keeps_truth, train_transform
from utils import Run

# Shapes: B pairs of images, S statements (a multiple of B), L tokens in the longest statement.

MAX_WORDS = 40
LABELS = {"true": "True", "1": "True", "false": "False", "0": "False"}  # spellings of a label, in lower case

Entry = dict[str, Any]

_OTHER_SIDE = {"left": "right", "right": "left"}
# "a star left of a circle" describes positions within one image, which do not change when the two images are swapped.
_NAMES_A_PICTURE = re.compile(r"\b(left|right)(?! of\b)(?=most\b|\b)")


class NlvrDataset(Dataset):
    """The data set of image pairs with statements.

    An item is a dict of left and right (3, H, W), sentences, labels (1 true, 0 false) and ids.

    Args:
        entries: from read_statements.
        swap: exchange the two images with probability 0.5, along with the words left and right in the sentences.
        statements_per_pair: if > 1, entries with the same images are grouped into one item, and this many of their statements
            are drawn at random each time. The image encoder then runs once for all of them. Pairs with fewer statements are
            left out.
        images: "left" shows the left image twice.

    Raises:
        UserError: when the images of the first entries are missing. Reading an item raises one when an image is missing or
            broken.
    """

    def __init__(
        self,
        entries: list[Entry],
        image_root: str | Path,
        transform: ImageTransform,
        *,
        swap: bool = False,
        statements_per_pair: int = 1,
        images: Literal["both", "left"] = "both",
    ) -> None:
        self.entries = entries
        self.items = [[index] for index in range(len(self.entries))]
        if statements_per_pair > 1:
            self.items = _group(self.entries, statements_per_pair)
        self.image_root = Path(image_root)
        self.transform = transform
        self.swap = swap
        self.statements_per_pair = statements_per_pair
        self.images = images
        for entry in self.entries[:CHECKED]:
            for name in entry["images"]:
                find_image(self.image_root, name)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entries = [self.entries[i] for i in _draw(self.items[index], self.statements_per_pair)]
        sentences = [clean_sentence(entry["sentence"], "caption", MAX_WORDS) for entry in entries]
        names = entries[0]["images"]
        if self.swap and torch.rand(()) < 0.5:
            names = names[::-1]
            sentences = [swap_sides(sentence) for sentence in sentences]
        may_flip = all(map(keeps_truth, sentences))
        left = self._picture(names[0], may_flip)
        return {
            "left": left,
            "right": left if self.images == "left" else self._picture(names[1], may_flip),
            "sentences": sentences,
            "labels": [int(entry["label"] == "True") for entry in entries],
            "ids": [entry["id"] for entry in entries],
        }

    def _picture(self, name: str, may_flip: bool) -> torch.Tensor:
        return self.transform(_read_picture(self.image_root, name), may_flip)


class NlvrCollate:
    """Collates items into a batch.

    The batch is a dict of images (B, 2, 3, H, W), left first; input_ids and attention_mask (S, L), starting with [ENC], padded
    to the longest text and cut at `max_tokens`; targets (S,); and ids, a list of S. The first S / B statements belong to the
    first pair, and so on.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 512) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        sentences = [sentence for item in items for sentence in item["sentences"]]
        return {
            "images": torch.stack([torch.stack([item["left"], item["right"]]) for item in items]),
            **encode(self.tokenizer, sentences, self.max_tokens, enc_token_id(self.tokenizer)),
            "targets": torch.tensor([label for item in items for label in item["labels"]]),
            "ids": [sample for item in items for sample in item["ids"]],
        }


def build_datasets(config: NlvrConfig) -> dict[str, Dataset]:
    """Builds the data sets "train", "calibration" (a fixed subset of "train" without augmentation), "val" and "test"."""
    train = read_statements(*map(config.annotation_file, config.train_files))
    untouched = {
        "image_root": config.image_root,
        "transform": eval_transform(config.image_size, config.text_only, config.pictures),
        "images": config.images,
    }
    return {
        "train": NlvrDataset(
            train,
            config.image_root,
            train_transform(config.image_size, config.augment, config.text_only, config.pictures),
            swap=config.augment.swap,
            statements_per_pair=config.statements_per_pair,
            images=config.images,
        ),
        "calibration": calibration_subset(NlvrDataset(train, **untouched), config.calibration_size),
        "val": NlvrDataset(read_statements(config.annotation_file(config.val_file)), **untouched),
        "test": NlvrDataset(read_statements(config.annotation_file(config.test_file)), **untouched),
    }


def build_loaders(config: NlvrConfig, run: Run, tokenizer: PreTrainedTokenizerBase) -> dict[str, Loader]:
    """Builds the loaders "train" (unless `config.evaluate`), "calibration", "val" and "test"."""
    collate = NlvrCollate(tokenizer, config.bert_sizes.max_position_embeddings)
    return {
        split: build_loader(
            dataset,
            config.batch_size_train if split == "train" else config.batch_size_test,
            train=split == "train",
            run=run,
            num_workers=config.num_workers,
            seed=config.seed,
            collate=collate,
            epoch_steps=config.epoch_batches if split == "train" else None,
            replace_bad=config.skips_bad(split),
        )
        for split, dataset in build_datasets(config).items()
        if not (config.evaluate and split == "train")
    }


def annotated(config: NlvrConfig, split: str, name: str) -> Annotated:
    """Reads the annotation file `name` of a split.

    Raises:
        UserError: as `read_statements`.
    """
    entries = read_statements(config.annotation_file(name))
    pictures = dict.fromkeys(picture for entry in entries for picture in entry["images"])
    return Annotated(len(entries), list(pictures), partial(_read_picture, config.image_root))


def _read_picture(image_root: Path, name: str) -> Image.Image:
    return load_image(find_image(image_root, name))


def swap_sides(sentence: str) -> str:
    """Exchanges left and right in a sentence whose two images were swapped, except in "left of" and "right of"."""
    return _NAMES_A_PICTURE.sub(lambda match: _OTHER_SIDE[match[1]], sentence)


def find_image(image_root: Path, name: str) -> Path:
    """Finds an image in either layout of NLVR2: train/34/x.png or train/x.png, with or without images/ in front.

    Raises:
        UserError: when the image is in none of these places.
    """
    if (image_root / name).exists():
        return image_root / name
    parts = [part for part in PurePosixPath(name).parts if part != "images" and not part.isdigit()]
    folder, file = "/".join(parts[:-1]), parts[-1]
    bases = image_root / folder, image_root / "images" / folder
    # A generator, so that the slow listing of folders runs only if the other paths do not exist.
    numbered = (inner / file for base in bases for inner in sorted(base.glob("[0-9]*")))
    for path in chain((base / file for base in bases), numbered):
        if path.exists():
            return path
    raise no_such_picture(image_root / name)


def read_statements(*files: Path | TablePart) -> list[Entry]:
    """Reads the entries of annotation files and adds an id to each: the file name and the index of the entry in the file.

    Raises:
        UserError: when the annotations are not in NLVR2's format.
    """
    entries = [(file, *numbered) for file in files for numbered in enumerate(read_entries(file, _problem, _tidy))]
    return [{**entry, "id": f"{file.stem}-{index}"} for file, index, entry in entries]


def _tidy(entry: Entry) -> Entry:
    """Returns the entry with its label as BLIP's files write it, "True" or "False", and slashes in its paths."""
    label, images = entry.get("label"), entry.get("images")
    if isinstance(label, bool | int | str):
        entry = {**entry, "label": LABELS.get(str(label).lower(), label)}
    return {**entry, "images": [with_slashes(name) for name in images]} if isinstance(images, list) else entry


def _problem(entry: Entry) -> str | None:
    """Returns the error in an entry, or None."""
    if not isinstance(entry.get("sentence"), str):
        return "has no 'sentence' that is text"
    if entry.get("label") not in ("True", "False"):
        return f"""has the 'label' {entry.get("label")!r}, not "True" or "False\""""
    images = entry.get("images")
    if not isinstance(images, list) or len(images) != 2 or not all(isinstance(name, str) and name for name in images):
        return "has no 'images' that are two paths"
    return None


def _group(entries: list[Entry], size: int) -> list[list[int]]:
    """Groups the indices of entries by image pair, in order of first appearance. Groups smaller than `size` are left out."""
    groups: dict[tuple[str, ...], list[int]] = {}
    for index, entry in enumerate(entries):
        groups.setdefault(tuple(entry["images"]), []).append(index)
    return [group for group in groups.values() if len(group) >= size]


def _draw(indices: list[int], size: int) -> list[int]:
    """Draws `size` of the `indices` at random; they stay in order."""
    if len(indices) == size:
        return indices
    return [indices[i] for i in sorted(torch.randperm(len(indices))[:size].tolist())]
