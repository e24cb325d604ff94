"""Saved models of any task: the rule and the setting that they prune by, and the whole, ready to predict."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from clip.tokenizer import load_clip_tokenizer
from configs.schema import Config
from data.text import Tokenizer, dec_token_id, enc_token_id, load_tokenizer, prompt_ids
from madtp.pruning import OFF, PruneSetting
from madtp.sparsity.masks import Pattern, SparseWeights, most_in_a_group
from models.build import caption_from_config, clip_from_config, nlvr_from_config, retrieval_from_config, vqa_from_config
from madtp.sparsity.layers import sparse_weights
from models.weights.blip import (
    StateDict,
    is_read,
    load_decoder_weights,
    load_nlvr_weights,
    load_retrieval_weights,
    read_checkpoint,
)
from models.weights.clip import load_clip_weights
from configs.load import load_any_config
from utils import Run, UserError, init_run

RULE = ("method", "variant", "keep", "p", "sparsity_type", "sparse_layers", "tis", "merge", "image_size")
LATER = ("sparse_layers", "tis", "merge", "image_size")  # older checkpoints do not have these keys of the rule
SAVED = (*RULE, "batch_size", "temperature", "prune_from", "epoch", "masked")  # beside weights; what using them takes

BUILD: dict[str, Callable[[Config, Tokenizer], nn.Module]] = {
    "nlvr": lambda config, words: nlvr_from_config(config, len(words)),
    "retrieval": lambda config, words: retrieval_from_config(config, len(words), enc_token_id(words)),
    "retrieval_clip": lambda config, words: clip_from_config(config, len(words)),
    "caption": lambda config, words: caption_from_config(
        config, len(words), prompt_ids(words, config.prompt), words.sep_token_id, words.pad_token_id
    ),
    "vqa": lambda config, words: vqa_from_config(config, len(words), dec_token_id(words), words.sep_token_id, words.pad_token_id),
}
LOAD: dict[str, Callable[[nn.Module, StateDict, str], list[str]]] = {
    "nlvr": load_nlvr_weights,
    "retrieval": load_retrieval_weights,
    "retrieval_clip": load_clip_weights,
    "caption": load_decoder_weights,
    "vqa": load_decoder_weights,
}


class Opened(NamedTuple):
    """A model on its device, in evaluation mode, and what it predicts with.

    sparse: its sparse weights, masked as they were saved; None where all are dense
    """

    config: Config
    model: nn.Module
    setting: PruneSetting
    tokenizer: Tokenizer
    run: Run
    sparse: SparseWeights | None


def build_model(config: Config) -> tuple[nn.Module, Tokenizer]:
    """The model that a config describes, with random weights, and its tokenizer."""
    tokenizer = (load_clip_tokenizer if config.task == "retrieval_clip" else load_tokenizer)(config.tokenizer)
    return BUILD[config.task](config, tokenizer), tokenizer


def restore(config: Config, saved: dict, source: str, setting: PruneSetting, device: str | None) -> tuple[Opened, list[str]]:
    """The model of what was `saved` in the file `source`, and the names of its weights that were not."""
    run = init_run(device, config.seed)
    model, tokenizer = build_model(config)
    missing = LOAD[config.task](model, saved["model"], source)
    model = model.to(run.device).eval()
    sparse = None
    if config.pattern is not None and saved.get("masked"):
        sparse = sparse_weights(model, config.pattern, config.sparse_layers)
        mask_as_saved(sparse, saved, source)
    return Opened(config, model, setting, tokenizer, run, sparse), missing


def rule_of(config: Config) -> dict:
    """What a temperature was made for, and means little without."""
    return {key: getattr(config, key) for key in RULE}


def other_rule(config: Config, saved: dict) -> str | None:
    """The first key of the rule that a run's checkpoint was saved with another value of; None where all agree."""
    older = {"sparsity_type": ""} | {key: getattr(config, key) for key in LATER}
    return next((key for key, value in rule_of(config).items() if {**older, **saved}.get(key) != value), None)


def saved_rule(saved: dict) -> dict:
    """The keys of a config that a checkpoint carries."""
    return {key: saved[key] for key in RULE if key in saved}


def is_authors(config: Config, saved: dict) -> bool:
    """Whether a checkpoint is one of the authors': they save a temperature, but no rule."""
    return config.variant == "released" and "variant" not in saved and isinstance(saved.get("temperature"), int | float)


def saved_setting(config: Config, saved: dict) -> PruneSetting | None:
    """The setting that a checkpoint was saved with: off, where sparse weights alone meet p; None where it is not known."""
    if config.uncompressed:
        return OFF
    if is_authors(config, saved):
        return PruneSetting(saved["temperature"]) if saved["temperature"] > 0 else OFF
    if saved.get("variant") != config.variant:
        return None  # a temperature of the one multiplies, of the other it divides
    if saved.get("temperature") is None:
        return OFF if saved.get("masked") else None
    return PruneSetting(saved["temperature"], saved.get("prune_from", config.prune_from))


def mask_as_saved(sparse: SparseWeights, saved: dict, source: str) -> None:
    """Mask the weights that were masked when they were saved, and so are zero where their masks are."""
    if unknown := set(saved["masked"]) - set(sparse.weights):
        raise UserError(f"{min(unknown)} was saved sparse and is to be dense; set sparse_layers as in the run's config.yaml")
    check_sparse({name: sparse.weights[name] for name in saved["masked"]}, sparse.pattern, source)
    sparse.select(saved["masked"])
    sparse.fix()


def check_sparse(weights: Mapping[str, Tensor], pattern: Pattern, source: str) -> None:
    """Refuse weights (O, I) that were masked and have more than the pattern allows: another mask would change the model."""
    for name, weight in weights.items():
        if (most := most_in_a_group(weight, pattern.group)) > pattern.kept:
            raise UserError(
                f"{source}: {name} is masked, but has {most} of {pattern.group} weights that are not zero, {pattern} wanted; give"
                " the checkpoint as its run left it"
            )


def open_checkpoint(
    path: str | Path, config: str | Path | None = None, device: str | None = None, task: str | None = None
) -> Opened:
    """The model of a checkpoint: pruned under the rule and at the temperature that it was saved with, dense where it has none.

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
        if isinstance(saved.get("temperature"), int | float) and "variant" not in saved:
            problem = "its temperature is of the authors' formulas"
            advice = "set variant: released in the config" if settings.task != "retrieval_clip" else f"fine-tune it, and {advice}"
        raise UserError(f"{path}: {problem}; {advice}")
    opened, missing = restore(settings, saved, str(path), setting, device)
    needed = [name for name in missing if is_read(name)]
    if needed:
        raise UserError(f"{path}: lacks {needed[0]}, so its answers would be random; give a checkpoint of this task's runs")
    return opened
