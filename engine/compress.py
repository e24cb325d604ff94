"""The compression and fine-tuning loop of all tasks.

An Experiment provides the losses, metrics and GFLOPs of a task. `compress` adjusts the prune setting epoch by epoch to meet the
GFLOPs target, and selects the best epoch on the validation split. `run_experiment` is the entry point of the scripts.
"""

import os
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from configs.load import save_config
from configs.schema import Config
from engine.checkpoint import load_run, read_run, save_atomic, save_run
from engine.deployment import fix_tokens
from engine.diagnostics import AlignmentWatch
from engine.elastic import Budgets
from engine.experiment import Evaluation, Experiment
from engine.flop_table import flop_table
from engine.initial import initialise_tokens
from engine.restore import authors_setting, check_pattern, check_variant, mask_as_saved, other_rule, rule_of, saved_setting
from engine.results import (
    RunLog,
    code_version,
    count_parameters,
    log_changed_settings,
    settings_of,
    warn_if_off_target,
    warn_of_missed_target,
    warn_of_slower_attention,
    warn_of_small_slice,
    write_json,
)
from engine.schedule import ROUNDING, WeightPlan, check_reach
from engine.skipped import skipped_in_run, skipped_samples
from engine.train import CosineSchedule, Trainer, move, parameter_groups, train_epoch
from madtp.budget import WITHIN_BUDGET, UnreachableTarget, calibrate, within
from madtp.pruning import OFF, PruneSetting
from madtp.sparsity.masks import counted_dense
from utils import Run, UserError, barrier, logger, seed_everything

CHECKPOINTS = ("checkpoint_best.pth", "checkpoint_last.pth")
PLAN = ("order", "mask_schedule", "sparse_unit", "refit_weights")  # a resumed run must keep these


def run_experiment(experiment: Experiment) -> dict:
    """Trains or evaluates, as set in the config, and writes the files of the run. Returns the content of result.json."""
    config, run = experiment.config, experiment.run
    folder = Path(config.output_dir)
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
        setting, epoch, p = evaluated_setting(experiment, dense)
        if config.keep == "fixed":
            fix_tokens(experiment, setting, dense * (1 - p))
        _prepare(config, run)
    else:
        (setting, epoch), p = compress(experiment, dense), config.p
    with experiment.sparse_kernels(setting) as kernels:
        val, test = (experiment.evaluated(split, setting) for split in ("val", "test"))
    result = _result(experiment, setting, epoch, p, dense, val, test)
    result |= {"sparse_kernels": kernels, **skipped_in_run(config, experiment.loaders["calibration"]), "versions": versions}
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


def compress(experiment: Experiment, dense: float) -> tuple[PruneSetting, int]:
    """Runs all epochs. The model ends with the weights of the selected epoch; returns their prune setting and the epoch.

    The temperature is calibrated before each epoch that lowers the target, to train at that target. It is calibrated again after
    each epoch at the full p, because training changes the GFLOPs and the epoch may be selected.
    """
    config, run, folder = experiment.config, experiment.run, Path(experiment.config.output_dir)
    check_sources(config, folder)
    plan = WeightPlan(config, experiment.sparse, experiment.measure, experiment.mask, dense)
    trainer, watch, budgets = build_trainer(experiment), AlignmentWatch(experiment), Budgets(config)
    setting, best_score, first_epoch = resume_run(experiment, trainer, watch) if config.resume else (OFF, float("-inf"), 0)
    _prepare(config, run)
    log = _open_log(config, run, folder, first_epoch)
    for epoch in range(first_epoch, config.max_epoch):
        started = time.time()
        target, ramping = dense * (1 - plan.removal(epoch)), plan.removal(epoch) < config.p
        setting = _enter_epoch(experiment, plan, epoch, target, setting)
        budgets.enter(
            setting, plan.removal(epoch) / config.p if config.p else 0.0, dense,
            lambda wanted, start: meet(experiment, wanted, start, ramping=True, moved=True)[0],
        )  # fmt: skip
        experiment.loaders["train"].sampler.set_epoch(epoch)
        train_started = time.time()
        losses = train_epoch(
            trainer, experiment.loaders["train"], experiment.losses, experiment.loss_weights, budgets.at,
            experiment.precision, run, f"epoch {epoch + 1}/{config.max_epoch}", watch.see_losses,
        )  # fmt: skip
        train_seconds = time.time() - train_started
        with plan.counting(epoch):
            setting, measured = (setting, experiment.measure(setting)) if ramping else meet(experiment, target, setting)
            if not ramping and (epoch == first_epoch or plan.removal(epoch - 1) < config.p):
                warn_of_missed_target(config, epoch, measured, dense, setting)
            val = experiment.evaluated("val", setting)
        selectable = plan.settled(epoch) and within(measured, dense * (1 - config.p), setting)
        score = val.metrics[experiment.score] if selectable else float("-inf")
        selected, best_score = score > best_score, max(score, best_score)
        state = _run_state(experiment, setting, epoch, best_score)
        if selected and run.is_main:
            save_atomic({"model": experiment.model.state_dict(), **state}, folder / "checkpoint_best.pth")
        state |= {"config": settings_of(config), **watch.state()}
        save_run(folder / "checkpoint_last.pth", trainer, experiment.model, state, run)
        entry = {
            "epoch": epoch, "loss": losses, "lr": trainer.schedule.rate(trainer.step - 1), **asdict(setting),
            "gflops": {"target": target, "measured": measured, "val": val.gflops}, "val": val.metrics,
            "alignment": watch.report(setting),
            **skipped_samples(config, experiment.loaders["train"]),
            "selected": selected, "seconds": {"train": train_seconds, "all": time.time() - started},
        }  # fmt: skip
        log.write(entry)
        logger.info(
            "epoch %d: loss %.4f, val %s %.2f at %.4f GFLOPs (target %.4f), temperature %s, %.0f s",
            epoch + 1, losses["total"], experiment.score, val.metrics[experiment.score], measured, target,
            "off" if setting.temperature is None else f"{setting.temperature:.4g}", entry["seconds"]["all"],
        )  # fmt: skip
    return _selected(experiment, folder)


