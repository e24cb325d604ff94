"""Compressed weights as .safetensors with their run state in the metadata; N:M sparse weights can be packed.

The metadata key "madtp" holds a JSON object. If it contains "packed": [N, M], each weight X of its list "masked" is stored as
X.values and X.positions, in the format of `madtp.sparsity.masks.pack_weight`.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from madtp.sparsity.masks import Pattern, pack_weight, unpack_weight
from utils import UserError

KEY, PACKED = "madtp", "packed"
VALUES, POSITIONS = ".values", ".positions"


def save_exported(path: Path, weights: dict[str, Tensor], state: dict, pattern: Pattern | None = None) -> None:
    """Saves weights with their state, a JSON object; with a `pattern` the state's "masked" weights are packed.

    Raises:
        UserError: when the file cannot be written, for example because the disk is full; nothing is left of it.
    """
    if pattern:
        state = {**state, PACKED: list(pattern)}
        weights = dict(weights)
        for name in state["masked"]:
            weights[name + VALUES], weights[name + POSITIONS] = pack_weight(weights.pop(name), pattern)
    weights = {name: tensor.contiguous() for name, tensor in weights.items()}
    temporary = path.with_name(path.name + ".tmp")
    try:
        save_file(weights, temporary, {"format": "pt", KEY: json.dumps(state)})
        temporary.replace(path)
    except (OSError, SafetensorError):
        temporary.unlink(missing_ok=True)
        raise UserError(f"{path}: not written whole; make room on the disk, or give another place") from None


def is_exported(path: Path) -> bool:
    """Tells whether a file was written by `save_exported`."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    with safe_open(path, "pt") as file:
        return KEY in (file.metadata() or {})


def read_safetensors(path: Path) -> dict:
    """Reads a file back: the state dict as "model", with packed weights restored, and the state saved with it."""
    with safe_open(path, "pt") as file:
        weights = {name: file.get_tensor(name) for name in file.keys()}
        state = json.loads((file.metadata() or {}).get(KEY, "{}"))
    if pattern := state.pop(PACKED, None):
        for name in state["masked"]:
            weights[name] = unpack_weight(weights.pop(name + VALUES), weights.pop(name + POSITIONS), Pattern(*pattern))
    return {"model": weights, **state}
