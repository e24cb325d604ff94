"""Checks, before a long run, all that would stop it: config, files, disk, weights, device, and whether p can be reached.

    python tools/doctor.py --config configs/nlvr.yaml --p 0.5 --output_dir output/nlvr_p0.5
    python tools/doctor.py --config configs/nlvr.yaml --p 0.5 --output_dir output/nlvr_p0.5 --all --processes 8

It takes all flags of the entry script, which are listed below, and these:

  --all            read every picture, on all cores, not some hundred of them
  --pictures N     number of pictures to read of training, and of validation and test (default: 300)
  --processes N    number of processes that the run will have (default: 1)
  --quick          do not search the setting for p
  --task TASK      the task, if the config has no key 'task'

Each line is `ok`, `warning` or `problem`, with what to do. Nothing on the disk is changed. The exit code is 2 if something
was found that would stop the run.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from configs.load import parse_command_line, read_yaml
from configs.schema import Config
from engine.compress import build_trainer
from madtp.rule import OFF
from metrics.caption import not_computable
from tasks.registry import TASKS
from tasks.task import Task
from tools.checks.files import PICTURES, check_data, check_output
from tools.checks.findings import Findings
from tools.checks.training import check_epochs, check_p, check_resume, check_step, check_weights
from utils import Run, UserError, at_least_one, init_run, run_main, user_path


def main() -> None:
    own, rest = own_arguments()
    findings = Findings()
    config = findings.tried("config", lambda: read_config(own, rest))
    if config is not None:
        findings.ok("config", f"{own.config}: {config.task}, p = {config.p:g}, {'evaluation' if config.evaluate else 'training'}")
        for note in config.command_line.notes:
            findings.warning("config", note)
        examine(config, own, findings)
    print(findings.summary(), flush=True)
    if findings.counts["problem"]:
        sys.exit(2)


def own_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Splits the command line into the doctor's own arguments, and those of the entry script, which include --config."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", type=user_path)
    parser.add_argument("--task", choices=TASKS)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--pictures", type=at_least_one, default=PICTURES)
    parser.add_argument("--processes", type=at_least_one, default=1)
    parser.add_argument("--quick", action="store_true")
    own, rest = parser.parse_known_args(argv)
    return own, rest if own.config is None else ["--config", str(own.config), *rest]


def read_config(own: argparse.Namespace, rest: list[str]) -> Config:
    """Reads the config as the entry script of its task does."""
    named = None if own.config is None else read_yaml(own.config).get("task", own.task)
    if own.config is not None and named not in TASKS:
        raise UserError(f"{own.config}: its key 'task' is {named!r}; set it, or --task, to one of {', '.join(TASKS)}")
    return parse_command_line(__doc__, TASKS[named].config_class if named else Config, rest)


def examine(config: Config, own: argparse.Namespace, findings: Findings) -> None:
    """Runs all checks, the quick ones first. One that needs what another has found at fault is left out."""
    run = findings.tried("device", lambda: init_run(config.device, config.seed))
    if run is not None:
        findings.ok("device", f"{run.device}, {torch.cuda.get_device_name(run.device) if run.device.type == 'cuda' else 'no GPU'}")
    there = run or Run(torch.device("cpu"))
    # One picture at a time is read in this process: starting others would change nothing that is checked.
    task = findings.tried("tokenizer", lambda: TASKS[config.task](config.model_copy(update={"num_workers": 0}), there))
    if task is not None:
        findings.ok("tokenizer", f"{config.tokenizer}: {len(task.tokenizer):,} words")
    check_epochs(config, findings)
    check_output(config, findings)
    if config.task == "caption":
        for name, reason in not_computable().items():
            findings.warning("metrics", f"{name} is left out: {reason}")
    check_data(config, None if own.all else own.pictures, findings)
    loaders = None if task is None else findings.tried("data", task.loaders)
    started = check_weights(config, task, findings)
    if run is None or task is None or loaders is None or started is None:
        check_resume(config, None, None, own.processes, findings)
        findings.warning("training", "neither p nor a step is checked: a problem above is in the way")
        return
    rehearse(config, task, loaders, started, own, findings)


def rehearse(
    config: Config,
    task: Task,
    loaders: dict[str, Any],
    started: tuple[nn.Module, dict],
    own: argparse.Namespace,
    findings: Findings,
) -> None:
    """Runs the checks that need the model and the data: the run to resume, p, and a step of training."""
    parts = {"losses": task.losses, "evaluate": task.evaluate}
    experiment = findings.tried("training", lambda: task.experiment(started[0], loaders, started[1], **parts))
    if experiment is None:
        return
    trainer = None if config.evaluate else findings.tried("training", lambda: build_trainer(experiment))
    first = check_resume(config, experiment, trainer, own.processes, findings)
    if own.quick:
        findings.tried("calibration", lambda: experiment.calibration_batches)
        findings.warning("p", "not checked, with --quick")
    setting = None if own.quick else findings.tried("p", lambda: check_p(experiment, findings))
    if trainer is not None:
        step = partial(check_step, config, experiment, trainer, setting or OFF, first, own.processes, findings)
        findings.tried("training step", step)


if __name__ == "__main__":
    run_main(main)
