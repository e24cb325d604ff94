"""Restoring saved models: their pruning rule, their prune setting, and the masks of their sparse weights."""

from collections.abc import Mapping

from torch import Tensor

from configs.schema import Config
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.masks import Pattern, SparseWeights, most_in_a_group
from utils import UserError

RULE = (
    "method", "variant", "keep", "p", "sparsity_type", "sparse_layers", "tis", "mag", "causal_scores", "merge", "guide",
    "prune_every", "image_size",
)  # fmt: skip
# The rule of checkpoints from before a key existed. Their image size is not known: it counts as the config's.
BEFORE = {
    "sparsity_type": "",
    "sparse_layers": "all",
    "tis": ["cls", "self", "token"],
    "mag": True,
    "causal_scores": "plain",
    "merge": True,
    "guide": "shared",
    "prune_every": 1,
}
SAVED = (*RULE, "batch_size", "temperature", "prune_from", "epoch", "masked", "counts")  # saved with the weights, to use them


def rule_of(config: Config) -> dict:
    """Returns the pruning rule of a config: the keys that a temperature depends on."""
    return {**{key: getattr(config, key) for key in RULE}, "keep": config.keep_rule}


def other_rule(config: Config, saved: dict) -> str | None:
    """Returns the first key of the rule whose value differs in a run's checkpoint; None if all agree."""
    older = {**BEFORE, "image_size": config.image_size}
    return next((key for key, value in rule_of(config).items() if {**older, **saved}.get(key) != value), None)


def saved_rule(saved: dict) -> dict:
    """Returns the config keys of the rule that a checkpoint holds, with their values."""
    return {key: saved[key] for key in RULE if key in saved}


def is_authors(saved: dict) -> bool:
    """Tells whether a compressed checkpoint was written by the authors' code: these hold a temperature, but no rule."""
    return "variant" not in saved and isinstance(saved.get("temperature"), int | float)


def authors_setting(config: Config, saved: dict) -> PruneSetting | None:
    """Returns the setting of a checkpoint of the authors' code under their formulas; None for another, or under the paper's."""
    if not is_authors(saved) or config.variant != "released" or config.uncompressed:
        return None
    return PruneSetting(saved["temperature"]) if saved["temperature"] > 0 else OFF


def check_variant(config: Config, saved: dict) -> None:
    """Refuses to evaluate a checkpoint of the authors' code under the paper's formulas, unless the command line asks for them.

    Under those its temperature means something else, and another one would be searched for. That files set `variant: paper` does
    not count as asking: all shipped ones do.
    """
    if not is_authors(saved) or config.variant != "paper" or config.uncompressed or "variant" in config.command_line.keys:
        return
    advice = "evaluate it with --set variant=released"
    if config.task == "retrieval_clip":
        advice = "their CLIP cannot be evaluated pruned as they do (see docs/method.md)"
    raise UserError(
        f"{config.pretrained}: is a compressed checkpoint of the authors' code, and here variant is paper; {advice}, or search"
        " another temperature for p with --set variant=paper"
    )


def check_pattern(config: Config, saved: dict) -> None:
    """Refuses to evaluate sparse weights under another pattern.

    Without their pattern the zeros would count as GFLOPs, and another pattern would remove more weights.
    """
    pattern, ours = saved.get("sparsity_type", ""), config.sparsity_type if config.pattern else ""
    if saved.get("masked") and ours != pattern:
        raise UserError(
            f"{config.pretrained}: was saved with sparsity_type {pattern}, and the config has '{ours}' at p {config.p:g}; evaluate"
            " with the run's config.yaml, or set p, sparsity_type and sparse_layers as there"
        )


def saved_setting(config: Config, saved: dict) -> PruneSetting | None:
    """Returns the setting that a checkpoint was saved with; None if it is not known. OFF if sparse weights alone meet p."""
    if config.uncompressed:
        return OFF
    if (setting := authors_setting(config, saved)) is not None:
        return setting
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
