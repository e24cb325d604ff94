"""A checkpoint in its deployment form: the model keeps fixed numbers of tokens, from the calibration slice of its run's data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.schema import Config
from data.nlvr import read_statements
from data.text import enc_token_id, encode
from engine.compress import evaluated_setting
from engine.deployment import fix_tokens
from engine.experiment import Experiment
from engine.restore import is_authors, saved_rule
from engine.start import start
from madtp.blocks import Guidance
from madtp.deploy import Counts, fix_counts
from madtp.flops import GIGA
from madtp.rule import OFF, PruneSetting
from models.weights.reading import read_checkpoint
from tasks.registry import TASKS, load_any_config
from tasks.task import Inputs, Task
from utils import UserError, init_run

RETRIEVAL = ("retrieval", "retrieval_clip")
ROUND_TO = 8  # tokens of a text


@dataclass
class Deployment:
    """A model that keeps fixed numbers of tokens, or a dense one.

    config: of the run, with the rule of the checkpoint
    setting: at which its blocks prune; their temperature has no effect
    counts: tokens to keep by branch and block; empty for a dense model
    inputs: the task's inputs of the calibration slice, in batches
    """

    task: Task
    config: Config
    model: nn.Module
    setting: PruneSetting
    counts: Counts
    inputs: list[Inputs]


def deployed(checkpoint: Path, config: Path | None, task: str | None) -> Deployment:
    """Opens a checkpoint on the CPU and fixes its numbers of tokens, unless the checkpoint holds them.

    Raises:
        UserError: when its rule has no deployment form, or the checkpoint is inconsistent.
    """
    saved, path = read_checkpoint(checkpoint), config or checkpoint.with_name("config.yaml")
    dense = "temperature" not in saved and "space_dict" not in saved["model"]
    rule = {"p": 0.0} if dense else saved_rule(saved)
    named = load_any_config(path, rule, task)
    if named.task == "retrieval_clip" and named.clip.family == "siglip":
        raise UserError(f"{checkpoint}: a SigLIP, which is not exported to onnx or openvino; give --format safetensors")
    if is_authors(saved) or not named.uncompressed and (named.method, named.variant) != ("dtp", "paper"):
        raise UserError(
            f"{checkpoint}: fixed numbers of tokens are for method dtp, variant paper; this is {named.method}, {named.variant}"
        )
    keep = "instance" if named.task in RETRIEVAL else "fixed"
    evaluated = {"device": "cpu", "keep": keep, "evaluate": True, "pretrained": str(checkpoint)}
    settings = load_any_config(path, {**rule, **evaluated}, task)
    opened = TASKS[settings.task](settings, init_run("cpu", settings.seed))
    model, state, _ = start(settings, opened.run.device, opened.build, opened.load)
    experiment = opened.experiment(model.eval(), opened.loaders(), state, losses=opened.losses, evaluate=opened.evaluate)
    inputs = [opened.inputs(batch) for batch in experiment.calibration_batches]
    if settings.uncompressed:
        return Deployment(opened, named, model, OFF, {}, inputs)
    branches = {"vision": model.branches["vision"]} if settings.task == "retrieval" else model.branches
    if "counts" in saved:
        counts, setting = saved["counts"], PruneSetting(0.0, saved.get("prune_from", settings.prune_from))
        fix_counts(branches, counts)
    else:
        counts, setting = solved_counts(experiment, branches)
    return Deployment(opened, named, model, replace(setting, temperature=0.0), counts, inputs)


@torch.no_grad()
def solved_counts(experiment: Experiment, branches: dict[str, nn.ModuleList]) -> tuple[Counts, PruneSetting]:
    """Finds the numbers that meet p, as an evaluation with `keep: fixed` does.

    Retrieval's p is a share of a training step, with momentum encoders that no exported file has. Its numbers cost what the
    encoders that are exported cost on the calibration slice at the checkpoint's temperature.
    """
    config, dense = experiment.config, experiment.measure(OFF)
    setting, _, p = evaluated_setting(experiment, dense)
    if setting.temperature is None:
        return {}, setting
    target = dense * (1 - p)
    if config.task in RETRIEVAL:
        experiment.gflops = partial(encoder_gflops, TASKS[config.task].inputs, experiment)
        target = experiment.measure(setting)
    return fix_tokens(experiment, setting, target, branches), setting


def encoder_gflops(inputs_of, experiment: Experiment, model: nn.Module, batch: dict, setting: PruneSetting) -> Tensor:
    """Returns the GFLOPs of the encoders that are exported: both of CLIP, and the image encoder of BLIP's retrieval."""
    images, *text = inputs_of(experiment, batch)
    image = model.encode_image(images, Guidance(setting))
    if experiment.config.task == "retrieval":
        return (model.visual_encoder.flops(image.record) + model.vision_proj.weight.numel()).double() / GIGA
    return sum(model.tower_flops(image, model.encode_text(*text, Guidance(setting)))).double() / GIGA


def text_length(deployment: Deployment, asked: int | None) -> int:
    """Returns the tokens that exported texts are padded to: as `asked`, CLIP's longest, or the longest of NLVR2's statements."""
    task, config = deployment.task, deployment.config
    if config.task == "retrieval_clip":
        most, default = config.max_text_tokens, config.max_text_tokens
    elif config.task == "nlvr":
        most = config.bert_sizes.max_position_embeddings
        files = dict.fromkeys([*config.train_files, config.val_file, config.test_file])
        said = [entry["sentence"] for name in files for entry in read_statements(config.annotation_file(name))]
        longest = encode(task.tokenizer, said, most, enc_token_id(task.tokenizer))["input_ids"].shape[1]
        default = min(most, -(-longest // ROUND_TO) * ROUND_TO)
    else:
        return 0
    if asked is not None and asked > most:
        raise UserError(f"--text-tokens {asked}: task {config.task!r} reads at most {most}")
    return asked or default


def calibration(deployment: Deployment, select, number: int) -> Sequence[Inputs]:
    """Returns a part's inputs of the first samples of the calibration slice, one by one."""
    samples: list[Inputs] = []
    for inputs in deployment.inputs:
        parts = select(inputs)
        samples += [tuple(tensor[index : index + 1] for tensor in parts) for index in range(len(parts[0]))]
        if len(samples) >= number:
            break
    return samples[:number]
