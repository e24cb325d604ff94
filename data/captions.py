"""Data sets of captioned images, in the format of BLIP's annotation files for COCO (Karpathy's split) and Flickr30k."""

import re
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch.utils.data import Dataset

from configs.schema import CaptionConfig, Config, RetrievalConfig
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
from data.text import Tokenizer, clean_sentence, encode
from transform.images import ImageTransform, eval_transform, keeps_truth, train_transform
from utils import Run, UserError, logger

# Shapes: B items, L tokens in the longest caption.

MAX_WORDS = 30


class CaptionPairs(Dataset):
    """The data set of training pairs.

    An item is a dict of image (3, H, W), caption (cleaned, with `prompt` in front) and image_id. The image_id is a number
    from 0, given to the distinct images of all files in order of first appearance. Captions of the same image share it.
    `number_of_images` is how many there are.

    Raises:
        UserError: when the annotations have another format, when two images have the same "image_id", or when the images of
            the first entries are missing. Reading an item raises one when its image is missing or broken.
    """

    def __init__(
        self,
        annotation_files: Sequence[str | Path | TablePart],
        image_root: str | Path,
        transform: ImageTransform,
        prompt: str = "",
    ) -> None:
        self.entries = _read_pairs([file if isinstance(file, TablePart) else Path(file) for file in annotation_files])
        numbers: dict[str, int] = {}
        self.image_ids = [numbers.setdefault(entry["image"], len(numbers)) for entry in self.entries]
        self.number_of_images = len(numbers)
        self.image_root = Path(image_root)
        self.transform = transform
        self.prompt = prompt
        check_images(self.image_root, (entry["image"] for entry in self.entries[:CHECKED]))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> dict[str, Any]:
        entry = self.entries[index]
        caption = clean_sentence(entry["caption"], "caption", MAX_WORDS)
        return {
            "image": self.transform(load_image(self.image_root / entry["image"]), keeps_truth(caption)),
            "caption": self.prompt + caption,
            "image_id": self.image_ids[index],
        }


def read_captioned(file: Path | TablePart) -> list[dict[str, Any]]:
    """Reads the entries {"image": path, "caption": [text, ...]} of an evaluation file, for CaptionImages and CaptionTexts.

    Entries of the same image become one: its copies would otherwise count as images that a caption does not belong to.

    Raises:
        UserError: when the file has another format.
    """
    entries = read_entries(file, _captioned_problem, _tidy)
    grouped: dict[str, dict[str, Any]] = {}
    for entry in entries:
        known = grouped.setdefault(entry["image"], {**entry, "caption": []})
        known["caption"] = known["caption"] + entry["caption"]
    if len(grouped) < len(entries) and not isinstance(file, TablePart):  # whose rows have a caption each
        logger.info("%s: %d entries of %d images, grouped by image", file, len(entries), len(grouped))
    return list(grouped.values())


def _read_pairs(files: Sequence[Path | TablePart]) -> list[dict[str, Any]]:
    """Reads the entries {"image", "caption", "image_id"} of training files.

    Raises:
        UserError: when a file has another format, or when two images have the same "image_id".
    """
    entries: list[dict[str, Any]] = []
    images: dict[str | int, str] = {}
    for file in files:
        for index, entry in enumerate(read_entries(file, _pair_problem, _tidy)):
            first = images.setdefault(entry["image_id"], entry["image"])
            if first != entry["image"]:
                raise UserError(
                    f"{file}: entry {index} has the image_id {entry['image_id']!r} of another image, {first}; give each image its"
                    " own"
                )
            entries.append(entry)
    return entries


class CaptionImages(Dataset):
    """The data set of the images of `entries`. An item is a dict of image (3, H, W) and id, the image's path in the annotations.

    Raises:
        UserError: when images are missing or broken, as in CaptionPairs.
    """

    def __init__(self, entries: list[dict[str, Any]], image_root: str | Path, transform: ImageTransform) -> None:
        self.names = [entry["image"] for entry in entries]
        self.image_root = Path(image_root)
        self.transform = transform
        check_images(self.image_root, self.names[:CHECKED])

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.transform(load_image(self.image_root / self.names[index])), "id": self.names[index]}


class CaptionTexts(Dataset):
    """The data set of the captions of `entries`. An item is a dict of caption (cleaned).

    `image_of_text` holds the image index of each caption.
    """

    def __init__(self, entries: list[dict[str, Any]]) -> None:
        self.captions = [caption for entry in entries for caption in entry["caption"]]
        self.image_of_text = [image for image, entry in enumerate(entries) for _ in entry["caption"]]

    def __len__(self) -> int:
        return len(self.captions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"caption": clean_sentence(self.captions[index], "caption", MAX_WORDS)}


