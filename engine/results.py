"""The output files and warnings of a run: log.txt, TensorBoard scalars and JSON files (see docs/training.md for the formats)."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn

from configs.schema import Config
from madtp.attention import varlen
from madtp.budget import WITHIN_BUDGET, within
from madtp.rule import PruneSetting
from utils import Run, logger, put_in_place

OTHER_SPLITS = 0.03  # relative distance of the val and test GFLOPs from the target above which the log warns
ELSEWHERE = ("output_dir", "resume", "overwrite", "save_minutes", "save_steps", "device", "num_workers")  # do not change results


def write_json(content: object, path: Path) -> None:
    """Writes a JSON file under a temporary name and renames it, so that readers never see an incomplete file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    put_in_place(temporary, path)


def code_version() -> str:
    """Returns the commit of this code, with a + if files differ from it; empty outside of a git checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Counts all trained parameters, and the nonzero ones. Momentum copies do not count: they are not deployed."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {"total": sum(p.numel() for p in trained), "nonzero": sum(int(p.count_nonzero()) for p in trained)}


class RunLog:
    """The log of a run: log.txt, with a JSON object per line, and TensorBoard scalars. Writes nothing if `folder` is None."""

    def __init__(self, folder: Path | None, before: Path | None = None, first_epoch: int = 0):
        """Opens the log.

        Args:
            folder: the folder of the run; None on ranks other than 0.
            before: the folder of the run that is resumed. Its log entries before `first_epoch` are copied.
            first_epoch: the first epoch of this run.
        """
        self.folder, self._board = folder, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            kept = "".join(_lines_before(before / "log.txt", first_epoch)) if before else ""
            aside = folder / "log.txt.tmp"  # the log may be that of this folder, and must not be lost if the run is killed here
            aside.write_text(kept, encoding="utf-8")
            put_in_place(aside, folder / "log.txt")
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, entry: Mapping[str, object]) -> None:
        """Writes the entry of one epoch. Nested numbers become scalars named by their path."""
        if self.folder is None:
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
        for name, value in _scalars(entry):
            self._board.add_scalar(name, value, entry["epoch"])
        self._board.flush()


def _lines_before(log: Path, epoch: int) -> Iterator[str]:
    """Yields the lines of epochs before `epoch`. Skips incomplete lines, which an interrupted run may have left."""
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else ():
        try:
            early = line.endswith("\n") and json.loads(line)["epoch"] < epoch
        except json.JSONDecodeError:
            continue
        if early:
            yield line


def _scalars(entry: Mapping[str, object], prefix: str = ""):
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value


def settings_of(config: Config) -> dict:
    """Returns the config keys that affect results, in JSON types."""
    return config.model_dump(mode="json", exclude=set(ELSEWHERE))


def log_changed_settings(config: Config, saved: Mapping) -> None:
    """Logs the keys whose values differ from those that a resumed run was saved with."""
    before = saved.get("config", {})  # older runs have none
    for key, value in settings_of(config).items():
        if before.get(key, value) != value:
            logger.info("--resume: %s was %s and is %s from here on", key, before[key], value)


def warn_of_small_slice(config: Config, run: Run) -> None:
    """Warns if the calibration subset does not fill one batch.

    Under `keep: max` or `mean` the cost of a sample depends on its batch, so smaller calibration batches give other GFLOPs.
    """
    wanted = config.batch_size_test * run.world_size
    if config.keep_rule != "instance" and not config.uncompressed and config.calibration_size < wanted:
        logger.info(
            "calibration_size %d does not fill a batch of %d on each of %d processes: under keep: %s its smaller batches cost other"
            " GFLOPs than those of the evaluation; set calibration_size to %d or more",
            config.calibration_size, config.batch_size_test, run.world_size, config.keep, wanted,
        )  # fmt: skip


def warn_of_slower_attention(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """Warns if a GPU lacks the attention kernel for packed batches. `dtype` is that of the attention products."""
    if device.type == "cuda" and config.packed and (missing := varlen.missing_requirement(device, dtype)):
        logger.info("attention runs in groups of samples; one kernel for all samples would be faster, but needs %s", missing)


def warn_of_missed_target(config: Config, epoch: int, measured: float, dense: float, setting: PruneSetting) -> None:
    """Warns if the first epoch at p misses the target: then GFLOPs jump over it, and later epochs may miss it too.

    measured, dense: GFLOPs on the calibration subset, at the setting and uncompressed
    """
    target = dense * (1 - config.p)
    if not within(measured, target, setting):
        logger.info(
            "epoch %d: no setting comes nearer to the target of p = %g than %.4f GFLOPs, %+.1f %% off it, and only an epoch within"
            " %g %% can be selected: if none is, the run ends without a result; stop it and choose p = %.3f, or raise"
            " calibration_size above %d",
            epoch + 1, config.p, measured, 100 * (measured / target - 1), 100 * WITHIN_BUDGET, 1 - measured / dense,
            config.calibration_size,
        )  # fmt: skip


def warn_if_off_target(config: Config, gflops: Mapping[str, float], setting: PruneSetting) -> None:
    """Warns about splits whose GFLOPs are off the target. `gflops` is the entry of result.json.

    The temperature may come from another run, and the samples differ from the calibration subset.
    """
    splits = {"measured": "the calibration subset", "val": "the validation split", "test": "the test split"}
    for name, split in splits.items():
        limit = WITHIN_BUDGET if name == "measured" else OTHER_SPLITS
        if config.p and not within(gflops[name], gflops["target"], setting, limit):
            off = 100 * (gflops[name] / gflops["target"] - 1)
            logger.info("%s costs %.4f GFLOPs per sample, %+.1f %% off the target of p = %g", split, gflops[name], off, config.p)
