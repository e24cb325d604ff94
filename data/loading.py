"""Reading of files, and data loaders whose samples do not depend on the number of processes and workers."""

import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from configs.table import TablePart
from data.formats import CONVERT, foreign_entry, foreign_format, is_json_lines
from data.table import read_part
from utils import Run, UserError, logger

CHECKED = 3  # number of entries whose images must exist at start-up
SUBSTITUTES = 10  # samples tried in place of one whose picture cannot be read, before the run stops: then the disk is at fault


class BadPicture(UserError):
    """A picture that is missing or cannot be read."""


class Annotated(NamedTuple):
    """The content of an annotation file: the number of samples, and the distinct pictures, each of which `read` reads."""

    samples: int
    pictures: list[Any]
    read: Callable[[Any], Image.Image]


def read_json(path: str | Path, key: str = "ann_root") -> Any:
    """Reads a JSON file, in any Unicode encoding. `key` is the config key of its folder, for the error message.

    Raises:
        UserError: when the file is missing, or is not valid JSON; names the line of the first error.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
        text = content.decode(json.detect_encoding(content)).removeprefix("\ufeff")
        return json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; set the key '{key}' to the folder that it lies in") from None
    except json.JSONDecodeError as error:
        if is_json_lines(text):
            raise UserError(f"{path}: has an object on each line (JSONL, as NLVR2's own files are); {CONVERT}") from None
        raise UserError(
            f"{path}: not valid JSON at line {error.lineno}, column {error.colno} ({error.msg}); is it cut off? Write it again"
        ) from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; write it again as JSON") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply for annotations; write it again as JSON") from None


def read_entries(
    file: Path | TablePart, problem: Callable[[dict[str, Any]], str | None], tidy: Callable[[dict[str, Any]], dict[str, Any]] = dict
) -> list[dict[str, Any]]:
    """Reads the entries of an annotation file, or of a split of a table.

    Args:
        problem: returns the error in an entry, or None.
        tidy: returns an entry with other spellings of its values replaced; called first.

    Raises:
        UserError: when the file is not a list, is empty, or has an entry with an error; names a format of others.
    """
    if isinstance(file, TablePart):
        numbered = [(line, tidy(entry)) for line, entry in read_part(file)]
        if found := next(((line, said) for line, entry in numbered if (said := problem(entry))), None):
            raise UserError(f"{file.table}: line {found[0]} {found[1]}; correct the line")
        return [entry for _, entry in numbered]
    entries = read_json(file)
    if isinstance(entries, dict) and (theirs := foreign_format(entries)):
        raise UserError(f"{file}: is in the format of {theirs}; {CONVERT}")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{file}: must be a list of entries, and not empty; write it again")
    for index, entry in enumerate(entries):
        if isinstance(entry, dict):
            entries[index] = tidy(entry)
        found = problem(entries[index]) if isinstance(entry, dict) else "is not an object"
        if found and (theirs := foreign_entry(entry)):
            raise UserError(f"{file}: is in the format of {theirs}: entry {index} {found}; {CONVERT}")
        if found:
            raise UserError(f"{file}: entry {index} {found}; write the file again")
    return entries


def with_slashes(name: Any) -> Any:
    """Returns an image path of an annotation file with slashes, as Windows may have written it with backslashes."""
    return name.replace("\\", "/") if isinstance(name, str) else name


def load_image(path: str | Path, key: str = "image_root") -> Image.Image:
    """Reads an image as RGB. `key` is the config key of its folder, for the error message.

    Raises:
        BadPicture: when the image is missing or unreadable.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise no_such_picture(path, key) from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # PIL's errors for broken files
        raise BadPicture(f"{path}: not a readable picture ({error}); fetch it again") from None


def check_images(image_root: Path, names: Iterable[str], key: str = "image_root") -> None:
    """Checks that the images `names` exist in `image_root`, the folder of the config key `key`.

    Called for a few images at start-up, so that a wrong folder stops a run before it begins.

    Raises:
        BadPicture: when one is missing; names it.
    """
    for name in names:
        if not (image_root / name).exists():
            raise no_such_picture(image_root / name, key)


def no_such_picture(path: str | Path, key: str = "image_root") -> BadPicture:
    """Returns the error for a picture that is missing; it names one that differs only in upper and lower case."""
    path = Path(path)
    names = sorted(os.listdir(path.parent)) if path.parent.is_dir() else []
    alike = next((name for name in names if name.lower() == path.name.lower()), None)
    if alike is not None:
        return BadPicture(f"{path}: no such picture, but {alike} is there; rename the file, or correct the annotations")
    return BadPicture(f"{path}: no such picture; set the key '{key}' to the folder that holds it")


def calibration_subset(dataset: Dataset, size: int) -> Subset:
    """Returns `size` items (all, if there are fewer) spread over the dataset, the same on every process and in every run.

    Splits the dataset into `size` equal parts and draws one item of each with a fixed seed. A fixed step would always pick
    the same of an image's texts, for example its first caption.
    """
    size = min(size, len(dataset))
    places = torch.rand(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).tolist()
    return Subset(dataset, [int((stretch + place) * len(dataset) / size) for stretch, place in enumerate(places)])


