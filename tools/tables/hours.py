"""An estimate of the time that training takes: a step of the image encoder, measured here at its real size with random weights."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import Config
from engine.schedule import WeightPlan
from engine.train import Precision
from madtp.blocks import UNPRUNED
from madtp.flops import GIGA
from madtp.rule import OFF
from tasks.registry import TASKS
from tools.flops import total

BATCH = {"cpu": 1, "cuda": 32}


@dataclass
class Estimator:
    """Estimates hours on this machine's device. Sizes that were measured before are not measured again.

    A training pass is taken to cost each GFLOP of a sample as much time as the image encoder's, which has most of them.
    Evaluations, and the reading of pictures, come on top.
    """

    device: torch.device
    costs: dict[str, tuple[float, float]] = field(default_factory=dict)  # by size: GFLOPs of a sample, seconds per GFLOP

    @property
    def unit(self) -> str:
        """The name of an hour on this device."""
        return "GPU hours" if self.device.type == "cuda" else "hours on this CPU"

    def hours(self, config: Config, samples: int) -> float:
        """Returns the hours that one device needs for all epochs of a run with `samples` training samples."""
        gflops, seconds = self.measured(config)
        batches = config.epoch_batches
        seen = samples if batches is None else min(samples, batches * config.batch_size_train)
        plan = WeightPlan(config, None, lambda setting: gflops, lambda names, setting: None, gflops)
        left = sum(1 - plan.removal(epoch) for epoch in range(config.max_epoch))
        return seen * left * gflops * seconds / 3600

    def measured(self, config: Config) -> tuple[float, float]:
        """Returns the GFLOPs of an uncompressed sample, and the seconds of training per GFLOP."""
        sizes = getattr(config, "vit", None), getattr(config, "clip", None)
        key = f"{config.task} {config.image_size} {sizes} {config.amp}"
        if key not in self.costs:
            dense = config.model_copy(update={"p": 0.0})
            torch.manual_seed(0)
            model, inputs = TASKS[config.task].reference_case(dense)
            gflops = total(model.eval(), inputs, OFF)
            self.costs[key] = gflops, seconds_per_gflop(model, inputs, self.device, config.amp)
        return self.costs[key]


def seconds_per_gflop(model: Any, inputs: tuple[Tensor, ...], device: torch.device, amp: bool) -> float:
    """Measures the seconds of a training step of the image encoder per GFLOP of its forward pass."""
    encoder: nn.Module = model.visual_encoder if hasattr(model, "visual_encoder") else model.visual
    image = next(part for part in inputs if part.dim() >= 4).flatten(0, -4)[:1]
    images = image.expand(BATCH[device.type], -1, -1, -1).to(device)
    encoder.to(device).train()

    def step() -> float:
        started = time.perf_counter()
        encoder.zero_grad(set_to_none=True)
        with Precision(device, amp).autocast():
            output = encoder(images, UNPRUNED)
        tokens, record = (output[0], output[2]) if isinstance(output, tuple) else (output.tokens, output)
        tokens.float().square().mean().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
        return float(encoder.flops(record).sum()) / GIGA

    seconds: list[float] = []
    for _ in range(2):  # the first warms up
        gflops = step()
    return seconds[-1] / gflops
