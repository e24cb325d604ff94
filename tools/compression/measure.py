"""What tools/compress.py measures of a compressed model: cost, speed, and how far its features moved."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from madtp.blocks import TowerRecord
from madtp.patch.base import Batch, Pruning, count_samples
from madtp.rule import OFF, PruneSetting
from tools.compression.sources import Source, features
from tools.demo import cpu_name

ROUNDS = 5  # of a timing
WHOLE, PRUNED = "uncompressed", "pruned"


@dataclass
class Report:
    """Measurements of a compressed model, uncompressed and pruned.

    gflops, gflops_aside: mean GFLOPs per sample on the calibration data, and on the data that was kept aside
    cosine: median and worst cosine to the features of the uncompressed model on the latter, by encoder
    seconds: of a batch
    tokens: mean number of tokens that enter the first block and that leave the last one, by encoder
    """

    gflops: dict[str, float]
    gflops_aside: dict[str, float]
    cosine: dict[str, dict[str, float]]
    seconds: dict[str, float]
    tokens: dict[str, dict[str, float]]
    calibration: int
    aside: int
    device: str
    batch_size: int

    @property
    def speedup(self) -> float:
        return self.seconds[WHOLE] / self.seconds[PRUNED]

    def lines(self) -> list[str]:
        """Returns the measurements in words."""
        cost, aside = self.gflops, self.gflops_aside
        return [
            f"GFLOPs per sample: {cost[WHOLE]:.3f} -> {cost[PRUNED]:.3f}, {1 - cost[PRUNED] / cost[WHOLE]:.1%} removed;"
            f" on {self.aside} samples kept aside {1 - aside[PRUNED] / aside[WHOLE]:.1%}",
            f"speed: {self.speedup:.2f} times, batches of {self.batch_size} on {self.device} (medians of {ROUNDS} rounds in turns)",
            *(
                f"features, {name}: cosine to the uncompressed ones {found['median']:.4f} (median), {found['worst']:.4f} (worst)"
                for name, found in self.cosine.items()
            ),
        ]


def all_features(source: Source, batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Returns the features of all samples by encoder, (N, E)."""
    parts = [features(source, batch) for batch in batches]
    return {name: torch.cat([part[name].float().cpu() for part in parts]) for name in parts[0]}


@torch.inference_mode()
def measure(
    source: Source, pruning: Pruning, calibration: Sequence[Batch], aside: Sequence[Batch], before: dict[str, Tensor]
) -> Report:
    """Measures a pruned model.

    Args:
        before: features of the samples kept aside, from the uncompressed model.
    """
    setting, device = pruning.setting, next(source.model.parameters()).device
    costs = [dict(zip((PRUNED, WHOLE), pruning.compare(batches, setting), strict=True)) for batches in (calibration, aside)]
    tokens = {name: _tokens(record) for name, record in pruning.records.items() if record is not None}
    after = all_features(source, aside)
    cosines = {name: F.cosine_similarity(values, after[name]) for name, values in before.items()}
    return Report(
        *costs,
        {name: {"median": float(cosine.median()), "worst": float(cosine.min())} for name, cosine in cosines.items()},
        timed(source, pruning, aside[0], device),
        tokens,
        *(sum(map(count_samples, batches)) for batches in (calibration, aside)),
        cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        count_samples(aside[0]),
    )


def _tokens(record: TowerRecord) -> dict[str, float]:
    return {"entering": float(record.entering[0].double().mean()), "leaving": float(record.leaving[-1].double().mean())}


def timed(source: Source, pruning: Pruning, batch: Batch, device: torch.device) -> dict[str, float]:
    """Returns the median seconds of a batch, run in turns so that a busy machine slows both alike."""
    setting = pruning.setting

    def run(mode: PruneSetting) -> float:
        pruning.setting = mode
        start = time.perf_counter()
        features(source, batch)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    modes: dict[str, PruneSetting] = {WHOLE: OFF, PRUNED: setting}
    rounds: list[dict[str, float]] = [{name: run(mode) for name, mode in modes.items()} for _ in range(ROUNDS + 1)]
    pruning.setting = setting
    return {name: statistics.median(each[name] for each in rounds[1:]) for name in modes}  # the first warms up
