"""Own data: a table with a row per caption, question or statement, read as entries of annotation files.

    image,caption,split                    retrieval and captioning
    image,question,answer,split            VQA
    image_a,image_b,sentence,label,split   NLVR2

A CSV file (.tsv: with tabs) has the columns in its first line, a JSONL file an object with these keys on each line. Without the
column `split` pictures are drawn for the splits, so that no picture is in two of them.
"""

import csv
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.table import SPLITS, TablePart
from utils import UserError, logger

PICTURES = {"nlvr": ("image_a", "image_b")}  # of a task's row; of other tasks `image`
TEXTS = {"nlvr": ("sentence", "label"), "vqa": ("question", "answer")}  # of other tasks `caption`
MAY_BE_LISTS = ("caption", "answer")  # in JSONL

Row = dict[str, Any]
Numbered = tuple[int, Row]  # with the number of its line


def read_part(part: TablePart) -> list[Numbered]:
    """Reads the rows of a split as entries in BLIP's annotation format, each with the number of its line.

    Raises:
        UserError: naming the line, when the table cannot be read, a column or a value is missing, or a split is not known or empty.
    """
    pictures, texts = PICTURES.get(part.task, ("image",)), TEXTS.get(part.task, ("caption",))
    rows = []
    for line, row in _rows(part.table, (*pictures, *texts)):
        rows.append((line, {**row, **{key: row[key].replace("\\", "/") for key in pictures}}))
    splits = _named_splits(part, rows) if any("split" in row for _, row in rows) else _drawn_splits(part, rows, pictures)
    chosen = []
    for (line, row), split in zip(rows, splits, strict=True):
        if split == part.split:
            _check_texts(part, line, row, texts)
            chosen.append((line, row))
    if not chosen:
        way = "give it some rows" if any("split" in row for _, row in rows) else "set the key 'split_shares', or add pictures"
        raise UserError(f"{part.table}: has no rows of the split '{part.split}'; {way}")
    if part.split == "test":  # which is read once
        _warn_of_shared_pictures(part, rows, splits, pictures)
    return list(ENTRIES.get(part.task, _captioned)(part, chosen))


def _rows(table: Path, columns: tuple[str, ...]) -> Iterator[Numbered]:
    """Yields the rows of a table with the numbers of their lines; their pictures are texts that are not empty."""
    read = _json_lines if table.suffix in (".jsonl", ".ndjson") else _csv_lines
    if table.suffix not in (".jsonl", ".ndjson", ".csv", ".tsv"):
        raise UserError(f"{table}: not a table; set the key 'table' to a file that ends in .csv, .tsv or .jsonl")
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            for line, row in read(file, table, columns):
                for column in columns:
                    if column.startswith("image") and not (isinstance(row.get(column), str) and row[column].strip()):
                        raise UserError(f"{table}: line {line} has no '{column}' that is a path; correct the line")
                yield line, row
    except OSError as error:
        raise UserError(f"{table}: {error.strerror or error}; set the key 'table' to a CSV or JSONL file") from None
    except UnicodeDecodeError:
        raise UserError(f"{table}: not text in UTF-8; save it as CSV in UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{table}: not valid CSV ({error}); save it anew") from None


def _csv_lines(file: Any, table: Path, columns: tuple[str, ...]) -> Iterator[Numbered]:
    reader = csv.reader(file, delimiter="\t" if table.suffix == ".tsv" else ",", strict=True)
    header = [name.strip() for name in next(reader, [])]
    if missing := [column for column in columns if column not in header]:
        has = ", ".join(header) or "none"
        raise UserError(f"{table}: line 1 has no column '{missing[0]}', only {has}; name the columns {', '.join(columns)} there")
    line = reader.line_num + 1
    for cells in reader:
        if cells and len(cells) != len(header):
            raise UserError(f"{table}: line {line} has {len(cells)} cells for {len(header)} columns; quote texts that hold commas")
        if cells:
            yield line, dict(zip(header, cells, strict=True))
        line = reader.line_num + 1  # a quoted text may have several lines


