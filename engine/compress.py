"""Compress, then fine-tune: the same loop for every task.

An experiment says how to compute its losses, its metrics and a batch's GFLOPs; `compress` drives the prune setting to the
GFLOPs target, epoch by epoch, and selects on the validation split. `run_experiment` is what the entry scripts call.
"""

import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from config import Config
from engine.checkpoint import load_run, save_atomic, save_run
from engine.flop_table import flop_table
from engine.results import RunLog, count_parameters, write_json
from engine.saved import RULE, is_authors, saved_setting
from engine.train import CosineSchedule, Losses, Precision, Trainer, move, train_epoch
from madtp.budget import UnreachableTarget, calibrate
from madtp.pruning import OFF, PruneSetting
from options import save_config
from utils import Run, UserError, all_reduce_sum, barrier, logger, seed_everything

WITHIN_BUDGET = 0.01  # relative distance from the target at which an epoch may be selected


Cost = Callable[[nn.Module, dict, PruneSetting], torch.Tensor]


@dataclass
class Evaluation:
    """metrics in percent; gflops per sample; predictions: {sample id: {"prediction", "score", "tokens_kept", "gflops"}}.

    submission: the predictions of the test split in a format that others read, by the name of its file
    """

    metrics: dict[str, float]
    gflops: float
    predictions: dict[str, dict]
    submission: dict[str, object] = field(default_factory=dict)


@dataclass
class Experiment:
    """A task, as the loop sees it.

    loaders: "train" (not for an evaluation), "calibration", "val", "test"
    losses: (model, batch, setting) -> named losses; `loss_weights` scales them by name
    evaluate: (model, loader, setting) -> Evaluation, over all processes; called in evaluation mode, without gradients
    gflops: (model, batch, setting) -> (S,) GFLOPs of each sample of a batch
    inputs: batch -> what the model's forward takes, of its first sample; for the table that a run prints first
    score: the name of the metric that selects
    reference: GFLOPs of the uncompressed model by the published convention
    deployment: as `gflops`, of a sample in use; None where that is the same
    checkpoint: what the weights given by `pretrained` came with (a temperature, say)
    """

    config: Config
    run: Run
    model: nn.Module
    loaders: dict[str, object]
    losses: Losses
    evaluate: Callable[[nn.Module, object, PruneSetting], Evaluation]
    gflops: Cost
    score: str
    reference: float
    loss_weights: dict[str, float] = field(default_factory=dict)
    checkpoint: dict = field(default_factory=dict)
    inputs: Callable[[dict], tuple[torch.Tensor, ...]] | None = None
    deployment: Cost | None = None

    @property
    def precision(self) -> Precision:
        return Precision(self.run.device, self.config.amp)

    def measure(self, setting: PruneSetting) -> float:
        """Mean GFLOPs per sample on the calibration slice, the same number on every process."""
        return self.mean(self.gflops, setting)

    @torch.no_grad()
    def mean(self, cost: Cost, setting: PruneSetting) -> float:
        """The mean of a cost on the calibration slice."""
        self.model.eval()
        with self.precision.autocast():
            return mean_cost(self.model, self.calibration_batches, cost, setting, self.run)

    @property
    def calibration_batches(self) -> list[dict]:
        """The slice is read once: it is small and never augmented."""
        if not hasattr(self, "_calibration_batches"):
            self._calibration_batches = list(self.loaders["calibration"])
        return self._calibration_batches

    @torch.no_grad()
    def evaluated(self, split: str, setting: PruneSetting) -> Evaluation:
        self.model.eval()
        with self.precision.autocast():
            return self.evaluate(self.model, self.loaders[split], setting)


def mean_cost(model: nn.Module, batches: Iterable[dict], cost: Cost, setting: PruneSetting, run: Run) -> float:
    """The mean per sample over the batches of all processes, the same number on every process."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        per_sample = cost(model, move(batch, run.device), setting)
        total += torch.tensor([float(per_sample.sum()), len(per_sample)], dtype=torch.float64)
    total = all_reduce_sum(total.to(run.device))
    return float(total[0] / total[1])


def run_experiment(experiment: Experiment) -> dict:
    """Train or evaluate as the config says; write the run's files; return the content of result.json."""
    config, run = experiment.config, experiment.run
    folder = Path(config.output_dir)
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
    barrier()
    started = time.time()
    dense = experiment.measure(OFF)
    target = dense * (1 - config.p)
    if run.is_main and experiment.inputs:
        first = move(experiment.calibration_batches[0], run.device)
        logger.info("one sample by fvcore, uncompressed:\n%s", flop_table(experiment.model, experiment.inputs(first)))
    logger.info("uncompressed: %.4f GFLOPs per sample; target at p = %g: %.4f", dense, config.p, target)
    if config.evaluate:
        setting, epoch = _setting_of_checkpoint(experiment, target), experiment.checkpoint.get("epoch", 0)
        val = experiment.evaluated("val", setting)
    else:
        setting, epoch, val = compress(experiment, dense)
    test = experiment.evaluated("test", setting)
    result = _result(experiment, setting, epoch, {"uncompressed": dense, "target": target}, val, test)
    if run.is_main:
        write_json(val.predictions, folder / "predictions_val.json")
        write_json(test.predictions, folder / "predictions_test.json")
        for name, content in test.submission.items():
            write_json(content, folder / name)
        write_json(result, folder / "result.json")
    logger.info(
        "test: %s at %.4f GFLOPs per sample (%.1f %% fewer), temperature %s; %s; %.0f s",
        ", ".join(f"{name} {value:.2f}" for name, value in test.metrics.items()),
        result["gflops"]["measured"],
        100 * (1 - result["gflops"]["measured"] / dense),
        "off" if setting.temperature is None else f"{setting.temperature:.4g}",
        folder / "result.json",
        time.time() - started,
    )
    barrier()
    return result


