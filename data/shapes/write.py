"""Writing of Shapes data sets in the published file formats.

    DIR/images/nlvr/SPLIT/00012/0006012a.jpg       left picture of pair 6012 (right: b)
    DIR/images/single/SPLIT/00012/SPLIT_0006012.jpg       for captions and questions
    DIR/images/family/SPLIT/00012/SPLIT_0006012.jpg       for retrieval
    DIR/annotations/*.json, DIR/annotations/coco_gt/*.json, DIR/annotations/vocab.txt

Every random stream is seeded by (seed, world, split, stream, index). The files are therefore
identical byte for byte for any number of processes, and no two splits share a picture.
"""

import json
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.shapes.families import FAMILY, distinctive_caption, draw_family
from data.shapes.search import FULL, PAIRS_PER_CHUNK, Level, make_chunk
from data.shapes.tasks import answer_list, ask, caption, ten_answers, vocabulary
from data.shapes.world import Scene, draw, encode, random_scene

TASKS = ("nlvr", "caption", "vqa", "retrieval")
SPLITS = ("train", "val", "test")  # NLVR2 calls its "val" "dev"
CAPTIONS = 5  # per picture
QUESTIONS = 3  # per training picture; pictures of val and test get one
PICTURES_PER_FOLDER = 500
SINGLES_PER_CHUNK = 500  # a multiple of FAMILY, so that chunks hold whole families
# Parts of the random seeds: worlds, then streams.
PAIRS, SINGLES, FAMILIES = range(3)
CONTENT, LEFT, RIGHT, COCO, FLICKR, VQA, VG = range(7)

Rows = dict[str, list[dict]]  # annotation file -> its entries
Progress = Callable[[Iterable, int, str], Iterable]


class Chunk(NamedTuple):
    """A unit of work for one process: pictures `start` to `start + number - 1` of a split."""

    out: Path
    seed: int
    split: str
    start: int
    number: int
    tasks: tuple[str, ...]
    statements_per_pair: int
    level: Level

    def rng(self, world: int, stream: int, index: int) -> np.random.Generator:
        return np.random.default_rng((self.seed, world, SPLITS.index(self.split), stream, index))


def save_picture(chunk: Chunk, world: int, stream: int, index: int, scene: Scene) -> str:
    """Draws a scene and writes its file. Returns the path relative to the image root."""
    if world == PAIRS:
        folder, name = "nlvr", f"{index:07d}{'a' if stream == LEFT else 'b'}"
    else:
        folder, name = "single" if world == SINGLES else "family", f"{chunk.split}_{index:07d}"
    path = f"{folder}/{chunk.split}/{index // PICTURES_PER_FOLDER:05d}/{name}.jpg"
    file = chunk.out / "images" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encode(draw(chunk.rng(world, stream, index), scene)))
    return path


def write_pairs(chunk: Chunk) -> Rows:
    """Writes the pictures of a chunk of pairs. Returns their NLVR2 entries."""
    entries = []
    rng = chunk.rng(PAIRS, CONTENT, chunk.start)
    pairs = make_chunk(rng, chunk.number, chunk.statements_per_pair, chunk.level)
    for index, (left, right, told) in enumerate(pairs, chunk.start):
        images = [save_picture(chunk, PAIRS, stream, index, scene) for stream, scene in ((LEFT, left), (RIGHT, right))]
        entries += [{"sentence": statement.text(), "label": str(label), "images": images} for statement, label in told]
    return {f"nlvr_{'dev' if chunk.split == 'val' else chunk.split}.json": entries}


def caption_rows(chunk: Chunk, index: int, image: str, captions: list[str], dataset: str) -> Rows:
    """Returns the captions of one picture: an entry for each caption in training, one entry with all in evaluation."""
    if chunk.split != "train":
        entries = [{"image": image, "caption": captions}]
    else:
        image_id = f"{dataset}_{index}"
        entries = [{"image": image, "caption": c, "image_id": image_id} for c in captions]
    name = {"coco": "coco_karpathy", "flickr": "flickr30k"}[dataset]
    return {f"{name}_{chunk.split}.json": entries}


def question_rows(chunk: Chunk, index: int, image: str, scene: Scene) -> Rows:
    """Returns the questions about one picture. A training picture also gets one in the format of Visual Genome."""
    rng = chunk.rng(SINGLES, VQA, index)
    number = QUESTIONS if chunk.split == "train" else 1
    entries = []
    for i in range(number):
        topic, question, answer = ask(rng, scene)
        entries.append(
            {
                "question_id": index * number + i,
                "question": question,
                "answer": ten_answers(rng, topic, answer),
                "image": image,
                "dataset": "vqa",
            }
        )
    rows = {f"vqa_{chunk.split}.json": entries}
    if chunk.split == "train":
        _, question, answer = ask(chunk.rng(SINGLES, VG, index), scene)
        entry = {"question_id": index, "question": question, "answer": answer}
        rows["vg_qa.json"] = [{**entry, "image": image, "dataset": "vg"}]
    return rows


def write_singles(chunk: Chunk) -> Rows:
    """Writes the pictures of a chunk. Returns their captions and questions."""
    rows: Rows = {}
    for index in range(chunk.start, chunk.start + chunk.number):
        scene = random_scene(chunk.rng(SINGLES, CONTENT, index), chunk.level.most)
        image = save_picture(chunk, SINGLES, LEFT, index, scene)
        if "caption" in chunk.tasks:
            rng = chunk.rng(SINGLES, COCO, index)
            captions = [caption(rng, scene) for _ in range(CAPTIONS)]
            append(rows, caption_rows(chunk, index, image, captions, "coco"))
        if "vqa" in chunk.tasks:
            append(rows, question_rows(chunk, index, image, scene))
    return rows


