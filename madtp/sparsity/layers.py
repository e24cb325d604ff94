"""The weights of a model that may become sparse: those of the linear layers in its blocks.

Embeddings, heads and the pruners' alignment stay dense.
"""

import re
from collections.abc import Iterable
from typing import Literal

from torch import nn

from madtp.sparsity.masks import Pattern, SparseWeights

Layers = Literal["mlp", "attention", "all"]
Unit = Literal["block", "tower"]

BLOCK = re.compile(r"(^|\.)(blocks|layer|resblocks)\.\d+\.")
ATTENTION = re.compile(r"\.(attn|attention|crossattention)\.")


def sparse_weights(model: nn.Module, pattern: tuple[int, int], layers: Layers) -> SparseWeights:
    """Collects the weights of `layers`, none of them masked yet; the weights of momentum encoders follow them."""
    parameters = dict(model.named_parameters())
    followers = {}
    if callable(pairs := getattr(model, "followers", None)):
        names = {id(parameter): name for name, parameter in parameters.items()}
        followers = {names[id(part)]: follower for part, follower in pairs()}
    weights = {name: parameters[name] for name in _linear_weights(model) if parameters[name].requires_grad and wanted(name, layers)}
    return SparseWeights(weights, Pattern(*pattern), {name: followers[name] for name in weights if name in followers})


def wanted(name: str, layers: Layers) -> bool:
    """Tells whether the weight of this name belongs to the given layers of a block."""
    if not BLOCK.search(name) or ".pruner." in name:
        return False
    return layers == "all" or (layers == "attention") == bool(ATTENTION.search(name))


def groups(names: Iterable[str], unit: Unit) -> dict[str, list[str]]:
    """Groups weights that are masked together: the attention's and the MLP's, of one block or of a whole tower."""
    found: dict[str, list[str]] = {}
    for name in names:
        kind = "attention" if ATTENTION.search(name) else "mlp"
        block = BLOCK.search(name)
        place = name[: block.end() - 1] if block and unit == "block" else name.split(".")[0]
        found.setdefault(f"{place} {kind}", []).append(name)
    return found


def _linear_weights(model: nn.Module) -> list[str]:
    """Returns the names of two-dimensional weights that are not embeddings."""
    embeddings = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    return [name for name, parameter in model.named_parameters() if name not in embeddings and parameter.dim() == 2]
