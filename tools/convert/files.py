"""What is converted, and writing it: a file of weights, or a folder of transformers."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.folder import is_folder
from configs.schema import Config
from engine.checkpoint import save_atomic
from models.weights.reading import StateDict, first_names, read_checkpoint
from tasks.registry import load_any_config
from utils import UserError

PRUNERS = ("space_dict", ".pruner.", "decoder_alignment.", "query_model.")


class Source(NamedTuple):
    """A checkpoint to convert.

    config: of the run that saved it; None where none is known, as for a folder of transformers, which has its own
    tokenizer: the key of that name, or the option; empty where neither is given
    """

    path: Path
    weights: StateDict
    config: Config | None
    tokenizer: str

    @property
    def is_folder(self) -> bool:
        return is_folder(self.path)


def open_source(path: Path, config: Path | None, tokenizer: str | None) -> Source:
    """Reads a checkpoint with its config, which may lie beside it as config.yaml.

    Raises:
        UserError: when either cannot be read, or when the checkpoint prunes tokens.
    """
    weights = read_checkpoint(path)["model"]
    if pruners := [name for name in weights if any(part in name for part in PRUNERS)]:
        raise UserError(
            f"{path}: prunes tokens ({first_names(pruners)}), which no other format knows; pass it on by tools/export.py, or"
            " convert the weights that its run started from"
        )
    beside = path.with_name("config.yaml")
    if config is None and not is_folder(path) and beside.is_file():
        config = beside
    settings = None if config is None else load_any_config(config, {"pretrained": ""})
    words = tokenizer or (str(settings.tokenizer) if settings else "")
    return Source(path, weights, settings, words or (str(path) if is_folder(path) else ""))


def layer_numbers(weights: StateDict, front: str) -> list[int]:
    """Returns the numbers that follow `front` in the names of weights.

    Raises:
        KeyError: when there is none.
    """
    numbers = [int(name.removeprefix(front).split(".")[0]) for name in weights if name.startswith(front)]
    if not numbers:
        raise KeyError(front)
    return numbers


def check_free(out: Path) -> None:
    """Checks that writing replaces nothing.

    Raises:
        UserError: when the file, or a folder that is not empty, is there already.
    """
    if out.is_file() or out.is_dir() and any(out.iterdir()):
        raise UserError(f"--out {out}: is there already; give another path")


def save_weights(out: Path, content: dict[str, Any]) -> None:
    """Saves a checkpoint as a file, for which `out` must not be a folder.

    Raises:
        UserError: when it cannot be written.
    """
    if out.is_dir() or out.suffix not in (".pth", ".pt", ".bin"):
        raise UserError(f"--out {out}: give a file that ends in .pth, .pt or .bin")
    out.parent.mkdir(parents=True, exist_ok=True)
    save_atomic(content, out)


def save_folder(out: Path, cls: type, config: Any, weights: StateDict, source: Path) -> None:
    """Saves config.json and model.safetensors of a model of transformers.

    Args:
        cls, config: its class and config.
        weights: under transformers' names, tied ones once.
        source: for the error message.

    Raises:
        UserError: when a weight is missing or superfluous, or has another shape.
    """
    with torch.device("meta"):
        expected = cls(config).state_dict()
    tied = getattr(cls, "_tied_weights_keys", None) or {}
    missing = [name for name in expected if name not in weights and name not in tied]
    unknown = [name for name in weights if name not in expected]
    other = [name for name in weights if name in expected and weights[name].shape != expected[name].shape]
    for names, what in ((unknown, "superfluous"), (missing, "missing"), (other, "of another shape")):
        if names:
            raise UserError(f"{source}: transformers' {cls.__name__} has no such form: {what} are {first_names(names)}")
    out.mkdir(parents=True, exist_ok=True)
    config.architectures = [cls.__name__]
    config.dtype = _dtype(weights.values())
    config.save_pretrained(out)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, out / "model.safetensors", {"format": "pt"})


def _dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """Returns the type of all tensors, float32 where they differ."""
    kinds = {tensor.dtype for tensor in tensors}
    return kinds.pop() if len(kinds) == 1 else torch.float32