class Loader(DataLoader):
    """A DataLoader that raises the UserErrors of its workers unchanged; torch would wrap a traceback into the message.

    replaced: the error of each sample that another one took the place of, in the last pass over the data
    """

    replaced: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        self.replaced = ()
        for batch in super().__iter__():
            if isinstance(batch, UserError):
                raise UserError(*batch.args)  # raising `batch` itself would make a reference cycle of frame and traceback
            if isinstance(batch, _Mended):
                for said in batch.errors:
                    if said not in self.replaced:
                        logger.warning("skipped: %s", said)
                    self.replaced += (said,)
                batch = batch.content
            yield batch


class _Mended(NamedTuple):
    """A sample, or a batch, with the errors of the samples that it was read in place of."""

    content: Any
    errors: list[str]


def build_loader(
    dataset: Dataset,
    batch_size: int,
    *,
    train: bool,
    run: Run,
    num_workers: int,
    seed: int,
    collate: Callable[[list], Any],
    epoch_steps: int | None = None,
    replace_bad: bool = False,
) -> Loader:
    """Builds a loader of batches of `batch_size` items per process, collated by `collate`.

    Training: the order changes with the epoch (see `set_epoch`). Every process gets the same number of full batches, at most
    `epoch_steps`.
    Evaluation: every item comes exactly once over all processes, in order. The last batch may be smaller, and the shares of
    the processes may differ by one item.
    The randomness of a sample depends only on seed, epoch and index, not on workers, processes or resuming.
    With `replace_bad`, another sample takes the place of one whose picture cannot be read; which one depends on the same three.

    Raises:
        UserError: when the data do not fill one training batch. Iterating raises the UserErrors of `dataset`.
    """
    if train and len(dataset) // run.world_size < batch_size:
        raise UserError(
            f"{len(dataset)} training samples do not fill a batch of {batch_size} on each of {run.world_size} processes;"
            " lower 'batch_size_train', or for NLVR2 'statements_per_pair'"
        )
    workers = min(num_workers, os.cpu_count() or 1)
    return Loader(
        _Reproducible(dataset, seed, SUBSTITUTES if replace_bad else 0),
        batch_size,
        sampler=_Order(len(dataset), train, run, seed, epoch_steps and epoch_steps * batch_size),
        drop_last=train,
        num_workers=workers,
        persistent_workers=train and workers > 0,  # evaluation workers would hold memory for the rest of the run
        pin_memory=run.device.type == "cuda",
        collate_fn=partial(_collate_or_error, collate),
        generator=torch.Generator().manual_seed(seed),  # otherwise each epoch would draw from the global generator
    )


class _Order(Sampler):
    """A sampler of (epoch, index) pairs: persistent workers hold a copy of the dataset and would miss a change of epoch."""

    def __init__(self, length: int, train: bool, run: Run, seed: int, most: int | None = None) -> None:
        self.length, self.train, self.run, self.seed, self.most = length, train, run, seed, most
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch (from 0), which fixes order and randomness. Call it before iterating over a training loader."""
        self.epoch = epoch

    def __len__(self) -> int:
        if self.train:
            return min(self.length // self.run.world_size, self.most or self.length)
        return len(range(self.run.rank, self.length, self.run.world_size))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = range(self.length)
        if self.train:
            generator = torch.Generator().manual_seed(_mix(self.seed, self.epoch))
            order = torch.randperm(self.length, generator=generator).tolist()
        mine = order[self.run.rank :: self.run.world_size][: len(self)]
        return iter([(self.epoch, index) for index in mine])


class _Reproducible(Dataset):
    """A dataset wrapper that seeds every sample separately and restores the random state of the process after it.

    Up to `substitutes` other samples are tried in place of one whose picture cannot be read; the item is then _Mended.
    A UserError is returned as the item; Loader raises it in the main process.
    """

    def __init__(self, dataset: Dataset, seed: int, substitutes: int = 0) -> None:
        self.dataset, self.seed, self.substitutes = dataset, seed, substitutes

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Any:
        item = self._read(key[1], _mix(self.seed, *key))
        errors: list[UserError] = []
        while isinstance(item, BadPicture) and len(errors) < self.substitutes:
            errors.append(item)
            number = _mix(self.seed, *key, len(errors))
            item = self._read(number % len(self), number)
        if not errors:
            return item
        return errors[0] if isinstance(item, UserError) else _Mended(item, list(map(str, errors)))

    def _read(self, index: int, sample_seed: int) -> Any:
        state = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
        random.seed(sample_seed)
        np.random.seed(sample_seed % 2**32)
        torch.default_generator.manual_seed(sample_seed)
        try:
            return self.dataset[index]
        except UserError as error:
            return error
        finally:
            random.setstate(state[0])
            np.random.set_state(state[1])
            torch.default_generator.set_state(state[2])


def _collate_or_error(collate: Callable[[list], Any], items: list) -> Any:
    if errors := [item for item in items if isinstance(item, UserError)]:
        return errors[0]
    mended = [said for item in items if isinstance(item, _Mended) for said in item.errors]
    batch = collate([item.content if isinstance(item, _Mended) else item for item in items])
    return _Mended(batch, mended) if mended else batch


def _mix(*numbers: int) -> int:
    """Hashes several numbers to a 63-bit seed, so that neighbouring numbers give unrelated seeds."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1
