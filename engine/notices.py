"""What a run says of itself where its figures are not quite what its config names: nothing stops, but its user should know."""

from collections.abc import Mapping

import torch

from config import Config
from madtp.pruning import PruneSetting
from models import varlen
from utils import Run, logger

WITHIN_BUDGET = 0.01  # relative distance from the target at which an epoch may be selected
OTHER_SPLITS = 0.03  # the same of the validation and test splits, whose samples are others; above it the log says so
SCHEDULE = (
    "max_epoch", "epoch_steps", "ramp_epochs", "batch_size_train", "init_lr", "min_lr", "weight_decay", "lr_schedule",
    "warmup_steps", "clip_grad", "label_smoothing", "sim_weight", "distill", "distill_vision", "distill_language", "distill_logits",
    "distill_temperature", "calibration_size", "amp", "seed",
)  # fmt: skip


def schedule_of(config: Config) -> dict:
    """The keys of training that a resumed run may have others of, and then is no longer the run that was begun."""
    return {key: getattr(config, key) for key in SCHEDULE}


def say_what_changed(config: Config, saved: Mapping) -> None:
    """Name those keys whose values are not the ones that a run was saved with."""
    before = saved.get("schedule", {})  # older runs have none
    for key, value in schedule_of(config).items():
        if before.get(key, value) != value:
            logger.info("--resume: %s was %s and is %s from here on", key, before[key], value)


def say_small_slice(config: Config, run: Run) -> None:
    """Under `keep: max` or `mean` what a sample costs depends on its batch, and those of the calibration slice may be smaller."""
    wanted = config.batch_size_test * run.world_size
    if config.keep != "instance" and not config.uncompressed and config.calibration_size < wanted:
        logger.info(
            "calibration_size %d fills no batch of %d on each of %d processes: p is met on smaller batches than are evaluated, and"
            " under keep: %s these cost other GFLOPs; set calibration_size to %d or more",
            config.calibration_size, config.batch_size_test, run.world_size, config.keep, wanted,
        )  # fmt: skip


def say_slower_attention(config: Config, device: torch.device, dtype: torch.dtype) -> None:
    """On a GPU that evaluates packed batches without the kernel for them. dtype: of attention's products."""
    if device.type == "cuda" and config.packed and (lacking := varlen.lacking(device, dtype)):
        logger.info("attention runs in groups of samples, not in one kernel for all, which is faster and wants %s", lacking)


def within(measured: float, goal: float, setting: PruneSetting, limit: float = WITHIN_BUDGET) -> bool:
    """Whether GFLOPs meet the goal; where weights alone do, no token is left to give back."""
    return abs(measured - goal) <= limit * goal or (setting.temperature is None and measured <= goal)


def say_where_off(config: Config, gflops: Mapping[str, float], setting: PruneSetting) -> None:
    """Name what costs more or less than p says: at a temperature from elsewhere, or on other samples. gflops: of result.json."""
    splits = {"measured": "the calibration slice", "val": "the validation split", "test": "the test split"}
    for name, split in splits.items():
        limit = WITHIN_BUDGET if name == "measured" else OTHER_SPLITS
        if config.p and not within(gflops[name], gflops["target"], setting, limit):
            off = 100 * (gflops[name] / gflops["target"] - 1)
            logger.info("%s costs %.4f GFLOPs per sample, %+.1f %% off the target of p = %g", split, gflops[name], off, config.p)
