"""Where a run stands: saved while it trains, and restored when it goes on."""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from configs.schema import Config
from engine.checkpoint import BEST, LAST, load_run, read_run, save_atomic, save_run
from engine.diagnostics import AlignmentWatch
from engine.elastic import Budgets
from engine.experiment import Experiment
from engine.interruption import Interruption
from engine.restore import other_rule, rule_of
from engine.results import log_changed_settings, settings_of
from engine.run_folder import RunFolder
from engine.train import Control, EpochSums, Trainer
from madtp.rule import OFF, PruneSetting
from utils import UserError, barrier, gather_objects

PLAN = ("order", "mask_schedule", "sparse_unit", "refit_weights")  # a resumed run must keep these
# One that was cut within an epoch must keep these as well.
BATCHES = ("seed", "table", "train_files", "batch_size_train", "accumulate", "statements_per_pair")


@dataclass(frozen=True)
class Standing:
    """Where a run stands between two steps, besides what the Trainer holds.

    setting: the prune setting that it trains with, or has trained with
    epoch: the epoch that it is in, or that comes next
    sums: of an epoch that has begun; None between epochs
    """

    setting: PruneSetting = OFF
    best_score: float = float("-inf")
    epoch: int = 0
    sums: EpochSums | None = None


class Keeper(Control):
    """Saves a run and restores it; the Control of its epochs."""

    def __init__(self, experiment: Experiment, trainer: Trainer, watch: AlignmentWatch, budgets: Budgets, folder: RunFolder):
        self.experiment, self.trainer, self.watch, self.budgets, self.folder = experiment, trainer, watch, budgets, folder
        self.interruption = Interruption()
        self.now = Standing()
        self._saved = time.monotonic()

    # The Control of an epoch

    def wishes(self) -> tuple[bool, bool]:
        minutes = self.experiment.config.save_minutes
        due = minutes > 0 and time.monotonic() - self._saved > 60 * minutes
        return due, self.interruption.received is not None

    def after_step(self, save: bool, stop: bool) -> None:
        """Saves when it is time, but not while updates are being skipped; saves and leaves when a signal has come."""
        every = self.experiment.config.save_steps
        due = save or (every is not None and self.trainer.step % every == 0)
        if stop or (due and not self.trainer.bad.in_a_row):
            self.save_within()
        if stop:
            self._leave_together()

    def after_steps(self) -> None:
        """Saves after the last step of an epoch, so that a run that ends while it validates has its epoch; leaves as above."""
        self.save_within()
        if any(gather_objects(self.interruption.received is not None)):
            self._leave_together()

    def _leave_together(self) -> None:
        barrier()  # a launcher ends all processes as soon as one has left
        self.interruption.leave()

    # Saving

    def save_within(self) -> None:
        """Saves the run within its epoch, after the steps of `now.sums`."""
        sums = {**vars(self.now.sums), "counted": self.now.sums.counted.cpu()}
        sums["losses"] = {name: total.cpu() for name, total in self.now.sums.losses.items()}
        within = {
            "settings": [asdict(setting) for setting in self.budgets.settings],
            "gradients": self.watch.gradients,
            "batches": len(self.experiment.loaders["train"]),
            "ranks": gather_objects(sums),
        }
        self._save(within=within)

    def save_best(self) -> None:
        """Saves the weights after an epoch that was selected."""
        if self.experiment.run.is_main:
            save_atomic({"model": self.experiment.model.state_dict(), **self._state()}, self.folder.path / BEST)

    def save_epoch(self) -> None:
        """Saves the run after its epoch."""
        self._save()

    def _save(self, **more: object) -> None:
        state = {**self._state(), "config": settings_of(self.experiment.config), **self.watch.state(), **more}
        save_run(self.folder.path / LAST, self.trainer, self.experiment.model, state, self.experiment.run)
        self._saved = time.monotonic()

    def _state(self) -> dict:
        """Returns the entries of a checkpoint besides the weights."""
        config, sparse = self.experiment.config, self.experiment.sparse
        rule = {**rule_of(config), "batch_size": config.batch_size_test, **{key: getattr(config, key) for key in PLAN}}
        masked = sorted(sparse.masks) if sparse else None
        at = {"epoch": self.now.epoch, "best_score": self.now.best_score}
        return {**asdict(self.now.setting), **at, "masked": masked, **rule}

    # Going on

    def restore(self) -> None:
        """Restores an interrupted run.

        Raises:
            UserError: when the run had another pruning rule, or another plan for sparse weights, or within an epoch other batches.
        """
        config, run = self.experiment.config, self.experiment.run
        path = config.resume_path
        saved = read_run(path, run)
        if key := other_rule(config, saved) or _other_plan(config, saved):
            raise UserError(
                f"{path}: a run with {key} {saved.get(key)!r} cannot go on with {getattr(config, key)!r}; resume it"
                " with its own config.yaml, or start a new run in another --output_dir"
            )
        within = saved.get("within")
        if within is not None and (other := _other_batches(config, saved, len(self.experiment.loaders["train"]))):
            raise UserError(
                f"{path}: was saved within an epoch with {other}; go on with the run's own config.yaml and data, or start a new run"
            )
        load_run(saved, path, self.trainer, self.experiment.model, run)
        log_changed_settings(config, saved)
        self.watch.resume(saved)
        setting, best = PruneSetting(saved["temperature"], saved["prune_from"]), saved["best_score"]
        if within is None:
            self.now = Standing(setting, best, saved["epoch"] + 1)
            return
        self.budgets.settings = [PruneSetting(**each) for each in within["settings"]]
        self.watch.gradients = within["gradients"]
        self.now = Standing(setting, best, saved["epoch"], EpochSums(**within["ranks"][run.rank]))


def _other_plan(config: Config, saved: Mapping[str, Any]) -> str | None:
    """Returns the first key of PLAN that a run was saved with another value of; None if all agree or no weights are sparse."""
    return next((key for key in PLAN if key in saved and saved[key] != getattr(config, key)), None) if config.pattern else None


def _other_batches(config: Config, saved: Mapping[str, Any], batches: int) -> str | None:
    """Describes the first difference in the batches of the epoch that a run was cut in; None if there is none."""
    now = settings_of(config)
    for key in BATCHES:
        if saved["config"].get(key) != now.get(key):
            return f"{key} {saved['config'].get(key)!r}, and here it is {now.get(key)!r}"
    there = saved["within"]["batches"]
    return None if there == batches else f"{there} batches, and here it has {batches}"
