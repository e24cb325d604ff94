"""The training loop over one epoch, shared by all tasks."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from madtp.pruning import PruneSetting
from madtp.sparsity.masks import SparseWeights
from utils import Run, UserError, all_reduce_sum, logger

CHECK_EVERY = 50  # steps between checks of the loss; each check waits for the device
LOG_EVERY = 500  # steps between log lines

Losses = Callable[[nn.Module, dict, PruneSetting], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Precision:
    """The settings of mixed precision: bfloat16 if the device has it, else float16 with loss scaling. float32 if not enabled."""

    device: torch.device
    enabled: bool = False

    @property
    def dtype(self) -> torch.dtype:
        has_bfloat16 = self.device.type == "cpu" or torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bfloat16 else torch.float16

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.enabled)

    def scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.enabled and self.dtype is torch.float16)


@dataclass(frozen=True)
class CosineSchedule:
    """The learning rate schedule: linear warm-up over `warmup_steps`, then a cosine from `init_lr` to `min_lr` over all epochs.

    With `per_step=False` the rate is constant within an epoch, as in the published runs.
    """

    init_lr: float
    min_lr: float
    epochs: int
    steps_per_epoch: int
    warmup_steps: int = 0
    per_step: bool = False

    def rate(self, step: int) -> float:
        """Returns the learning rate of a step, counted from 0 over all epochs."""
        if step < self.warmup_steps:
            return self.init_lr * (step + 1) / self.warmup_steps
        epoch = step / self.steps_per_epoch if self.per_step else step // self.steps_per_epoch
        return self.min_lr + (self.init_lr - self.min_lr) * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))


def parameter_groups(model: nn.Module, align_lr_scale: float) -> list[dict]:
    """Returns the optimizer's groups of the trained parameters, each with its factor "lr_scale" on the learning rate.

    The learnable tokens and the maps of the alignment form a group of their own where their factor is not 1.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    aligning = {name for name in trained if name == "space_dict" or "alignment." in name} if align_lr_scale != 1 else set()
    groups = [{"params": [parameter for name, parameter in trained.items() if name not in aligning], "lr_scale": 1.0}]
    if aligning:
        groups.append({"params": [trained[name] for name in trained if name in aligning], "lr_scale": align_lr_scale})
    return groups


@dataclass
class Trainer:
    """The state that training changes: weights, optimizer, loss scale and the number of steps."""

    model: nn.Module  # in DistributedDataParallel if there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: CosineSchedule
    clip_grad: float = 0.0  # 0 is no limit
    step: int = 0
    sparse: SparseWeights | None = None

    def update(self, loss: Tensor) -> None:
        """Takes one optimizer step on `loss`."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step) * group.get("lr_scale", 1.0)  # older runs have none
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if self.clip_grad > 0:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip_grad)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.sparse is not None:
            self.sparse.apply()
        self.step += 1


def move(batch: dict, device: torch.device) -> dict:
    """Moves the tensors of a batch to `device`."""
    return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}


def progress(loader, description: str, run: Run):
    """Wraps a loader in a progress bar. Shows nothing on other ranks than 0, or if the output is not a terminal."""
    return tqdm(loader, desc=description, disable=None if run.is_main else True, leave=False, dynamic_ncols=True)


def train_epoch(
    trainer: Trainer,
    loader,
    losses: Losses,
    weights: Mapping[str, float],
    setting: Callable[[int], PruneSetting],
    precision: Precision,
    run: Run,
    description: str,
    inspect: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> dict[str, float]:
    """Trains for one pass over `loader`. Each batch gets an entry "epoch", the fractional number of epochs done, for `losses`.

    Args:
        setting: step -> how hard it prunes; all steps of the run are counted.
        inspect: called with the losses of the first step, before the step is taken.

    Returns:
        the mean over all processes of each loss, unweighted, and of their weighted sum ("total").

    Raises:
        UserError: when the loss is not finite.
    """
    trainer.model.train()
    sums: dict[str, float | Tensor] = {}
    recent: dict[str, Tensor] = {}
    logged, logged_step = time.time(), trainer.step
    for batch in (bar := progress(loader, description, run)):
        with precision.autocast():
            named = losses(trainer.model, {**move(batch, run.device), "epoch": trainer.step / len(loader)}, setting(trainer.step))
        if inspect is not None:
            inspect(named)
            inspect = None
        total = sum(weights.get(name, 1.0) * loss for name, loss in named.items())
        trainer.update(total)
        for name, loss in {**named, "total": total}.items():
            sums[name] = sums.get(name, 0.0) + loss.detach().float()
            recent[name] = loss.detach().float()
        if trainer.step % CHECK_EVERY == 0:
            if not math.isfinite(value := float(recent["total"])):
                raise UserError(f"the loss is {value} at step {trainer.step}; lower 'init_lr' or switch 'amp' off")
            bar.set_postfix(loss=f"{value:.3f}")
        if trainer.step % LOG_EVERY == 0:
            shown = ", ".join(f"{name} {float(loss):.3f}" for name, loss in recent.items())
            rate = (trainer.step - logged_step) / (time.time() - logged)
            logger.info("%s, step %d: %s; %.1f steps/s", description, trainer.step, shown, rate)
            logged, logged_step = time.time(), trainer.step
    return {name: float(all_reduce_sum(value)) / (len(loader) * run.world_size) for name, value in sums.items()}
