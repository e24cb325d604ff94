"""The training loop over one epoch, shared by all tasks."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Sampler
from tqdm import tqdm

from engine.bad_steps import BadSteps
from madtp.rule import PruneSetting
from madtp.sparsity.masks import SparseWeights
from utils import Run, all_reduce_sum, logger

SHOW_EVERY = 50  # steps between losses in the progress bar
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
    """The state that training changes: weights, optimizer, loss scale, the number of steps and of those that were skipped."""

    model: nn.Module  # in DistributedDataParallel if there are several processes
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    schedule: CosineSchedule
    clip_grad: float = 0.0  # 0 is no limit
    step: int = 0
    sparse: SparseWeights | None = None
    accumulate: int = 1  # batches per step
    bad: BadSteps = field(default_factory=BadSteps)

    def update(self, loss: Tensor) -> None:
        """Takes one optimizer step on `loss`."""
        self.begin()
        self.add(loss)
        self.finish(~loss.detach().isfinite())

    def begin(self) -> None:
        """Begins a step: no gradients, and the learning rate of the schedule."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.schedule.rate(self.step) * group.get("lr_scale", 1.0)  # older runs have none
        self.optimizer.zero_grad(set_to_none=True)

    def collecting(self, last: bool) -> AbstractContextManager:
        """Returns a context manager for a batch: only in the `last` one of a step do processes exchange their gradients."""
        is_shared = isinstance(self.model, DistributedDataParallel) and not last
        return self.model.no_sync() if is_shared else nullcontext()

    def add(self, loss: Tensor) -> None:
        """Adds the gradient of a batch of the step, its share of the mean over all of them."""
        self.scaler.scale(loss if self.accumulate == 1 else loss / self.accumulate).backward()

    def finish(self, bad: Tensor) -> tuple[Tensor, Tensor]:
        """Takes the step, unless it is `bad`, () bool, or a gradient is not finite. The host does not wait for the device.

        Returns:
            () bool twice: whether the step was skipped, and whether that was severe. With loss scaling it is not if the scaled
            gradients alone have overflowed: a smaller scale follows.
        """
        scaled, parameters = self.scaler.is_enabled(), [p for p in self.model.parameters() if p.grad is not None]
        if scaled:
            parameters[0].grad.add_(torch.where(bad, math.nan, 0.0).to(bad.device))  # so that the scaler skips a bad loss too
            self.scaler.unscale_(self.optimizer)
        if self.clip_grad > 0:
            norm = nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        else:
            norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters])
        skipped = bad | ~norm.isfinite()
        if scaled:
            self.scaler.step(self.optimizer)
        elif getattr(self.optimizer, "_step_supports_amp_scaling", False):  # it reads on the device whether to skip
            self.optimizer.grad_scale, self.optimizer.found_inf = None, skipped.float()
            self.optimizer.step()
        elif not skipped:
            self.optimizer.step()
        self.scaler.update()
        if self.sparse is not None:
            self.sparse.apply()
        self.step += 1
        return skipped, bad if scaled else skipped


@dataclass
class EpochSums:
    """What the steps of an epoch have added up on this process; a run that was cut within the epoch goes on with it.

    steps: those taken, skipped ones included
    seconds: that they took
    waited: seconds of these in which no batch was ready
    counted: () number of batches in `losses`; those of skipped steps are left out
    losses: sums by name
    """

    steps: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    counted: Tensor = field(default_factory=lambda: torch.zeros(()))
    losses: dict[str, Tensor] = field(default_factory=dict)

    def wait_for(self, batches: Iterator[dict]) -> dict:
        """Takes the next batch, and counts the seconds until it is ready."""
        asked = time.time()
        batch = next(batches)
        self.waited += time.time() - asked
        return batch

    def add(self, batches: Sequence[Mapping[str, Tensor]], skipped: Tensor) -> None:
        """Adds the losses of the batches of a step."""
        self.steps += 1
        self.counted = self.counted.to(skipped.device) + len(batches) * ~skipped
        for name, loss in ((name, loss) for losses in batches for name, loss in losses.items()):
            loss = torch.where(skipped, 0.0, loss.detach().float())
            self.losses[name] = self.losses[name].to(loss.device) + loss if name in self.losses else loss

    def means(self) -> dict[str, float]:
        """Returns the means over all processes; NaN if all steps were skipped."""
        counted = float(all_reduce_sum(self.counted.clone()))
        return {
            name: float(all_reduce_sum(total.clone())) / counted if counted else math.nan for name, total in self.losses.items()
        }