def resume_run(experiment: Experiment, trainer: Trainer, watch: AlignmentWatch) -> tuple[PruneSetting, float, int]:
    """Restores an interrupted run. Returns its prune setting, its best score so far and the next epoch.

    Raises:
        UserError: when the run had another pruning rule, or another plan for sparse weights.
    """
    config, run = experiment.config, experiment.run
    saved = read_run(config.resume_path, run)
    if key := other_rule(config, saved) or _other_plan(config, saved):
        raise UserError(
            f"{config.resume_path}: a run with {key} {saved.get(key)!r} cannot go on with {getattr(config, key)!r}; resume it"
            " with its own config.yaml, or start a new run in another --output_dir"
        )
    load_run(saved, config.resume_path, trainer, experiment.model, run)
    log_changed_settings(config, saved)
    watch.resume(saved)
    return PruneSetting(saved["temperature"], saved["prune_from"]), saved["best_score"], saved["epoch"] + 1


def _open_log(config: Config, run: Run, folder: Path, first_epoch: int) -> RunLog:
    """Opens the log of a run and removes the checkpoints of other runs from its folder.

    A run that is resumed in another folder copies its best checkpoint and its log there.
    """
    best = config.resume_path.with_name("checkpoint_best.pth") if config.resume else None
    if run.is_main and (best is None or best.parent.resolve() != folder.resolve()):
        for name in CHECKPOINTS:  # a checkpoint of an earlier run must not be mistaken for one of this run
            (folder / name).unlink(missing_ok=True)
        if best is not None and best.is_file():
            shutil.copy(best, folder)
    begun_in = config.resume_path.parent if config.resume else None
    if begun_in is not None and not (begun_in / "log.txt").is_file():
        begun_in = folder  # the checkpoint was moved, the log stayed
    return RunLog(folder if run.is_main else None, begun_in, first_epoch)


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


def _prepare(config: Config, run: Run) -> None:
    """Creates the folder of the run and writes config.yaml. An evaluation does not overwrite the config.yaml of a training run.

    Called only after all checks that are possible before training: the folder may hold an earlier run, which a bad config
    must not overwrite.
    """
    folder, advice = Path(config.output_dir), "give another folder with --output_dir"
    if run.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not (config.evaluate and (folder / "checkpoint_last.pth").is_file()):
                save_config(config.model_copy(update={"resume": ""}), folder / "config.yaml")
        except OSError as error:
            raise UserError(f"{folder}: {error.strerror or error}; {advice}") from None
        if not os.access(folder, os.W_OK):
            raise UserError(f"{folder}: may not be written to; {advice}")
    barrier()


def check_sources(config: Config, folder: Path) -> None:
    """Refuses to start from a checkpoint that the new run would remove, because it lies in the same folder."""
    for source in filter(None, () if config.resume else (config.pretrained, config.teacher)):
        if Path(source).resolve() in [(folder / name).resolve() for name in CHECKPOINTS]:
            raise UserError(f"{source}: a new run in {folder} would remove it; give another folder with --output_dir")


def _other_plan(config: Config, saved: dict) -> str | None:
    """Returns the first key of PLAN that a run was saved with another value of; None if all agree or no weights are sparse."""
    return next((key for key in PLAN if key in saved and saved[key] != getattr(config, key)), None) if config.pattern else None


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
        model = DistributedDataParallel(
            model, device_ids=[run.device.index] if run.device.type == "cuda" else None, broadcast_buffers=False
        )
    seed_everything(config.seed + run.rank)
    groups = parameter_groups(experiment.model, config.align_lr_scale)
    optimizer = torch.optim.AdamW(groups, lr=config.init_lr, weight_decay=config.weight_decay, fused=True)
    steps = len(experiment.loaders["train"])
    schedule = CosineSchedule(
        config.init_lr, config.min_lr, config.max_epoch, steps, config.warmup_steps, config.lr_schedule == "step"
    )
    return Trainer(model, optimizer, experiment.precision.scaler(), schedule, config.clip_grad, sparse=experiment.sparse)


def _run_state(experiment: Experiment, setting: PruneSetting, epoch: int, best_score: float) -> dict:
    """Returns the entries of a checkpoint besides the weights."""
    config, masked = experiment.config, sorted(experiment.sparse.masks) if experiment.sparse else None
    rule = {**rule_of(config), "batch_size": config.batch_size_test, **{key: getattr(config, key) for key in PLAN}}
    return {**asdict(setting), "epoch": epoch, "best_score": best_score, "masked": masked, **rule}


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
            "deployment": experiment.mean(experiment.deployment, setting) if experiment.deployment else measured,
        },
        "params": {**count_parameters(experiment.model), "sparse_nonzero": nonzero, "sparse_total": masked},
        "metrics": {"val": val.metrics, "test": test.metrics},
        **({"scoring": test.scoring} if test.scoring else {}),
    }  # fmt: skip
