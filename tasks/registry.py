"""The table of tasks, and opening the config or the checkpoint of any of them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from configs.load import load_config, read_yaml
from configs.schema import Config
from data.text import Tokenizer
from engine.restore import is_authors, mask_as_saved, saved_rule, saved_setting
from madtp.rule import PruneSetting
from madtp.sparsity.layers import sparse_weights
from models.weights.reading import is_read, read_checkpoint
from tasks.caption import CaptionTask
from tasks.nlvr import NlvrTask
from tasks.opened import Opened
from tasks.retrieval import ClipRetrievalTask, RetrievalTask
from tasks.task import Task
from tasks.view import View
from tasks.vqa import VqaTask
from utils import Run, UserError, init_run

TASKS: dict[str, type[Task]] = {
    task.name(): task for task in (NlvrTask, RetrievalTask, ClipRetrievalTask, CaptionTask, VqaTask)
}


def demonstrated() -> Iterable[str]:
    """Returns the names of the tasks with a demo."""
    return [name for name, task in TASKS.items() if task.demo is not None]


def load_any_config(path: str | Path, overrides: dict[str, Any] | None = None, task: str | None = None) -> Config:
    """Returns the config of the task that the file's key `task` names, or else of `task`.

    Raises:
        UserError: as `load_config`, and when neither names a task.
    """
    named = read_yaml(Path(path)).get("task", task)
    if named not in TASKS:
        raise UserError(f"{path}: its key 'task' is {named!r}; set it, or --task, to one of {', '.join(TASKS)}")
    return load_config(TASKS[named].config_class, path, overrides)


def build_model(config: Config) -> tuple[nn.Module, Tokenizer]:
    """Returns the model that a config describes, with random weights, and its tokenizer."""
    task = TASKS[config.task](config, Run(torch.device("cpu")))
    return task.build(config), task.tokenizer


def restore(config: Config, saved: dict, source: str, setting: PruneSetting, device: str | None) -> tuple[Opened, list[str]]:
    """Returns the model with the weights `saved` in the file `source`, and the names of weights that the file lacks."""
    run = init_run(device, config.seed)
    task = TASKS[config.task](config, run)
    model = task.build(config)
    missing = task.load(model, saved["model"], source)
    model = model.to(run.device).eval()
    sparse = None
    if config.pattern is not None and saved.get("masked"):
        sparse = sparse_weights(model, config.pattern, config.sparse_layers)
        mask_as_saved(sparse, saved, source)
    return Opened(task, model, setting, sparse), missing


def open_checkpoint(
    path: str | Path, config: str | Path | None = None, device: str | None = None, task: str | None = None
) -> Opened:
    """Opens the model of a checkpoint, pruned under the rule and at the temperature that it was saved with; dense without one.

    Args:
        config: its YAML file; None: the config.yaml beside it.
        device: cpu or cuda; None: cuda when there is one.
        task: where the file names none.

    Raises:
        UserError: when the two do not fit each other, or when weights are missing that a prediction needs.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a run's checkpoint_best.pth")
    saved = read_checkpoint(path)
    dense = "temperature" not in saved and "space_dict" not in saved["model"]
    rule = {"p": 0.0} if dense else saved_rule(saved)
    settings = load_any_config(config or path.with_name("config.yaml"), {**rule, "device": device}, task)
    setting = saved_setting(settings, saved)
    if setting is None:
        problem, advice = "pruned weights without their temperature", "give a run's checkpoint_best.pth"
        if is_authors(saved):
            problem = "its temperature is of the authors' formulas"
            advice = "set variant: released in the config" if settings.task != "retrieval_clip" else f"fine-tune it, and {advice}"
        raise UserError(f"{path}: {problem}; {advice}")
    opened, missing = restore(settings, saved, str(path), setting, device)
    needed = [name for name in missing if is_read(name)]
    if needed:
        raise UserError(f"{path}: lacks {needed[0]}, so its answers would be random; give a checkpoint of this task's runs")
    return opened


def open_view(config: Config, checkpoint: Path | str, device: str | None = None, temperature: float | None = None) -> View:
    """Opens the view of a model at the temperature that its checkpoint was saved with, or at `temperature`.

    Raises:
        UserError: when the model prunes and there is no temperature.
    """
    saved = read_checkpoint(checkpoint)
    given = {} if temperature is None else {"temperature": temperature, "variant": config.variant}
    setting = saved_setting(config, {**saved, **given})
    if setting is None:
        raise UserError(f"{checkpoint}: holds no temperature; give one with --temperature, or a run's checkpoint")
    opened, _ = restore(config, saved, str(checkpoint), setting, device)
    view = TASKS[config.task].view
    return view(opened, view.test_samples(config, opened.task.tokenizer))
