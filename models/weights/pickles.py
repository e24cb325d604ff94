"""Pickled checkpoints of other training programs: what may lie beside the weights, and where the weights lie."""

import argparse
import pathlib
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

WRAPPERS = ("model", "state_dict", "model_state_dict")  # entries that hold the weights
FRONTS = ("module.", "model.")  # put before all names by DistributedDataParallel and Lightning
COMPILED = "_orig_mod."  # put before a compiled module's names by torch.compile
# Types that hold data alone: building one runs no code of the file.
_SCALAR = np.float64(0).__reduce__()[0]
_NUMBERS = (np.bool_, np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64)
_NUMBERS += (np.float16, np.float32, np.float64)
HARMLESS: list[Callable | tuple[Callable, str]] = [
    argparse.Namespace,
    types.SimpleNamespace,
    pathlib.PurePosixPath,
    pathlib.PureWindowsPath,
    *((pathlib.PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((pathlib.PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    np.dtype,
    *{type(np.dtype(number)) for number in _NUMBERS},
]


def load_plain(path: Path) -> Any:
    """Reads a pickle of tensors, plain values and the types of HARMLESS.

    Raises:
        pickle.UnpicklingError: when it holds anything else; nothing of it is run.
    """
    with torch.serialization.safe_globals(HARMLESS):
        return torch.load(path, map_location="cpu", weights_only=True)


def unwrapped(content: dict[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint with its weights as "model", under their own names.

    The other entries are kept where the weights lay there already, as in this project's checkpoints and the authors'; those of
    other programs mean other things.
    """
    where = next((key for key in WRAPPERS if _are_weights(content.get(key))), None)
    weights = content if where is None else content[where]
    others = content if where == "model" else {}
    return {**others, "model": _renamed(weights)}


def _are_weights(value: Any) -> bool:
    return isinstance(value, dict) and bool(value) and all(isinstance(tensor, torch.Tensor) for tensor in value.values())


def _renamed(weights: dict[str, Any]) -> dict[str, Any]:
    renamed = {str(name).replace(COMPILED, ""): value for name, value in weights.items()}
    while front := next((front for front in FRONTS if renamed and all(name.startswith(front) for name in renamed)), None):
        renamed = {name.removeprefix(front): value for name, value in renamed.items()}
    return renamed
