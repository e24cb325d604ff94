"""The compression and fine-tuning loop of all tasks.

An Experiment provides the losses, metrics and GFLOPs of a task. `compress` adjusts the prune setting epoch by epoch to meet the
GFLOPs target, and selects the best epoch on the validation split. `run_experiment` is the entry point of the scripts.
"""

import inspect
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from engine.bad_steps import BadSteps
from engine.deployment import fix_tokens
from engine.diagnostics import AlignmentWatch
from engine.elastic import Budgets
from engine.experiment import Evaluation, Experiment
from engine.flop_table import flop_table
from engine.initial import initialise_tokens
from engine.restore import authors_setting, check_pattern, check_variant, mask_as_saved, other_rule, saved_setting
from engine.results import (
    RunLog,
    code_version,
    count_parameters,
    warn_if_off_target,
    warn_of_missed_target,
    warn_of_slower_attention,
    warn_of_small_slice,
    write_json,
)
from engine.resume import Keeper, Standing
from engine.run_folder import RunFolder
from engine.schedule import ROUNDING, WeightPlan, check_reach
from engine.skipped import skipped_in_run, skipped_samples
from engine.train import CosineSchedule, EpochSums, Trainer, move, parameter_groups, train_epoch
from madtp.budget import WITHIN_BUDGET, UnreachableTarget, calibrate, within
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.masks import counted_dense
from utils import SharedError, UserError, barrier, gather_objects, logger, seed_everything

WAITING = 0.1  # share of an epoch's training that may wait for pictures without a hint


def run_experiment(experiment: Experiment) -> dict:
    """Trains or evaluates, as set in the config, and writes the files of the run. Returns the content of result.json."""
    used = RunFolder(experiment.config, experiment.run)
    with used.used():
        return _run(experiment, used)


def _run(experiment: Experiment, used: RunFolder) -> dict:
    config, run, folder = experiment.config, experiment.run, used.path
    if len(set(gather_objects(config.resume))) > 1:
        raise SharedError(f"{folder}: the processes see different files there; all machines must see the same folder")
    for note in config.command_line.notes:
        logger.info(note)
    if config.evaluate:
        check_pattern(config, experiment.checkpoint)
        check_variant(config, experiment.checkpoint)
    started, versions = time.time(), {"code": code_version(), "torch": torch.__version__}
    initialise_tokens(experiment)
    dense = experiment.measure(OFF)
    warn_of_small_slice(config, run)
    warn_of_slower_attention(config, run.device, experiment.precision.dtype if config.amp else torch.float32)
    if run.is_main and experiment.inputs:
        first = move(experiment.calibration_batches[0], run.device)
        logger.info("one sample by fvcore, uncompressed:\n%s", flop_table(experiment.model, experiment.inputs(first)))
    logger.info("uncompressed: %.4f GFLOPs per sample; target at p = %g: %.4f", dense, config.p, dense * (1 - config.p))
    if config.evaluate:
        (setting, epoch, p), bad = evaluated_setting(experiment, dense), 0
        if config.keep == "fixed":
            fix_tokens(experiment, setting, dense * (1 - p))
        used.prepare()
    else:
        (setting, epoch, bad), p = compress(experiment, dense, used), config.p
    with experiment.sparse_kernels(setting) as kernels:
        val, test = (experiment.evaluated(split, setting) for split in ("val", "test"))
    result = _result(experiment, setting, epoch, p, dense, val, test)
    result |= {
        "sparse_kernels": kernels, **skipped_in_run(config, experiment.loaders["calibration"]), "versions": versions,
        **({"bad_steps": bad} if bad else {}),
    }  # fmt: skip
    if p == config.p:
        warn_if_off_target(config, result["gflops"], setting)
    if run.is_main:
        write_json(val.predictions, folder / "predictions_val.json")
        write_json(test.predictions, folder / "predictions_test.json")
        for name, content in test.submission.items():
            write_json(content, folder / name)
        write_json(result, folder / "result.json")
    if experiment.sparse:
        params = result["params"]
        logger.info(
            "GFLOPs per sample by pruned tokens alone %.4f, by sparse weights alone %.4f, by both %.4f; %d of %d weights of the"
            " sparse layers are not zero", *(result["gflops"][key] for key in ("tokens", "weights", "measured")),
            params["sparse_nonzero"], params["sparse_total"],
        )  # fmt: skip
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