class FirstPairs(Dataset):
    """The data set that pairs each image of an evaluation file with its first caption. Items are like those of CaptionPairs."""

    def __init__(self, images: CaptionImages, texts: CaptionTexts, prompt: str = "") -> None:
        self.images, self.texts, self.prompt = images, texts, prompt
        self.first = {image: text for text, image in reversed(list(enumerate(texts.image_of_text)))}

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        caption = self.prompt + self.texts[self.first[index]]["caption"]
        return {"image": self.images[index]["image"], "caption": caption, "image_id": index}


class Split(NamedTuple):
    """The loaders and annotations of an evaluation split.

    images, texts: loaders of this process's share of the images and captions
    pairs: loader of some image-caption pairs, for counting GFLOPs
    image_of_text: the image index of each caption of the split
    captions: the captions as written in the file
    names: the paths of the images
    truth: reference captions by image path, if they differ from the captions of the split
    is_test: True for the split that is evaluated once, at the end
    """

    images: Loader
    texts: Loader
    pairs: Loader
    image_of_text: list[int]
    captions: list[str]
    names: list[str]
    truth: dict[str, list[str]] = {}
    is_test: bool = False

    @property
    def references(self) -> dict[str, list[str]]:
        """The reference captions, by image path."""
        if self.truth:
            return self.truth
        found: dict[str, list[str]] = {name: [] for name in self.names}
        for image, caption in zip(self.image_of_text, self.captions, strict=True):
            found[self.names[image]].append(caption)
        return found


class TextCollate:
    """Collates items of CaptionTexts into a batch: input_ids and attention_mask (B, L), as from data.text.encode."""

    def __init__(self, tokenizer: Tokenizer, max_tokens: int, first_token_id: int | None = None) -> None:
        self.tokenizer = tokenizer
        self.max_tokens = max_tokens
        self.first_token_id = first_token_id

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return encode(self.tokenizer, [item["caption"] for item in items], self.max_tokens, self.first_token_id)


class PairCollate(TextCollate):
    """Collates items of CaptionPairs into a batch: image (B, 3, H, W); input_ids and attention_mask (B, L); image_ids (B,)."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "image": _stack(items),
            **super().__call__(items),
            "image_ids": torch.tensor([item["image_id"] for item in items]),
        }


def collate_images(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collates items of CaptionImages into a batch: image (B, 3, H, W); ids, a list of B."""
    return {"image": _stack(items), "ids": [item["id"] for item in items]}


def build_datasets(config: Config, prompt: str = "") -> dict[str, Any]:
    """Builds the data sets of all splits.

    "train" and "calibration" hold pairs; calibration is a fixed subset of them without augmentation. "val" and "test" are
    (CaptionImages, CaptionTexts). `prompt` is put in front of the captions of pairs.
    """
    train_files = [config.annotation_file(name) for name in config.train_files]
    untouched = {"image_root": config.image_root, "transform": eval_transform(config.image_size, config.text_only, config.pictures)}
    train = CaptionPairs(train_files, **untouched, prompt=prompt)
    datasets: dict[str, Any] = {"calibration": calibration_subset(train, config.calibration_size)}
    datasets["train"] = copy(train)  # a shallow copy shares the entries: COCO has half a million
    datasets["train"].transform = train_transform(config.image_size, config.augment, config.text_only, config.pictures)
    for split, name in (("val", config.val_file), ("test", config.test_file)):
        entries = read_captioned(config.annotation_file(name))
        datasets[split] = CaptionImages(entries, **untouched), CaptionTexts(entries)
    return datasets


def build_loaders(
    config: RetrievalConfig | CaptionConfig, run: Run, tokenizer: Tokenizer, prompt: str = "", first_token_id: int | None = None
) -> dict[str, Any]:
    """Builds the loaders "train" (unless `config.evaluate`) and "calibration" of pairs, and the Splits "val" and "test".

    `prompt` is put in front of the captions of pairs. `first_token_id` is passed to data.text.encode.
    """
    pair_collate = PairCollate(tokenizer, config.max_text_tokens, first_token_id)
    text_collate = TextCollate(tokenizer, config.max_text_tokens, first_token_id)
    shared = {"run": run, "num_workers": config.num_workers, "seed": config.seed}
    evaluation = {"batch_size": config.batch_size_test, "train": False, **shared}
    datasets = build_datasets(config, prompt)
    skips = config.skips_bad("calibration")
    loaders = {"calibration": build_loader(datasets["calibration"], collate=pair_collate, replace_bad=skips, **evaluation)}
    if not config.evaluate:
        loaders["train"] = build_loader(
            datasets["train"],
            config.batch_size_train,
            train=True,
            collate=pair_collate,
            epoch_steps=config.epoch_batches,
            replace_bad=config.skips_bad("train"),
            **shared,
        )
    for split in ("val", "test"):
        images, texts = datasets[split]
        pairs = calibration_subset(FirstPairs(images, texts, prompt), config.calibration_size)
        loaders[split] = Split(
            build_loader(images, collate=collate_images, **evaluation),
            build_loader(texts, collate=text_collate, **evaluation),
            build_loader(pairs, collate=pair_collate, **evaluation),
            texts.image_of_text,
            texts.captions,
            images.names,
            _truth(config, split, images.names),
            split == "test",
        )
    return loaders


