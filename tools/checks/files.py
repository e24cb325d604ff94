"""Checks of the files that a run reads and of the place that it writes to."""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from configs.schema import Config, VqaConfig
from data.loading import Annotated, BadPicture
from data.vqa import read_answer_list
from engine.run_folder import CHECKPOINTS, check_free, check_sources
from tasks.registry import TASKS
from tools.checks.findings import Findings
from tools.tables.needs import checkpoint_sizes

PICTURES = 300  # read by default
CHUNK = 32  # pictures that a process reads at a time
GB = 1e9
Read = Callable[[], object]  # of one picture


def check_output(config: Config, findings: Findings) -> None:
    """Checks that the run may write to its folder, that its checkpoints fit, and that it removes nothing that it needs."""
    folder, advice = Path(config.output_dir), "give another folder with --output_dir"
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        findings.problem("output", f"{there}: is a file, not a folder; {advice}")
        return
    if not os.access(there, os.W_OK):
        findings.problem("output", f"{there}: may not be written to; {advice}")
    earlier = [folder / name for name in CHECKPOINTS if (folder / name).is_file()]
    free = shutil.disk_usage(there).free
    findings.tried("output", lambda: check_free(config))
    if config.evaluate:
        findings.ok("output", f"{folder}; {free / GB:.1f} GB are free, and an evaluation writes no checkpoints")
        return
    findings.tried("output", lambda: check_sources(config))
    sizes = findings.tried("disk", lambda: checkpoint_sizes(config))
    if sizes is not None:
        _check_disk(folder, sizes, free, sum(path.stat().st_size for path in earlier), findings)


def _check_disk(folder: Path, sizes: tuple[int, int], free: int, earlier: int, findings: Findings) -> None:
    """Compares the free disk with the sizes of the best, the last and the previous checkpoint, and of one more that is written."""
    best, last = sizes
    needed = max(0, best + 3 * last - earlier)
    said = (
        f"{folder}: {needed / GB:.2f} GB are needed ({best / GB:.2f} best, twice {last / GB:.2f} last and previous, and as much"
        " while one is written)"
    )
    if free < needed:
        findings.problem("disk", f"{said}, and {free / GB:.2f} GB are free; make room, or give another folder with --output_dir")
    elif free < 2 * needed:
        findings.warning("disk", f"{said}, and only {free / GB:.2f} GB are free; make sure that nobody else fills the disk")
    else:
        findings.ok("disk", f"{said}; {free / GB:.2f} GB are free")


def check_data(config: Config, number: int | None, findings: Findings) -> None:
    """Reads all annotations, and `number` pictures of each kind of split, or all of them.

    Splits that are evaluated come first: a picture there always stops the run, and one of training may be skipped.
    """
    read = {split: _annotations(config, split, findings) for split in ("train", "val", "test")}
    if isinstance(config, VqaConfig) and config.inference == "rank":
        answers = findings.tried("annotations", lambda: read_answer_list(config))
        if answers is not None:
            findings.ok("annotations", f"{config.answer_list}: {len(answers):,} candidate answers")
    evaluated = _pictures([*read["val"], *read["test"]])
    trained = {picture: how for picture, how in _pictures(read["train"]).items() if picture not in evaluated}
    check_pictures("pictures of validation and test", evaluated, number, findings)
    if config.evaluate:
        return  # calibration reads those that it needs
    check_pictures("pictures of training", trained, number, findings, skipped=config.on_bad_sample == "skip")


def _annotations(config: Config, split: str, findings: Findings) -> list[Annotated]:
    names = {"train": config.train_files, "val": [config.val_file], "test": [config.test_file]}[split]
    found = []
    for name in names:
        content = findings.tried("annotations", partial(TASKS[config.task].annotated, config, split, name))
        if content is not None:
            source = config.annotation_file(name) if name else "held out of the training files"
            findings.ok(
                "annotations", f"{split}: {source}: {content.samples:,} samples with {len(content.pictures):,} different pictures"
            )
            found.append(content)
    return found


def _pictures(read: Iterable[Annotated]) -> dict[Any, Read]:
    return {picture: partial(content.read, picture) for content in read for picture in content.pictures}


def check_pictures(name: str, pictures: dict[Any, Read], number: int | None, findings: Findings, skipped: bool = False) -> None:
    """Decodes pictures as a run does, on all cores: `number` of them spread evenly, or all.

    skipped: those that cannot be read would not stop the run.
    """
    if not pictures:
        return
    all_of_them = list(pictures.values())
    shown = spread(all_of_them, number)
    errors = broken(shown, name)
    whole = len(shown) == len(all_of_them)
    read = f"of all {len(shown):,}" if whole else f"of {len(shown):,} that were tried"
    more = "" if whole else f", spread evenly over {len(all_of_them):,} (--all reads every one)"
    if not errors:
        findings.ok(name, f"{read.removeprefix('of ')}{more} can be read")
        return
    said = f"{len(errors):,} {read}{more} cannot be read"
    if skipped:
        findings.warning(name, f"{said}; training skips them", errors)
    else:
        findings.problem(name, f"{said}; fetch them again, or take them out of the annotations", errors)


def spread(items: Sequence[Any], number: int | None) -> list[Any]:
    """Returns `number` of the items, the first and the last among them, spread evenly; all of them with None."""
    if number is None or number >= len(items):
        return list(items)
    return [items[round(place * (len(items) - 1) / max(1, number - 1))] for place in range(number)]


class _Reading(Dataset):
    """A data set of pictures: an item is what is wrong with the picture, or nothing."""

    def __init__(self, reads: list[Read]) -> None:
        self.reads = reads

    def __len__(self) -> int:
        return len(self.reads)

    def __getitem__(self, index: int) -> str:
        try:
            self.reads[index]()
        except BadPicture as error:
            return str(error)
        return ""


def broken(reads: list[Read], name: str) -> list[str]:
    """Reads pictures on all cores, with a progress bar on a terminal. Returns what is wrong with those that cannot be read."""
    workers = min(os.cpu_count() or 1, len(reads) // CHUNK)  # few are read faster than a process starts
    loader = DataLoader(_Reading(reads), CHUNK, num_workers=workers, collate_fn=list)
    return [said for batch in tqdm(loader, desc=name, disable=None, leave=False, unit_scale=CHUNK) for said in batch if said]
