"""Checks that run a little of the run: its weights, whether p can be reached, and one step of training."""

import copy
import math
import os
import resource
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from configs.schema import Config
from data.loading import build_loader
from engine.checkpoint import read_run
from engine.compress import evaluated_setting, meet
from engine.diagnostics import AlignmentWatch
from engine.elastic import Budgets
from engine.experiment import Experiment
from engine.initial import initialise_tokens
from engine.restore import check_pattern, check_variant
from engine.resume import Keeper
from engine.run_folder import RunFolder
from engine.schedule import WeightPlan
from engine.start import start
from engine.train import Trainer, train_epoch
from madtp.rule import OFF, PruneSetting
from models.weights.reading import read_checkpoint
from tasks.task import Task
from tools.checks.findings import Findings
from utils import Run, UserError

GIB = 2**30
UNITS = {"days": 86400, "hours": 3600, "minutes": 60}
LONG_STEP = 60  # seconds
NEARLY_FULL = 0.9  # share of the memory in use above which a longer text may be too much
SMALLER = "lower 'batch_size_train', or set vit_grad_ckpt: true with vit_ckpt_layer"


def check_epochs(config: Config, findings: Findings) -> None:
    """Checks that the ramp ends before the epochs do. Sparse weights need their GFLOPs for that: see `check_p`."""
    if not config.evaluate and config.pattern is None:
        findings.tried("epochs", lambda: WeightPlan(config, None, lambda setting: 1.0, lambda *_: None, 1.0))


def check_weights(config: Config, task: Task | None, findings: Findings) -> tuple[nn.Module, dict] | None:
    """Loads the weights and the teacher as a run does. Returns the model and the rest of the checkpoint; None where that fails.

    Without a task, whose tokenizer sizes the model, the files are only read.
    """
    teacher = config.teacher if config.distill and not config.evaluate else ""
    if task is None:
        for path in filter(None, dict.fromkeys((config.pretrained, teacher))):
            findings.tried("weights", lambda path=path: read_checkpoint(path))
        return None
    started = findings.tried("weights", lambda: start(config, task.run.device, task.build, task.load))
    if started is None:
        cpu = torch.device("cpu")
        if teacher and config.pretrained:  # either may be at fault, or both
            for name, change in (("weights", {"distill": False}), ("teacher", {"pretrained": ""})):
                some = config.model_copy(update=change)
                findings.tried(name, lambda some=some: start(some, cpu, task.build, task.load))
        return None
    model, checkpoint, task.teacher = started
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    if config.pretrained:
        findings.ok("weights", f"{config.pretrained}: fit the model, with {trained:,} trained parameters")
    elif not config.resume:
        findings.warning("weights", "none: the run starts from random weights; set the key 'pretrained'")
    if task.teacher is not None:
        findings.ok("teacher", f"{teacher or config.pretrained}: fits the model")
    if config.evaluate:
        findings.tried("weights", lambda: check_pattern(config, checkpoint))
        findings.tried("weights", lambda: check_variant(config, checkpoint))
    return model, checkpoint


def check_resume(config: Config, experiment: Experiment | None, trainer: Trainer | None, processes: int, findings: Findings) -> int:
    """Restores the run that is continued, as a run of this many processes would. Returns its first epoch, 0 for a new run."""
    if config.evaluate or not config.resume:
        return 0
    wide = Run(torch.device("cpu"), 0, processes)
    if experiment is None or trainer is None:
        findings.tried("resume", lambda: read_run(config.resume_path, wide))
        return 0
    as_started = copy.copy(experiment)
    as_started.run = Run(experiment.run.device, 0, processes)
    watch, folder = AlignmentWatch(experiment), RunFolder(config, as_started.run)
    keeper = Keeper(as_started, trainer, watch, Budgets(config), folder)
    if findings.tried("resume", lambda: keeper.restore() or keeper) is None:
        return 0
    first = keeper.now.epoch
    if first >= config.max_epoch:
        findings.warning("resume", f"{config.resume_path}: all {config.max_epoch} epochs are done; raise max_epoch to train on")
    else:
        findings.ok("resume", f"{config.resume_path}: goes on in epoch {first + 1} of {config.max_epoch}")
    return first


def check_p(experiment: Experiment, findings: Findings) -> PruneSetting:
    """Searches the setting for p on the calibration subset, as a run does. Returns it; OFF where training has to widen the range.

    Raises:
        UserError: when p is out of reach and the run would stop at once.
    """
    config = experiment.config
    initialise_tokens(experiment)
    dense = experiment.measure(OFF)
    if config.evaluate:
        setting, _, p = evaluated_setting(experiment, dense)
        findings.ok("p", f"{p:g}, {_temperature(setting)}: {experiment.measure(setting):.4f} of {dense:.4f} GFLOPs per sample")
        return setting
    plan, target = WeightPlan(config, experiment.sparse, experiment.measure, experiment.mask, dense), dense * (1 - config.p)
    try:
        with experiment.sparse.counted(experiment.sparse.weights) if experiment.sparse else nullcontext():
            setting, gflops = meet(experiment, target, OFF)
    except UserError as error:
        if plan.removal(0) >= config.p:
            raise
        reached = next(epoch for epoch in range(config.max_epoch) if plan.removal(epoch) >= config.p)
        findings.warning("p", f"{error}, unless training widens it by epoch {reached + 1}, where the run would stop")
        return OFF
    findings.ok("p", f"{config.p:g} can be reached, {_temperature(setting)}: {gflops:.4f} of {dense:.4f} GFLOPs per sample")
    return setting


