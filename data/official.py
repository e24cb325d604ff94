"""The files in which the authors of COCO, Karpathy's splits, VQA v2 and NLVR2 publish their annotations, as BLIP's.

Each function returns the entries of the annotation files by their names, without .json.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.loading import read_json
from utils import UserError

Entries = dict[str, list[dict[str, Any]]]

KARPATHY_SPLITS = {"train": "train", "restval": "train", "val": "val", "test": "test"}  # BLIP trains on restval too
NLVR_SPLITS = {"train": "nlvr_train", "dev": "nlvr_dev", "test1": "nlvr_test", "test2": "nlvr_test2"}
_IDENTIFIER = re.compile(r"(?P<split>[a-z]+\d?)-(?P<set>\d+)-(?P<pair>\d+)-\d+")
_SUBSET = re.compile(r"(train|val|test)\d{4}")
VQA_SUBSETS = {"train2014": "vqa_train", "val2014": "vqa_val", "test2015": "vqa_test", "test-dev2015": "vqa_test_dev"}


def from_coco(files: Sequence[Path]) -> Entries:
    """Reads COCO's captions, captions_train2014.json and the like: a training file has an entry per caption, another one per image.

    COCO publishes no captions of its test images.

    Raises:
        UserError: when a file has another format, or names no split.
    """
    found: Entries = {}
    for file in files:
        subset = _SUBSET.search(file.stem)
        if subset is None:
            raise UserError(f"{file}: its name holds no split, such as train2014; give COCO's file under its own name")
        content = _object(file, "images", "annotations")
        names = {_of(image, "id", file): _of(image, "file_name", file) for image in content["images"]}
        captions: dict[Any, list[str]] = {}
        for number, annotation in enumerate(content["annotations"]):
            image = _of(annotation, "image_id", file)
            if image not in names:
                raise UserError(f"{file}: annotation {number} is of image {image}, which is not among its images; fetch it again")
            captions.setdefault(image, []).append(_of(annotation, "caption", file))
        paths = {image: f"{subset[0]}/{name}" for image, name in names.items() if image in captions}
        images = ((paths[image], f"coco_{image}", captions[image]) for image in paths)
        found.setdefault(f"coco_{subset[1]}", []).extend(_pairs_or_groups(subset[1], images))
    return found


def from_karpathy(files: Sequence[Path]) -> Entries:
    """Reads Karpathy's dataset_coco.json and dataset_flickr30k.json. `restval` is trained on, as in BLIP's files.

    Raises:
        UserError: when a file has another format, or an image an unknown split.
    """
    found: Entries = {}
    for file in files:
        content = _object(file, "images", "dataset")
        stem = {"coco": "coco_karpathy", "flickr30k": "flickr30k"}.get(content["dataset"])
        if stem is None:
            raise UserError(f"{file}: is of the data set {content['dataset']!r}; give dataset_coco.json or dataset_flickr30k.json")
        folder = "flickr30k-images" if stem == "flickr30k" else None
        splits: dict[str, list[tuple[str, str, list[str]]]] = {"train": [], "val": [], "test": []}
        for number, image in enumerate(content["images"]):
            split = KARPATHY_SPLITS.get(_of(image, "split", file))
            if split is None:
                known = ", ".join(KARPATHY_SPLITS)
                raise UserError(f"{file}: image {number} has the split {image['split']!r}, not one of {known}; fetch it again")
            path = f"{folder or _of(image, 'filepath', file)}/{_of(image, 'filename', file)}"
            name = f"coco_{image['cocoid']}" if "cocoid" in image else f"{stem}_{_of(image, 'imgid', file)}"
            splits[split].append((path, name, [_of(sentence, "raw", file) for sentence in _of(image, "sentences", file)]))
        found |= {f"{stem}_{split}": _pairs_or_groups(split, images) for split, images in splits.items()}
    return found


def from_vqa(files: Sequence[Path], min_count: int) -> Entries:
    """Reads VQA v2's questions with their annotations, which test questions lack, and lists the candidate answers.

    Args:
        files: of questions and of annotations, in any order.
        min_count: an answer is a candidate if it is the most frequent one of this many questions.

    Raises:
        UserError: when a file has another format or an unknown subset, or questions and annotations do not belong together.
    """
    asked: dict[str, dict[Any, dict]] = {}
    answered: dict[str, dict[Any, dict]] = {}
    sources: dict[str, Path] = {}
    for file in files:
        content = _object(file)
        kind = next((kind for kind in ("questions", "annotations") if isinstance(content.get(kind), list)), None)
        subset = content.get("data_subtype")
        if kind is None or subset not in VQA_SUBSETS:
            known = ", ".join(VQA_SUBSETS)
            said = "holds neither questions nor annotations" if kind is None else f"is of the split {subset!r}, not one of {known}"
            raise UserError(f"{file}: {said}; give VQA's official files")
        by_id = {_of(entry, "question_id", file): entry for entry in content[kind]}
        (asked if kind == "questions" else answered)[subset] = by_id
        sources[subset] = file
    found: Entries = {}
    for subset in dict.fromkeys([*asked, *answered]):
        known, needed = answered.get(subset), not subset.startswith("test")
        if subset not in asked or needed and known is None:
            lacking = "questions" if subset not in asked else "annotations"
            raise UserError(f"{sources[subset]}: the {lacking} of {subset} are not given; add their file")
        found[VQA_SUBSETS[subset]] = [_question(entry, subset, known, sources[subset]) for entry in asked[subset].values()]
        if known and (extra := next((question for question in known if question not in asked[subset]), None)) is not None:
            raise UserError(
                f"{sources[subset]}: question {extra} has an annotation and is not among the questions; is it of VQA v1?"
            )
    counts = Counter(
        _of(entry, "multiple_choice_answer", sources[subset]) for subset in answered for entry in answered[subset].values()
    )
    if candidates := [answer for answer, number in counts.most_common() if number >= min_count]:
        found["answer_list"] = candidates  # type: ignore[assignment]
    return found


def from_nlvr(files: Sequence[Path]) -> Entries:
    """Reads NLVR2's train.json, dev.json, test1.json and test2.json, an object on each line.

    Raises:
        UserError: naming the line that has another format, or an unknown split.
    """
    found: Entries = {}
    for file in files:
        for line, row in _lines(file):
            named = _IDENTIFIER.fullmatch(str(row.get("identifier")))
            if named is None or named["split"] not in NLVR_SPLITS:
                known = ", ".join(NLVR_SPLITS)
                raise UserError(
                    f"{file}: line {line} has the identifier {row.get('identifier')!r}, of none of the splits {known}; give NLVR2's"
                    " own files"
                )
            split = named["split"]
            folder = f"images/{split}" + (f"/{row['directory']}" if "directory" in row else "")
            stem = f"{folder}/{split}-{named['set']}-{named['pair']}"
            if not isinstance(row.get("sentence"), str) or str(row.get("label")) not in ("True", "False"):
                raise UserError(f"{file}: line {line} has no 'sentence' with the 'label' True or False; fetch it again")
            entry = {"sentence": row["sentence"], "label": str(row["label"]), "images": [f"{stem}-img0.png", f"{stem}-img1.png"]}
            found.setdefault(NLVR_SPLITS[split], []).append(entry)
    return found


def pictures_of(entries: Sequence[Any]) -> list[str]:
    """Returns the distinct pictures of the entries of an annotation file; none of a list of answers."""
    named = (entry.get("images") or [entry["image"]] for entry in entries if isinstance(entry, dict))
    return list(dict.fromkeys(name for names in named for name in names))


def _pairs_or_groups(split: str, images: Any) -> list[dict[str, Any]]:
    """Returns an entry per caption for training, and per image otherwise; images: (path, id, captions)."""
    if split == "train":
        return [{"image": path, "caption": text, "image_id": name} for path, name, captions in images for text in captions]
    return [{"image": path, "caption": captions} for path, _, captions in images]


def _question(entry: dict, subset: str, known: dict[Any, dict] | None, source: Path) -> dict[str, Any]:
    question, image = _of(entry, "question_id", source), _of(entry, "image_id", source)
    folder = "test2015" if subset.startswith("test") else subset
    asked = {"question_id": question, "question": _of(entry, "question", source), "dataset": "vqa"}
    asked["image"] = f"{folder}/COCO_{folder}_{int(image):012d}.jpg"
    if known is None:
        return asked
    if question not in known:
        raise UserError(f"{source}: question {question} has no annotation; give the files of one version of VQA")
    return {**asked, "answer": _answers(known[question], source)}


def _answers(annotation: dict, source: Any) -> list[str]:
    return [_of(answer, "answer", source) for answer in _of(annotation, "answers", source)]


def _lines(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: {getattr(error, 'strerror', None) or 'not a text file'}; give NLVR2's own file") from None
    for line, text in enumerate(lines, start=1):
        if text.strip():
            try:
                row = json.loads(text)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise UserError(f"{file}: line {line} is not a JSON object, as NLVR2's lines are; is it cut off? Fetch it again")
            yield line, row


def _object(file: Path, *keys: str) -> dict[str, Any]:
    content = read_json(file)
    missing = [key for key in keys if key not in content] if isinstance(content, dict) else list(keys) or ["questions"]
    if missing:
        raise UserError(f"{file}: has no '{missing[0]}', as the official file has; give that file")
    return content


def _of(entry: Any, key: str, source: Any) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        raise UserError(f"{source}: an entry has no '{key}', as the official file has; fetch it again")
    return entry[key]