def compress(experiment: Experiment, dense: float) -> tuple[PruneSetting, int, Evaluation]:
    """All epochs. Leaves the model with the selected weights; returns their setting, epoch and validation result.

    The temperature is calibrated before an epoch that lowers the target, and after an epoch at p, whose result may be selected.
    """
    config, run, folder = experiment.config, experiment.run, Path(experiment.config.output_dir)
    trainer = _trainer(experiment)
    setting, best_score, first_epoch = OFF, float("-inf"), 0
    if config.resume:
        saved = load_run(config.resume_path, trainer, experiment.model, run)
        setting = PruneSetting(saved["temperature"], saved["prune_from"])
        best_score, first_epoch = saved["best_score"], saved["epoch"] + 1
        best = config.resume_path.with_name("checkpoint_best.pth")
        if run.is_main and best.is_file() and best.parent.resolve() != folder.resolve():
            shutil.copy(best, folder)  # the run goes on in another folder
    elif run.is_main:
        (folder / "checkpoint_best.pth").unlink(missing_ok=True)  # an earlier run's must not be taken for this one's
    log = RunLog(folder if run.is_main else None, keep=first_epoch > 0)
    for epoch in range(first_epoch, config.max_epoch):
        started = time.time()
        goals = [ramped(config.p, number, config.ramp_epochs, config.max_epoch) for number in (epoch - 1, epoch)]
        target, ramping = dense * (1 - goals[1]), goals[1] < config.p
        if epoch == 0 or goals[0] < goals[1]:
            setting, _ = meet(experiment, target, setting, ramping, moved=True)
        experiment.loaders["train"].sampler.set_epoch(epoch)
        train_started = time.time()
        losses = train_epoch(
            trainer, experiment.loaders["train"], experiment.losses, experiment.loss_weights, setting,
            experiment.precision, run, f"epoch {epoch + 1}/{config.max_epoch}",
        )  # fmt: skip
        train_seconds = time.time() - train_started
        if ramping:
            measured = experiment.measure(setting)
        else:
            setting, measured = meet(experiment, target, setting)
        val = experiment.evaluated("val", setting)
        within = abs(measured - dense * (1 - config.p)) <= WITHIN_BUDGET * dense * (1 - config.p)
        score = val.metrics[experiment.score] if within else float("-inf")
        state = _run_state(config, setting, epoch, max(score, best_score))
        selected = score > best_score
        if selected:
            best_score = score
            if run.is_main:
                save_atomic({"model": experiment.model.state_dict(), **state}, folder / "checkpoint_best.pth")
        save_run(folder / "checkpoint_last.pth", trainer, experiment.model, state, run)
        entry = {
            "epoch": epoch, "loss": losses, "lr": trainer.schedule.rate(trainer.step - 1), **asdict(setting),
            "gflops": {"target": target, "measured": measured, "val": val.gflops}, "val": val.metrics,
            "selected": selected, "seconds": {"train": train_seconds, "all": time.time() - started},
        }  # fmt: skip
        log.write(entry)
        logger.info(
            "epoch %d: loss %.4f, val %s %.2f at %.4f GFLOPs (target %.4f), temperature %s, %.0f s",
            epoch + 1, losses["total"], experiment.score, val.metrics[experiment.score], measured, target,
            "off" if setting.temperature is None else f"{setting.temperature:.4g}", entry["seconds"]["all"],
        )  # fmt: skip
    return _selected(experiment, folder)


def ramped(p: float, epoch: int, ramp_epochs: int | None, epochs: int) -> float:
    """The share of GFLOPs to remove in an epoch: p, reached in equal steps over the first `ramp_epochs` (a third by default)."""
    ramp = max(1, round(epochs / 3) if ramp_epochs is None else ramp_epochs)
    return p * min(1.0, (epoch + 1) / ramp)