class Control:
    """What decides about saving and stopping while an epoch runs; this one does neither."""

    def wishes(self) -> tuple[bool, bool]:
        """Tells whether this process wishes to save, and to stop."""
        return False, False

    def after_step(self, save: bool, stop: bool) -> None:
        """Acts on what any process wished one step before."""


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
    sums: EpochSums | None = None,
    control: Control | None = None,
) -> dict[str, float]:
    """Trains for one pass over `loader`. Each batch gets an entry "epoch", the fractional number of epochs done, for `losses`.

    A step takes `trainer.accumulate` batches; those that fill no step at the end of the pass are left out.

    Args:
        setting: step -> how hard it prunes; all steps of the run are counted.
        inspect: called with the losses of the first batch, before the step is taken.
        sums: of the steps that were taken before the run was cut; their batches are not read again.
        control: decides about saving and stopping.

    Returns:
        the mean over all processes of each loss, unweighted, and of their weighted sum ("total"), without skipped steps.

    Raises:
        SharedError: when losses or gradients were not finite in too many steps in a row.
    """
    trainer.model.train()
    sums, control, report = sums or EpochSums(), control or Control(), _Report(trainer, description)
    steps, begun = len(loader) // trainer.accumulate, time.time() - sums.seconds
    with starting_at(loader, sums.steps * trainer.accumulate):
        batches = iter(loader)
        for _ in (bar := progress(range(sums.steps, steps), description, run)):
            trainer.begin()
            done: list[dict[str, Tensor]] = []
            ids: list[str] = []
            for number in range(trainer.accumulate):
                batch = sums.wait_for(batches)
                with trainer.collecting(last=number == trainer.accumulate - 1):
                    with precision.autocast():
                        batch = {**move(batch, run.device), "epoch": trainer.step / steps}
                        named = losses(trainer.model, batch, setting(trainer.step))
                    if inspect is not None:
                        inspect(named)
                        inspect = None
                    total = sum(weights.get(name, 1.0) * loss for name, loss in named.items())
                    trainer.add(total)
                done.append({name: loss.detach() for name, loss in {**named, "total": total}.items()})
                ids += batch.get("ids", [])
            bad, shared = trainer.bad.agree(torch.stack([each["total"] for each in done]), control.wishes())
            skipped, severe = trainer.finish(bad)
            sums.add(done, skipped)
            sums.seconds = time.time() - begun
            report(done[-1], bar)
            control.after_step(*trainer.bad.count(skipped, severe, shared, trainer.step, ids))
    trainer.bad.finish(trainer.step)
    return sums.means()


class _Report:
    """Shows the losses of a step from time to time; each time waits for the device."""

    def __init__(self, trainer: Trainer, description: str):
        self.trainer, self.description = trainer, description
        self.logged, self.logged_step = time.time(), trainer.step

    def __call__(self, losses: Mapping[str, Tensor], bar) -> None:
        step = self.trainer.step
        if step % SHOW_EVERY == 0 and not bar.disable:
            bar.set_postfix(loss=f"{float(losses['total']):.3f}")
        if step % LOG_EVERY == 0:
            shown = ", ".join(f"{name} {float(loss):.3f}" for name, loss in losses.items())
            rate = (step - self.logged_step) / (time.time() - self.logged)
            logger.info("%s, step %d: %s; %.1f steps/s", self.description, step, shown, rate)
            self.logged, self.logged_step = time.time(), step


class _From(Sampler):
    """A sampler without its first samples; it has the length of the whole."""

    def __init__(self, whole: Sampler, first: int):
        self.whole, self.first = whole, first

    def __len__(self) -> int:
        return len(self.whole)

    def __iter__(self) -> Iterator:
        return islice(self.whole, self.first, None)


@contextmanager
def starting_at(loader, batches: int) -> Iterator[None]:
    """Context manager in which a pass over `loader` leaves out its first batches without reading their samples."""
    if not batches:
        yield
        return
    whole = loader.batch_sampler.sampler
    loader.batch_sampler.sampler = _From(whole, batches * loader.batch_size)
    try:
        yield
    finally:
        loader.batch_sampler.sampler = whole
