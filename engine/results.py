"""What a run leaves behind: log.txt, TensorBoard scalars, predictions and result.json (docs/training.md has the formats)."""

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
from madtp.pruning import PruneSetting
from utils import Run, logger

OTHER_SPLITS = 0.03  # distance of the validation and test splits' GFLOPs from the target above which the log says so
ELSEWHERE = ("output_dir", "resume", "device", "num_workers")  # keys that say where a run is, not what it is


def write_json(content: object, path: Path) -> None:
    """Written under a temporary name and renamed: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def code_version() -> str:
    """The commit of this code, with a + where files differ from it; empty outside of a git checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def count_parameters(model: nn.Module) -> dict[str, int]:
    """All parameters that are trained, so not momentum copies, which no user deploys; and those that are not zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {"total": sum(p.numel() for p in trained), "nonzero": sum(int(p.count_nonzero()) for p in trained)}


class RunLog:
    """log.txt (a JSON object a line) and TensorBoard scalars of a run. A silent one when `folder` is None (other ranks)."""

    def __init__(self, folder: Path | None, before: Path | None = None, first_epoch: int = 0):
        """before: the folder of the run that goes on here, whose epochs before `first_epoch` are part of this one's log."""
        self.folder, self._board = folder, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            kept = "".join(_lines_before(before / "log.txt", first_epoch)) if before else ""
            (folder / "log.txt").write_text(kept, encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, entry: Mapping[str, object]) -> None:
        """One epoch. Nested numbers become scalars named by their path."""
        if self.folder is None:
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in _scalars(entry):
            self._board.add_scalar(name, value, entry["epoch"])
        self._board.flush()


def _lines_before(log: Path, epoch: int) -> Iterator[str]:
    """Of whole lines: a run that died may have left half of one."""
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
    """What a run is, in types that JSON has."""
    return config.model_dump(mode="json", exclude=set(ELSEWHERE))


def log_changed_settings(config: Config, saved: Mapping) -> None:
    """Name the keys whose values are not the ones that a resumed run was saved with: from here on it is another run."""
    before = saved.get("config", {})  # older runs have none
    for key, value in settings_of(config).items():
        if before.get(key, value) != value:
            logger.info("--resume: %s was %s and is %s from here on", key, before[key], value)


def warn_of_small_slice(config: Config, run: Run) -> None:
    """Under `keep: max` or `mean` what a sample costs depends on its batch, and those of the calibration slice may be smaller."""
    wanted = config.batch_size_test * run.world_size
    if config.keep != "instance" and not config.uncompressed and config.calibration_size < wanted:
        logger.info(
            "calibration_size %d fills no batch of %d on each of %d processes: its GFLOPs are of smaller batches than are"
            " evaluated, which under keep: %s cost others; set calibration_size to %d or more",
            config.calibration_size, config.batch_size_test, run.world_size, config.keep, wanted,
        )  # fmt: skip


def warn_of_slower_attention(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """On a GPU that evaluates packed batches without the kernel for them. dtype: of attention's products."""
    if device.type == "cuda" and config.packed and (missing := varlen.missing_requirement(device, dtype)):
        logger.info("attention runs in groups of samples, not in one kernel for all, which is faster and needs %s", missing)


def warn_if_off_target(config: Config, gflops: Mapping[str, float], setting: PruneSetting) -> None:
    """Name what costs more or less than p says: at a temperature from elsewhere, or on other samples. gflops: of result.json."""
    splits = {"measured": "the calibration slice", "val": "the validation split", "test": "the test split"}
    for name, split in splits.items():
        limit = WITHIN_BUDGET if name == "measured" else OTHER_SPLITS
        if config.p and not within(gflops[name], gflops["target"], setting, limit):
            off = 100 * (gflops[name] / gflops["target"] - 1)
            logger.info("%s costs %.4f GFLOPs per sample, %+.1f %% off the target of p = %g", split, gflops[name], off, config.p)