def meet(
    experiment: Experiment, target: float, start: PruneSetting, ramping: bool = False, moved: bool = False
) -> tuple[PruneSetting, float]:
    """The setting that meets `target` GFLOPs on the calibration slice, and its GFLOPs; OFF for an uncompressed run.

    The search sets out from `start`; when the target `moved`, not from one that prunes late, since it may now prune earlier.

    On the way to p the nearest setting will do: between the gentlest pruning from one block on and the strongest from the next may
    lie a gap.

    Raises:
        UserError: naming the range of p, when the target is out of reach.
    """
    config = experiment.config
    if config.uncompressed:
        return OFF, experiment.measure(OFF)
    try:
        found = calibrate(
            experiment.measure,
            target,
            start=start if start.temperature is not None and (start.prune_from == config.prune_from or not moved) else None,
            prune_from=config.prune_from,
            max_prune_from=experiment.model.depth - 1,
        )
        return found.setting, found.gflops
    except UnreachableTarget as error:
        if ramping:
            logger.info("%.4f GFLOPs wanted, %.4f is the nearest on the way", target, error.nearest.gflops)
            return error.nearest.setting, error.nearest.gflops
        dense = experiment.measure(OFF)
        low, high = (max(0.0, 1 - gflops / dense) for gflops in (error.high, error.low))
        raise UserError(
            f"p = {config.p:g} is out of reach: with these weights and settings pruning removes {low:.3f} to {high:.3f} of the"
            f" GFLOPs ({target:.4f} wanted, {error.low:.4f} to {error.high:.4f} possible); choose p in that range"
        ) from None


def _trainer(experiment: Experiment) -> Trainer:
    config, run = experiment.config, experiment.run
    model = experiment.model
    if run.world_size > 1:
        model = DistributedDataParallel(
            model, device_ids=[run.device.index] if run.device.type == "cuda" else None, broadcast_buffers=False
        )
    seed_everything(config.seed + run.rank)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=config.init_lr, weight_decay=config.weight_decay, fused=True)
    steps = len(experiment.loaders["train"])
    schedule = CosineSchedule(
        config.init_lr, config.min_lr, config.max_epoch, steps, config.warmup_steps, config.lr_schedule == "step"
    )
    return Trainer(model, optimizer, experiment.precision.scaler(), schedule, config.clip_grad)


def _run_state(config: Config, setting: PruneSetting, epoch: int, best_score: float) -> dict:
    """What is saved beside the weights. A setting means little without the rule and the batch size that it was made for."""
    rule = {"method": config.method, "variant": config.variant, "keep": config.keep, "batch_size": config.batch_size_test}
    return {**asdict(setting), "epoch": epoch, "p": config.p, "best_score": best_score, **rule}


def _selected(experiment: Experiment, folder: Path) -> tuple[PruneSetting, int, Evaluation]:
    """Load the best checkpoint and validate it anew: what is reported is what the file gives."""
    barrier()
    path = folder / "checkpoint_best.pth"
    if not path.is_file():
        raise UserError(
            f"{folder}: no epoch came within {WITHIN_BUDGET:.0%} of the target; train more epochs or raise 'calibration_size'"
        )
    saved = torch.load(path, map_location=experiment.run.device, weights_only=True)
    experiment.model.load_state_dict(saved["model"])
    setting = PruneSetting(saved["temperature"], saved["prune_from"])
    return setting, saved["epoch"], experiment.evaluated("val", setting)


def _setting_of_checkpoint(experiment: Experiment, target: float) -> PruneSetting:
    """The setting that the loaded weights came with, when it was made for this rule and p; else one calibrated for `target`."""
    config, saved = experiment.config, experiment.checkpoint
    setting = saved_setting(config, saved)
    here = _run_state(config, OFF, 0, 0.0)
    same = all(saved.get(key) == here[key] for key in RULE)
    same = same and (config.keep == "instance" or saved.get("batch_size") == here["batch_size"])
    if setting is not None and (config.uncompressed or is_authors(config, saved) or same):
        return setting
    logger.info("no temperature was saved for this rule, p and batch size: calibrating")
    return meet(experiment, target, OFF)[0]


def _result(
    experiment: Experiment, setting: PruneSetting, epoch: int, gflops: dict[str, float], val: Evaluation, test: Evaluation
) -> dict:
    config = experiment.config
    measured = experiment.measure(setting)
    return {
        "task": config.task,
        "method": config.method if setting.temperature is not None else "none",
        "variant": config.variant,
        "keep": config.keep,
        "reduce_ratio": config.p,
        **asdict(setting),
        "epoch": epoch,
        "seed": config.seed,
        "gflops": {
            **gflops, "measured": measured, "val": val.gflops, "test": test.gflops,
            "reference": experiment.reference,
            "deployment": experiment.mean(experiment.deployment, setting) if experiment.deployment else measured,
        },
        "params": count_parameters(experiment.model),
        "metrics": {"val": val.metrics, "test": test.metrics},
    }  # fmt: skip
