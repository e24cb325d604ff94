"""Folders of pruned models of other libraries: weights, how to build the model, and how it prunes."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import nn

from madtp.patch import prune
from madtp.patch.base import ATTRIBUTE, Pruning
from madtp.rule import PruneSetting, PruningRule

WEIGHTS, DESCRIPTION = "model.safetensors", "madtp.json"


def build(folder: Path, library: str, architecture: str) -> nn.Module:
    """Builds a model from the configuration in its folder, with new weights, in evaluation mode.

    Args:
        library: "transformers", "open_clip" or "timm".
        architecture: the class of the model, or for timm its name.
    """
    if library == "transformers":
        transformers = import_module("transformers")
        kind = getattr(transformers, architecture)
        return kind._from_config(kind.config_class.from_pretrained(folder)).eval()
    if library == "open_clip":
        config = dict(json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))["model_cfg"])
        config.pop("custom_text", None)
        config["vision_cfg"] = config["vision_cfg"] | {"timm_model_pretrained": False}
        return getattr(import_module("open_clip.model"), architecture)(**config).eval()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    options = {key: config[key] for key in ("num_classes", "global_pool") if key in config} | config.get("model_args", {})
    return import_module("timm").create_model(architecture, pretrained=False, **options).eval()


def save(model: nn.Module, folder: Path, library: str, architecture: str, measured: Mapping[str, Any]) -> None:
    """Writes the weights of a pruned model and its description. The configuration of its library goes beside them.

    Args:
        measured: what is to be remembered of how it was compressed, for the reader.
    """
    pruning: Pruning = getattr(model, ATTRIBUTE)
    learnable = pruning.learnable_tokens
    description = {
        "library": library,
        "architecture": architecture,
        "setting": asdict(pruning.setting),
        "rule": asdict(pruning.rule),
        "towers": [tower.name for tower in pruning.towers],
        "num_learnable": 0 if learnable is None else len(learnable),
        "packed": pruning.packed,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        **measured,
    }
    import_module("safetensors.torch").save_model(model, str(folder / WEIGHTS), {"format": "pt"})
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> nn.Module:
    """Loads a model that tools/compress.py wrote: it prunes as it was saved, in evaluation mode.

    Raises:
        ValueError: when the folder holds no such model.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION).is_file():
        raise ValueError(f"{folder}: has no {DESCRIPTION}; give a folder that tools/compress.py has written")
    told = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    model = build(folder, told["library"], told["architecture"])
    model.to(getattr(import_module("torch"), told["dtype"]))
    rule = PruningRule(**{**told["rule"], "terms": tuple(told["rule"]["terms"])})
    options = {"num_learnable": told["num_learnable"] or None, "packed": told["packed"], "towers": told["towers"]}
    prune(model, rule=rule, setting=PruneSetting(**told["setting"]), **options)
    import_module("safetensors.torch").load_model(model, str(folder / WEIGHTS))
    return model