def compress(experiment: Experiment, dense: float, used: RunFolder) -> tuple[PruneSetting, int, int]:
    """Runs all epochs. The model ends with the weights of the selected epoch.

    Returns:
        their prune setting, the epoch, and the number of steps of the run that were skipped.

    The temperature is calibrated before each epoch that lowers the target, to train at that target. It is calibrated again after
    each epoch at the full p, because training changes the GFLOPs and the epoch may be selected.
    """
    config = experiment.config
    plan = WeightPlan(config, experiment.sparse, experiment.measure, experiment.mask, dense)
    training = _Training(experiment, plan, dense, used)
    keeper = training.keeper
    if config.resume:
        keeper.restore()
    used.prepare()
    log = used.open_log(keeper.now.epoch)
    first = keeper.now.epoch
    with keeper.interruption:
        for epoch in range(first, config.max_epoch):
            training.run_epoch(epoch, log, first=epoch == first)
    return *_selected(experiment, used.path), int(training.trainer.bad.total)


class _Training:
    """The epochs of a training run."""

    def __init__(self, experiment: Experiment, plan: WeightPlan, dense: float, used: RunFolder):
        self.experiment, self.plan, self.dense = experiment, plan, dense
        self.trainer, self.watch, self.budgets = build_trainer(experiment), AlignmentWatch(experiment), Budgets(experiment.config)
        self.keeper = Keeper(experiment, self.trainer, self.watch, self.budgets, used)

    def run_epoch(self, epoch: int, log: RunLog, first: bool) -> None:
        """Trains and validates an epoch, selects it if it is the best one yet, and saves the run."""
        experiment, keeper, plan, dense = self.experiment, self.keeper, self.plan, self.dense
        config, started = experiment.config, time.time()
        target, ramping = dense * (1 - plan.removal(epoch)), plan.removal(epoch) < config.p
        losses = self._train(epoch, target)
        with plan.counting(epoch):
            setting = keeper.now.setting
            setting, measured = (setting, experiment.measure(setting)) if ramping else meet(experiment, target, setting)
            if not ramping and (first or plan.removal(epoch - 1) < config.p):
                warn_of_missed_target(config, epoch, measured, dense, setting)
            val = experiment.evaluated("val", setting)
        selectable = plan.settled(epoch) and within(measured, dense * (1 - config.p), setting)
        score = val.metrics[experiment.score] if selectable else float("-inf")
        selected, bad, sums = score > keeper.now.best_score, int(self.trainer.bad.total), keeper.now.sums
        entry = {
            "epoch": epoch, "loss": losses, "lr": self.trainer.schedule.rate(self.trainer.step - 1), **asdict(setting),
            "gflops": {"target": target, "measured": measured, "val": val.gflops}, "val": val.metrics,
            "alignment": self.watch.report(setting), "selected": selected, "bad_steps": bad,
            **skipped_samples(config, experiment.loaders["train"]),
            "seconds": {"train": sums.seconds, "waiting": sums.waited, "all": time.time() - started},
        }  # fmt: skip
        keeper.now = Standing(setting, max(score, keeper.now.best_score), epoch)
        with keeper.interruption.held():
            if selected:
                keeper.save_best()
            log.write(entry)  # before the checkpoint: a run that is killed between the two trains the epoch again and logs it anew
            keeper.save_epoch()
        logger.info(
            "epoch %d: loss %.4f, val %s %.2f at %.4f GFLOPs (target %.4f), temperature %s, %.0f s%s%s",
            epoch + 1, losses["total"], experiment.score, val.metrics[experiment.score], measured, target,
            "off" if setting.temperature is None else f"{setting.temperature:.4g}", entry["seconds"]["all"],
            f"; {bad} steps skipped so far, as not finite" if bad else "", of_waiting(sums),
        )  # fmt: skip

    def _train(self, epoch: int, target: float) -> dict[str, float]:
        """Trains an epoch, or what is left of it in a run that was cut. Returns the mean losses."""
        experiment, keeper, config = self.experiment, self.keeper, self.experiment.config
        if keeper.now.sums is None:
            share = self.plan.removal(epoch) / config.p if config.p else 0.0
            setting = _enter_epoch(experiment, self.plan, epoch, target, keeper.now.setting)
            self.budgets.enter(
                setting, share, self.dense,
                lambda wanted, start: meet(experiment, wanted, start, ramping=True, moved=True)[0],
            )  # fmt: skip
            keeper.now = Standing(setting, keeper.now.best_score, epoch, EpochSums())
        loader, sums, name = experiment.loaders["train"], keeper.now.sums, f"epoch {epoch + 1}/{config.max_epoch}"
        loader.sampler.set_epoch(epoch)
        with keeper.interruption.held():
            losses = train_epoch(
                self.trainer, loader, experiment.losses, experiment.loss_weights, self.budgets.at, experiment.precision,
                experiment.run, name, None if sums.steps else self.watch.see_losses, sums, keeper,
            )  # fmt: skip
            keeper.after_steps()
        return losses


