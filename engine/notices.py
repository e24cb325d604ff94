"""What a run says of itself where its figures are not quite what its config names: nothing stops, but its user should know."""

from collections.abc import Mapping

import torch

from configs.schema import Config
from madtp.budget import WITHIN_BUDGET, within
from madtp.pruning import PruneSetting
from madtp.attention import varlen
from utils import Run, logger

OTHER_SPLITS = 0.03  # distance of the validation and test splits' GFLOPs from the target above which the log says so
ELSEWHERE = ("output_dir", "resume", "device", "num_workers")  # keys that say where a run is, not what it is


def settings_of(config: Config) -> dict:
    """What a run is, in types that JSON has."""
    return config.model_dump(mode="json", exclude=set(ELSEWHERE))


def say_what_changed(config: Config, saved: Mapping) -> None:
    """Name the keys whose values are not the ones that a resumed run was saved with: from here on it is another run."""
    before = saved.get("config", {})  # older runs have none
    for key, value in settings_of(config).items():
        if before.get(key, value) != value:
            logger.info("--resume: %s was %s and is %s from here on", key, before[key], value)


def say_small_slice(config: Config, run: Run) -> None:
    """Under `keep: max` or `mean` what a sample costs depends on its batch, and those of the calibration slice may be smaller."""
    wanted = config.batch_size_test * run.world_size
    if config.keep != "instance" and not config.uncompressed and config.calibration_size < wanted:
        logger.info(
            "calibration_size %d fills no batch of %d on each of %d processes: its GFLOPs are of smaller batches than are"
            " evaluated, which under keep: %s cost others; set calibration_size to %d or more",
            config.calibration_size, config.batch_size_test, run.world_size, config.keep, wanted,
        )  # fmt: skip


def say_slower_attention(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """On a GPU that evaluates packed batches without the kernel for them. dtype: of attention's products."""
    if device.type == "cuda" and config.packed and (lacking := varlen.lacking(device, dtype)):
        logger.info("attention runs in groups of samples, not in one kernel for all, which is faster and wants %s", lacking)


def say_where_off(config: Config, gflops: Mapping[str, float], setting: PruneSetting) -> None:
    """Name what costs more or less than p says: at a temperature from elsewhere, or on other samples. gflops: of result.json."""
    splits = {"measured": "the calibration slice", "val": "the validation split", "test": "the test split"}
    for name, split in splits.items():
        limit = WITHIN_BUDGET if name == "measured" else OTHER_SPLITS
        if config.p and not within(gflops[name], gflops["target"], setting, limit):
            off = 100 * (gflops[name] / gflops["target"] - 1)
            logger.info("%s costs %.4f GFLOPs per sample, %+.1f %% off the target of p = %g", split, gflops[name], off, config.p)