def write_families(chunk: Chunk) -> Rows:
    """Writes the pictures of a chunk for retrieval, family by family. Returns their captions. The last family may be cut."""
    rows: Rows = {}
    end = chunk.start + chunk.number
    for start in range(chunk.start, end, FAMILY):
        family = draw_family(chunk.rng(FAMILIES, CONTENT, start), chunk.level.most)
        for index, scene in enumerate(family[: end - start], start):
            siblings = [sibling for sibling in family if sibling is not scene]
            image = save_picture(chunk, FAMILIES, LEFT, index, scene)
            rng = chunk.rng(FAMILIES, FLICKR, index)
            captions = [distinctive_caption(rng, scene, siblings) for _ in range(CAPTIONS)]
            append(rows, caption_rows(chunk, index, image, captions, "flickr"))
    return rows


def append(rows: Rows, more: Rows) -> None:
    for file, entries in more.items():
        rows.setdefault(file, []).extend(entries)


def coco_ground_truth(entries: list[dict]) -> dict:
    """Converts entries to COCO's caption format. The id of an image is the number at the end of its file name."""
    images, annotations = [], []
    for entry in entries:
        image_id = int(Path(entry["image"]).stem.split("_")[-1])
        images.append({"id": image_id, "file_name": entry["image"]})
        for text in entry["caption"]:
            annotations.append({"id": len(annotations), "image_id": image_id, "caption": text})
    kind = {"info": {}, "licenses": [], "type": "captions"}
    return {**kind, "images": images, "annotations": annotations}


def chunks(template: Chunk, sizes: dict[str, int], per_chunk: int) -> list[Chunk]:
    """Cuts all splits into chunks. Only training pairs get more than one statement."""
    return [
        template._replace(
            split=split,
            start=start,
            number=min(per_chunk, size - start),
            statements_per_pair=template.statements_per_pair if split == "train" else 1,
        )
        for split, size in sizes.items()
        for start in range(0, size, per_chunk)
    ]


def run_chunks(work: Callable[[Chunk], Rows], todo: list[Chunk], workers: int, progress: Progress, label: str) -> Rows:
    """Runs `work` on all chunks in `workers` processes. Returns the entries in the order of the chunks."""
    rows: Rows = {}

    def collect(results: Iterator[Rows]) -> None:
        for part in progress(results, len(todo), label):
            append(rows, part)

    if workers == 1:
        collect(map(work, todo))
    else:
        with multiprocessing.get_context("spawn").Pool(min(workers, len(todo))) as pool:
            collect(pool.imap(work, todo))
    return rows


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def no_progress(results: Iterable, total: int, label: str) -> Iterable:
    return results


def check(tasks: Sequence[str], level: Level, *sizes: int) -> None:
    """Raises a ValueError for arguments that `make_shapes` does not support."""
    if not tasks or not set(tasks) <= set(TASKS):
        raise ValueError(f"tasks must be some of {', '.join(TASKS)}; got {tuple(tasks)}")
    if not level.templates or not set(level.templates) <= set(FULL.templates):
        raise ValueError(f"templates must be some of {', '.join(FULL.templates)}; got {level.templates}")
    if min(sizes) < 1:
        raise ValueError("size, eval_size, val_size and statements_per_pair must be at least 1")


def make_shapes(
    out: Path,
    seed: int,
    size: int,
    tasks: Iterable[str] = TASKS,
    statements_per_pair: int = 1,
    eval_size: int = 4000,
    workers: int | None = None,
    level: Level = FULL,
    progress: Progress = no_progress,
    val_size: int | None = None,
) -> None:
    """Writes a Shapes data set to the folder `out`.

    Args:
        out: the folder.
        seed: of all random numbers.
        size: number of training pairs, and of training pictures for the other tasks.
        tasks: some of TASKS.
        statements_per_pair: statements about each training pair.
        eval_size: number of test pairs (and pictures).
        workers: number of processes; None is one per CPU core.
        level: the difficulty.
        progress: wraps the iterator of finished chunks, such as in a progress bar.
        val_size: number of validation pairs (and pictures); None is `eval_size`.
    """
    out, tasks = Path(out), tuple(tasks)
    val_size = eval_size if val_size is None else val_size
    check(tasks, level, size, eval_size, val_size, statements_per_pair)
    workers = workers or os.cpu_count() or 1
    sizes = {"train": size, "val": val_size, "test": eval_size}
    template = Chunk(out, seed, "train", 0, 0, tasks, statements_per_pair, level)
    rows: Rows = {}
    if "nlvr" in tasks:
        todo = chunks(template, sizes, PAIRS_PER_CHUNK)
        rows.update(run_chunks(write_pairs, todo, workers, progress, "pairs"))
    todo = chunks(template, sizes, SINGLES_PER_CHUNK)
    if {"caption", "vqa"} & set(tasks):
        rows.update(run_chunks(write_singles, todo, workers, progress, "pictures"))
    if "retrieval" in tasks:
        rows.update(run_chunks(write_families, todo, workers, progress, "families"))

    annotations = out / "annotations"
    for file, entries in rows.items():
        write_json(annotations / file, entries)
    if "caption" in tasks:
        for split in ("val", "test"):
            truth = coco_ground_truth(rows[f"coco_karpathy_{split}.json"])
            write_json(annotations / "coco_gt" / f"coco_karpathy_{split}_gt.json", truth)
    if "vqa" in tasks:
        write_json(annotations / "answer_list.json", answer_list())
    (annotations / "vocab.txt").write_text("\n".join(vocabulary()) + "\n", encoding="utf-8")
