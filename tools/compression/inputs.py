"""The pictures and texts on which tools/compress.py calibrates and measures a model."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from PIL import Image, ImageOps

from madtp.patch.base import Batch
from tools.compression.sources import Source
from utils import UserError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
LEAST = 8  # fewer pictures are too few


def read_pictures(folder: Path, number: int) -> tuple[list[Image.Image], list[str]]:
    """Reads up to `number` pictures, spread over the folder, upright and as RGB.

    Returns the pictures, and the names of the files that could not be read.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    chosen = [files[index * len(files) // min(number, len(files))] for index in range(min(number, len(files)))]
    pictures, skipped = [], []
    for file in chosen:
        try:
            with Image.open(file) as picture:
                pictures.append(ImageOps.exif_transpose(picture).convert("RGB"))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # PIL's errors for broken files
            skipped.append(str(file.relative_to(folder)))
    if len(pictures) < LEAST:
        raise UserError(f"--images {folder}: has {len(pictures)} readable pictures; give {LEAST} or more ({', '.join(SUFFIXES)})")
    return pictures, skipped


def read_texts(file: Path | None, source: Source) -> list[str] | None:
    if file is None:
        return None
    if source.tokenize is None:
        raise UserError(f"--texts: {source.architecture} in {source.folder} reads no texts, or has no tokenizer; leave it out")
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"--texts {file}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}; give a text file") from None
    if not lines:
        raise UserError(f"--texts {file}: is empty; give a text per line")
    return lines


def batches_of(
    source: Source, pictures: Sequence[Image.Image], texts: Sequence[str] | None, size: int, device: torch.device
) -> Iterator[Batch]:
    """Yields batches of pictures, each with the next text; all texts have the length of the longest."""
    words = None if texts is None else [texts[index % len(texts)] for index in range(len(pictures))]
    for start in range(0, len(pictures), size):
        some = slice(start, start + size)
        yield moved(source.batch(pictures[some], None if words is None else words[some]), device)


def moved(batch: Batch, device: torch.device) -> Batch:
    if isinstance(batch, torch.Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {name: values.to(device) for name, values in batch.items()}
    return tuple(values.to(device) for values in batch)