def of_waiting(sums: EpochSums) -> str:
    """Returns a hint where the training of an epoch waited for its pictures, and nothing where it did not."""
    share = sums.waited / max(sums.seconds, 1e-9)
    return f"; {share:.0%} of the training waited for pictures: raise num_workers" if share > WAITING else ""


def _enter_epoch(experiment: Experiment, plan: WeightPlan, epoch: int, target: float, setting: PruneSetting) -> PruneSetting:
    """Masks the weights that the plan masks in this epoch. Calibrates again if the target or the masks have changed."""
    if plan.removal(epoch) == 0:
        return OFF
    masked = plan.enter(epoch, setting)
    with plan.counting(epoch):
        if plan.chooses(epoch):
            return choose(experiment, plan, target, setting)
        if epoch == 0 or plan.removal(epoch - 1) < plan.removal(epoch) or masked:
            return meet(experiment, target, setting, plan.removal(epoch) < experiment.config.p, moved=True)[0]
    return setting


def _mask_for_evaluation(experiment: Experiment) -> None:
    """Masks the weights as they were saved. If they were saved dense, masks all of them by magnitude."""
    if experiment.checkpoint.get("masked") is None:
        experiment.mask(experiment.sparse.weights, OFF)
        experiment.sparse.fix()
    else:
        mask_as_saved(experiment.sparse, experiment.checkpoint, str(experiment.config.pretrained))


def choose(experiment: Experiment, plan: WeightPlan, target: float, setting: PruneSetting) -> PruneSetting:
    """Lowers the GFLOPs to `target` by the cheapest options (order: adaptive), which may mask weights. Returns the new setting."""
    return plan.choose(
        target,
        setting,
        experiment.measure,
        meet=lambda wanted: meet(experiment, wanted, setting, ramping=True, moved=True),
        score=lambda tried: experiment.evaluated("val", tried).metrics[experiment.score],
    )


def meet(
    experiment: Experiment, target: float, start: PruneSetting, ramping: bool = False, moved: bool = False
) -> tuple[PruneSetting, float]:
    """Finds the setting that meets `target` GFLOPs on the calibration subset. Returns it with its GFLOPs; OFF if uncompressed.

    Args:
        start: the setting that the search starts from. It is ignored if the target `moved` and it prunes from a later block than
            the config: earlier blocks may be able to prune now.
        ramping: accept the nearest setting if none meets the target. There may be a gap between the gentlest pruning from one
            block on and the strongest pruning from the next, and on the way to p the exact target does not matter.
        moved: the target or the masks have changed since `start` was found.

    Raises:
        UserError: when the target is out of reach; names the possible range of p.
    """
    config = experiment.config
    if config.uncompressed or experiment.sparse:
        whole = experiment.measure(OFF)
        if config.uncompressed or whole <= target * (1 + ROUNDING):
            return OFF, whole
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
            logger.info("no setting meets the epoch's target of %.4f GFLOPs; the nearest has %.4f", target, error.nearest.gflops)
            return error.nearest.setting, error.nearest.gflops
        with counted_dense(experiment.sparse):
            dense = experiment.measure(OFF)  # p refers to the uncompressed model with dense weights
        low, high = (max(0.0, 1 - gflops / dense) for gflops in (error.high, error.low))
        raise UserError(
            f"p = {config.p:g} is out of reach: with these weights and settings pruning removes {low:.3f} to {high:.3f} of the"
            f" GFLOPs ({target:.4f} wanted, {error.low:.4f} to {error.high:.4f} possible); choose p in that range"
        ) from None


def build_trainer(experiment: Experiment) -> Trainer:
    """Builds the optimizer and the schedule of a run, and seeds its training."""
    config, run = experiment.config, experiment.run
    model = experiment.model
    if run.world_size > 1:
        model = distributed(model, run.device)
    seed_everything(config.seed + run.rank)
    groups = parameter_groups(experiment.model, config.align_lr_scale)
    optimizer = torch.optim.AdamW(groups, lr=config.init_lr, weight_decay=config.weight_decay, fused=True)
    batches = len(experiment.loaders["train"])
    steps = batches // config.accumulate
    if not steps:
        raise UserError(f"accumulate: {config.accumulate} batches make a step, and an epoch has {batches}; lower 'accumulate'")
    schedule = CosineSchedule(
        config.init_lr, config.min_lr, config.max_epoch, steps, config.warmup_steps, config.lr_schedule == "step"
    )
    return Trainer(
        model, optimizer, experiment.precision.scaler(), schedule, config.clip_grad, sparse=experiment.sparse,
        accumulate=config.accumulate, bad=BadSteps(config.max_bad_steps),
    )  # fmt: skip