def annotated(config: RetrievalConfig | CaptionConfig, split: str, name: str) -> Annotated:
    """Reads the annotation file `name` of a split. Its samples are pairs in training, and images in evaluation.

    Raises:
        UserError: when the file has another format.
    """
    file = config.annotation_file(name)
    entries = _read_pairs([file]) if split == "train" else read_captioned(file)
    pictures = dict.fromkeys(entry["image"] for entry in entries)
    return Annotated(len(entries), list(pictures), partial(_read_picture, config.image_root))


def _read_picture(image_root: Path, name: str) -> Image.Image:
    return load_image(image_root / name)


def coco_results(captions: Mapping[str, str]) -> list[dict[str, Any]]:
    """Converts captions by image path to COCO's results format."""
    return [{"image_id": _coco_id(name), "caption": caption} for name, caption in captions.items()]


def _coco_id(name: str) -> int | str:
    """Returns an image's COCO id: the number at the end of its file name, or the path if there is none."""
    number = re.search(r"(\d+)$", PurePosixPath(name).stem)
    return int(number[1]) if number else name


def read_coco_truth(file: Path, names: Sequence[str]) -> dict[str, list[str]]:
    """Reads the captions of a COCO ground truth file, {"annotations": [{"image_id", "caption"}, ...]}, by image path.

    Raises:
        UserError: when the file has another format, or lacks captions of some image in `names`.
    """
    content = read_json(file, "coco_gt_root")
    annotations = content.get("annotations") if isinstance(content, dict) else None
    if not isinstance(annotations, list):
        raise UserError(f"{file}: has no list 'annotations', as COCO's ground truth has; set coco_gt_root, or leave it out")
    by_id: dict[int | str, list[str]] = {}
    for number, entry in enumerate(annotations):
        if not isinstance(entry, dict) or not isinstance(entry.get("caption"), str) or "image_id" not in entry:
            raise UserError(f"{file}: annotation {number} has no 'image_id' or no 'caption' that is text")
        by_id.setdefault(entry["image_id"], []).append(entry["caption"])
    if missing := [name for name in names if _coco_id(name) not in by_id]:
        raise UserError(f"{file}: has no captions of {missing[0]} and {len(missing) - 1} other images; is it of another split?")
    return {name: by_id[_coco_id(name)] for name in names}


def _truth(config: RetrievalConfig | CaptionConfig, split: str, names: Sequence[str]) -> dict[str, list[str]]:
    if not isinstance(config, CaptionConfig) or config.coco_gt_root is None:
        return {}
    name = config.val_file if split == "val" else config.test_file
    return read_coco_truth(config.coco_gt_root / f"{name}_gt.json", names)


def _stack(items: list[dict[str, Any]]) -> torch.Tensor:
    return torch.stack([item["image"] for item in items])


def _tidy(entry: dict[str, Any]) -> dict[str, Any]:
    """Returns the entry with slashes in its image's path."""
    return {**entry, "image": with_slashes(entry.get("image"))}


def _pair_problem(entry: dict[str, Any]) -> str | None:
    if not isinstance(entry.get("caption"), str):
        return "has no 'caption' that is text, as a training entry has"
    if not isinstance(entry.get("image_id"), str | int):
        return "has no 'image_id' that is text or a whole number"
    return _image_problem(entry)


def _captioned_problem(entry: dict[str, Any]) -> str | None:
    captions = entry.get("caption")
    if not isinstance(captions, list) or not captions or not all(isinstance(caption, str) for caption in captions):
        return "has no 'caption' that is a list of texts, as an evaluation entry has"
    return _image_problem(entry)


def _image_problem(entry: dict[str, Any]) -> str | None:
    if not isinstance(entry.get("image"), str) or not entry["image"]:
        return "has no 'image' that is a path"
    return None