def _json_lines(file: Any, table: Path, columns: tuple[str, ...]) -> Iterator[Numbered]:
    for line, text in enumerate(file, start=1):
        if not text.strip():
            continue
        try:
            row = json.loads(text)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{table}: line {line} is not a JSON object; write one on each line")
        yield line, row


def _check_texts(part: TablePart, line: int, row: Row, texts: tuple[str, ...]) -> None:
    for column in texts:
        value = row.get(column)
        if column == "label" and isinstance(value, bool | int) or column == "answer" and part.split == "test" and not value:
            continue
        parts = value if isinstance(value, list) and column in MAY_BE_LISTS else [value]
        if not parts or not all(isinstance(text, str) and text.strip() for text in parts):
            raise UserError(f"{part.table}: line {line} has no '{column}' that is text; correct the line")


def _named_splits(part: TablePart, rows: list[Numbered]) -> list[str]:
    """Returns the column `split` of all rows."""
    for line, row in rows:
        if row.get("split") not in SPLITS:
            raise UserError(
                f"{part.table}: line {line} has the split {row.get('split')!r}, not {', '.join(SPLITS)}; correct the line, or leave"
                " the column out"
            )
    return [row["split"] for _, row in rows]


def _drawn_splits(part: TablePart, rows: list[Numbered], pictures: tuple[str, ...]) -> list[str]:
    """Draws a split for each row. Rows that share a picture, or are joined by others that do, get the same one."""
    group: dict[str, str] = {}  # picture -> another one of its group, up to the first

    def first(picture: str) -> str:
        while group.setdefault(picture, picture) != picture:
            group[picture] = picture = group[group[picture]]
        return picture

    for _, row in rows:
        for column in pictures:
            group[first(row[column])] = first(row[pictures[0]])
    members: dict[str, list[str]] = {}
    for picture in group:
        members.setdefault(first(picture), []).append(picture)
    keys = {root: hashlib.sha256(f"{part.seed} {min(those)}".encode()).digest() for root, those in members.items()}
    split_of, done = {}, 0
    for root in sorted(members, key=keys.__getitem__):
        middle = (done + len(members[root]) / 2) / len(group)
        split_of[root] = SPLITS[(middle >= part.shares[0]) + (middle >= part.shares[0] + part.shares[1])]
        done += len(members[root])
    return [split_of[first(row[pictures[0]])] for _, row in rows]


def _warn_of_shared_pictures(part: TablePart, rows: list[Numbered], splits: list[str], pictures: tuple[str, ...]) -> None:
    trained: set[str] = set()
    evaluated: set[str] = set()
    for (_, row), split in zip(rows, splits, strict=True):
        (trained if split == "train" else evaluated).update(row[column] for column in pictures)
    if shared := trained & evaluated:
        logger.warning("%s: %d pictures are trained on and evaluated, the first %s", part.table, len(shared), min(shared))


def _captioned(part: TablePart, rows: list[Numbered]) -> Iterator[Numbered]:
    for line, row in rows:
        captions = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        if part.split == "train":
            yield from ((line, {"image": row["image"], "caption": text, "image_id": row["image"]}) for text in captions)
        else:
            yield line, {"image": row["image"], "caption": captions}


def _asked(part: TablePart, rows: list[Numbered]) -> Iterator[Numbered]:
    """Joins rows that ask the same of the same picture: their answers are those of several annotators."""
    questions: dict[tuple[str, str], Numbered] = {}
    for line, row in rows:
        entry = {
            "question_id": row.get("question_id") or line,
            "dataset": "vqa",
            "question": row["question"],
            "image": row["image"],
        }
        _, known = questions.setdefault((row["image"], row["question"]), (line, entry))
        if answers := row.get("answer"):
            known["answer"] = known.get("answer", []) + (answers if isinstance(answers, list) else [answers])
    yield from questions.values()


def _stated(part: TablePart, rows: list[Numbered]) -> Iterator[Numbered]:
    for line, row in rows:
        yield line, {"sentence": row["sentence"], "label": row["label"], "images": [row["image_a"], row["image_b"]]}


ENTRIES = {"nlvr": _stated, "vqa": _asked}