def distributed(model: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wraps a model whose buffers are the same in all processes: each computes them from all processes' batches."""
    known = inspect.signature(DistributedDataParallel).parameters
    unsynced = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # renamed in torch 2.13
    return DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, **{unsynced: False})


def _selected(experiment: Experiment, folder: Path) -> tuple[PruneSetting, int]:
    """Loads the best checkpoint. It is evaluated again afterwards, so that the reported results are those of the saved file."""
    barrier()
    path = folder / "checkpoint_best.pth"
    if not path.is_file():
        shared = "; on several machines, all must see the folder" if experiment.run.world_size > 1 else ""
        raise UserError(
            f"{folder}: no epoch came within {WITHIN_BUDGET:.0%} of the target; train more epochs or raise 'calibration_size'"
            + shared
        )
    saved = torch.load(path, map_location=experiment.run.device, weights_only=True)
    experiment.model.load_state_dict(saved["model"])
    return PruneSetting(saved["temperature"], saved["prune_from"]), saved["epoch"]


def evaluated_setting(experiment: Experiment, dense: float) -> tuple[PruneSetting, int, float]:
    """Returns the setting to evaluate at, the epoch that the checkpoint is of, and p.

    A checkpoint of the authors' code has its own temperature; p is what that removes, whatever the config has.
    """
    config, saved = experiment.config, experiment.checkpoint
    theirs, p = authors_setting(config, saved), config.p
    if experiment.sparse is not None:
        _mask_for_evaluation(experiment)
        if saved.get("masked") is None and theirs is None:
            check_reach(config, 1 - experiment.measure(OFF) / dense)
    if theirs is not None:
        p = 1 - experiment.measure(theirs) / dense
        logger.info("temperature %g of the authors' checkpoint removes %.3f of the GFLOPs", saved["temperature"], p)
    return _setting_of_checkpoint(experiment, dense * (1 - config.p)), saved.get("epoch", 0), p


def _setting_of_checkpoint(experiment: Experiment, target: float) -> PruneSetting:
    """Returns the setting saved with the loaded weights if it was made for this rule and p, else calibrates one for `target`."""
    config, saved = experiment.config, experiment.checkpoint
    setting = saved_setting(config, saved)
    same_batch = config.keep_rule == "instance" or saved.get("batch_size") == config.batch_size_test
    same = same_batch and other_rule(config, saved) is None and not config.sd_redraw
    if setting is not None and (config.uncompressed or authors_setting(config, saved) is not None or same):
        return setting
    logger.info("no temperature was saved for this rule, p and batch size: calibrating")
    return meet(experiment, target, OFF)[0]


def _result(
    experiment: Experiment, setting: PruneSetting, epoch: int, p: float, dense: float, val: Evaluation, test: Evaluation
) -> dict:
    config, sparse = experiment.config, experiment.sparse
    measured = experiment.measure(setting)
    with counted_dense(sparse):
        tokens_alone = experiment.measure(setting)
    nonzero, masked = sparse.nonzero if sparse else (0, 0)
    return {
        "task": config.task,
        "method": config.method if setting.temperature is not None else "none",
        "variant": config.variant,
        "keep": config.keep,
        "sparsity_type": config.sparsity_type if sparse else "",
        "reduce_ratio": p,
        **asdict(setting),
        "epoch": epoch,
        "seed": config.seed,
        "gflops": {
            "uncompressed": dense, "target": dense * (1 - p), "measured": measured,
            "tokens": tokens_alone, "weights": experiment.measure(OFF),
            "val": val.gflops, "test": test.gflops,
            "reference": experiment.reference,
            "deployment": experiment.mean(experiment.deployment, setting, in_turn=True) if experiment.deployment else measured,
        },
        "params": {**count_parameters(experiment.model), "sparse_nonzero": nonzero, "sparse_total": masked},
        "metrics": {"val": val.metrics, "test": test.metrics},
        **({"scoring": test.scoring} if test.scoring else {}),
    }  # fmt: skip
