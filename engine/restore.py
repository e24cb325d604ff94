"""Restoring saved models: their pruning rule, their prune setting, and the masks of their sparse weights."""

from collections.abc import Mapping

from torch import Tensor

from configs.schema import Config
from madtp.pruning import OFF, PruneSetting
from madtp.sparsity.masks import Pattern, SparseWeights, most_in_a_group
from utils import UserError

RULE = ("method", "variant", "keep", "p", "sparsity_type", "sparse_layers", "tis", "mag", "merge", "guide", "image_size")
# The rule of checkpoints from before a key existed. Their image size is not known: it counts as the config's.
BEFORE = {
    "sparsity_type": "",
    "sparse_layers": "all",
    "tis": ["cls", "self", "token"],
    "mag": True,
    "merge": True,
    "guide": "shared",
}
SAVED = (*RULE, "batch_size", "temperature", "prune_from", "epoch", "masked")  # saved with the weights, and needed to use them


def rule_of(config: Config) -> dict:
    """Returns the pruning rule of a config: the keys that a temperature depends on."""
    return {key: getattr(config, key) for key in RULE}


def other_rule(config: Config, saved: dict) -> str | None:
    """Returns the first key of the rule whose value differs in a run's checkpoint; None if all agree."""
    older = {**BEFORE, "image_size": config.image_size}
    return next((key for key, value in rule_of(config).items() if {**older, **saved}.get(key) != value), None)


def saved_rule(saved: dict) -> dict:
    """Returns the config keys of the rule that a checkpoint holds, with their values."""
    return {key: saved[key] for key in RULE if key in saved}


def is_authors(config: Config, saved: dict) -> bool:
    """Tells whether a checkpoint is one of the authors': these hold a temperature, but no rule."""
    return config.variant == "released" and "variant" not in saved and isinstance(saved.get("temperature"), int | float)


def saved_setting(config: Config, saved: dict) -> PruneSetting | None:
    """Returns the setting that a checkpoint was saved with; None if it is not known. OFF if sparse weights alone meet p."""
    if config.uncompressed:
        return OFF
    if is_authors(config, saved):
        return PruneSetting(saved["temperature"]) if saved["temperature"] > 0 else OFF
    if saved.get("variant") != config.variant:
        return None  # the two variants use the temperature in opposite ways: one multiplies by it, the other divides
    if saved.get("temperature") is None:
        return OFF if saved.get("masked") else None
    return PruneSetting(saved["temperature"], saved.get("prune_from", config.prune_from))


def mask_as_saved(sparse: SparseWeights, saved: dict, source: str) -> None:
    """Masks the weights that were masked when they were saved. The saved zeros determine the masks."""
    if unknown := set(saved["masked"]) - set(sparse.weights):
        raise UserError(f"{min(unknown)} was saved sparse but is dense here; set sparse_layers as in the run's config.yaml")
    check_sparse({name: sparse.weights[name] for name in saved["masked"]}, sparse.pattern, source)
    sparse.select(saved["masked"])
    sparse.fix()


def check_sparse(weights: Mapping[str, Tensor], pattern: Pattern, source: str) -> None:
    """Refuses weights (O, I) saved as masked that have more nonzero values than the pattern allows.

    Masking them again would change the model.
    """
    for name, weight in weights.items():
        if (most := most_in_a_group(weight, pattern.group)) > pattern.kept:
            raise UserError(
                f"{source}: {name} is masked, but has {most} of {pattern.group} weights that are not zero, {pattern} wanted; give"
                " the checkpoint as its run left it"
            )