def _temperature(setting: PruneSetting) -> str:
    return "without pruning tokens" if setting.temperature is None else f"at temperature {setting.temperature:.4g}"


def duration(seconds: float) -> str:
    """Returns a length of time in the unit that suits it."""
    unit, size = next(((unit, size) for unit, size in UNITS.items() if seconds >= size), ("seconds", 1))
    return f"{seconds / size:.1f} {unit}"


@dataclass
class Step:
    """A measured step of training.

    reading: seconds to read its batch in one process
    whole: seconds of the step itself with all tokens kept
    pruned: the same at p; None where that was not measured
    peak, memory: bytes in use at most, and bytes of the device
    """

    reading: float
    whole: float
    pruned: float | None
    peak: int
    memory: int


def check_step(
    config: Config, experiment: Experiment, trainer: Trainer, setting: PruneSetting, first: int, processes: int, findings: Findings
) -> None:
    """Takes real steps of training, and estimates from them the memory and the length of the run.

    setting: that of p; OFF where it is not known
    first: epoch that the run starts with
    """
    step = measured_step(experiment, trainer, setting)
    device = torch.cuda.get_device_name(experiment.run.device) if experiment.run.device.type == "cuda" else "CPU"
    fewer = "" if step.pruned is None else f", {step.pruned:.2f} s at p"
    said = (
        f"a step of {trainer.accumulate * config.batch_size_train} samples takes {step.whole:.2f} s on {device}{fewer}, and"
        f" {step.reading:.2f} s to read a batch; memory {step.peak / GIB:.2f} of {step.memory / GIB:.1f} GiB at most"
    )
    if step.peak > NEARLY_FULL * step.memory:
        findings.warning("training step", f"{said}, which longer texts may exceed; {SMALLER}")
    else:
        findings.ok("training step", said)
    loader = build_loader(
        experiment.loaders["train"].dataset, config.batch_size_train, train=True, run=Run(experiment.run.device, 0, processes),
        num_workers=0, seed=config.seed, collate=list, epoch_steps=config.epoch_batches,
    )  # fmt: skip
    steps = len(loader) // trainer.accumulate * max(0, config.max_epoch - first)
    reading = trainer.accumulate * step.reading / max(1, min(config.num_workers, os.cpu_count() or 1))
    longest = f"{duration(steps * max(step.whole, reading))} with all tokens kept"
    shortest = "" if step.pruned is None else f"{duration(steps * max(step.pruned, reading))} at p, and "
    slower = ", where reading the data is slower than computing: raise 'num_workers'" if reading > step.whole else ""
    on = f"{processes} process{'es' if processes > 1 else ''}"
    findings.ok("length", f"an estimate: {steps:,} steps on {on} take {shortest}{longest}, without evaluations{slower}")


def measured_step(experiment: Experiment, trainer: Trainer, setting: PruneSetting) -> Step:
    """Takes steps on the first batch of the run: with all tokens kept, and at the setting of p.

    The first step also chooses kernels, so others are timed, unless it took longer than LONG_STEP. It includes the gradients of
    the diagnostics, which the first step of an epoch computes.

    Raises:
        UserError: when the batch does not fit, or the loss is not finite.
    """
    run, loader = experiment.run, experiment.loaders["train"]
    watch, looking = AlignmentWatch(experiment), [0.0]
    loader.sampler.set_epoch(0)
    started = time.time()
    batch = next(iter(loader))
    reading = time.time() - started

    def inspect(losses: dict[str, Tensor]) -> None:
        begun = time.time()
        watch.see_losses(losses)
        looking[0] = time.time() - begun

    def take(setting: PruneSetting, look: bool = False) -> float:
        looking[0], begun = 0.0, time.time()
        losses = train_epoch(
            trainer, [batch] * trainer.accumulate, experiment.losses, experiment.loss_weights, lambda step: setting,
            experiment.precision, run, "training step", inspect if look else None,
        )  # fmt: skip
        if not math.isfinite(losses["total"]):
            raise UserError(f"the loss is {losses['total']} at the first step; lower 'init_lr' or switch 'amp' off")
        return time.time() - begun - looking[0]

    try:
        whole, pruned = take(OFF, look=True), None
        if whole < LONG_STEP:
            whole = take(OFF)
            pruned = None if setting == OFF else take(setting)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error):
            raise UserError(f"a batch of {loader.batch_size} does not fit into the memory of {run.device}; {SMALLER}") from None
        raise
    return Step(reading, whole, pruned, *_memory(run.device))


def _memory(device: torch.device) -> tuple[int, int]:
    """Returns the bytes in use at most so far, and those of the device; on a CPU those of the whole process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device), torch.cuda.get_device_properties(device).total_memory
    unit = 1 if sys.platform == "darwin" else 1024
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, whole
