"""Kept weights take over what masked ones did: the least squares of a layer's outputs (Frantar and Alistarh, SparseGPT, 2023).

With x the inputs of a layer, w a row of its weight and w' the row with zeros where the mask has them, w' is the one with the
least E[((w - w') x)^2]. All that it takes of x is the matrix of its second moments.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from madtp.sparsity.hooks import Watch

# Added to each channel's second moment, as shares of itself and of the mean one: weights stay near what they were where inputs say
# little. Much less than these forgets that the slice is small, much more fits worse.
DAMPING, FLOOR = 1e-3, 1e-6
STEPS = 30  # of conjugate gradients; the error of outputs hardly falls after them


@torch.no_grad()
def second_moments(weights: Mapping[str, Tensor], forward: Callable[[], object]) -> dict[str, Tensor]:
    """Of what each weight (O, I) is multiplied with in a forward pass, the sum of x x^T over the rows: name -> (I, I) float32."""
    moments = {name: weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32) for name, weight in weights.items()}

    def see(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            moments[name].addmm_(rows.t(), rows)

    with Watch(weights, see):
        forward()
    return moments


def can_be_fitted(moment: Tensor) -> bool:
    """Whether a layer was given something, and nothing that had overflowed."""
    return bool(moment.any()) and bool(moment.isfinite().all())


def damping(moment: Tensor) -> Tensor:
    """(I, I) -> (I,)"""
    return DAMPING * moment.diagonal() + FLOOR * moment.diagonal().mean()


@torch.no_grad()
def refit(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """The masked weight whose outputs are nearest to the weight's own.

    Conjugate gradients from the masked weight on, so that no step makes it worse.

    Args:
        weight: (O, I).
        mask: (O, I) bool, True where a weight is kept.
        moment: (I, I), see `second_moments`.
    Returns:
        (O, I), zero outside the mask; only masked where the moment says nothing.
    """
    if not can_be_fitted(moment):
        return weight.masked_fill(~mask, 0.0)
    moment = moment + damping(moment).diag()
    scale = moment.diagonal()
    fitted = weight.float().masked_fill(~mask, 0.0)
    left = ((weight.float() - fitted) @ moment).masked_fill(~mask, 0.0)  # minus half of the gradient
    direction = left / scale
    size = (left * direction).sum(dim=1, keepdim=True)
    tiny = torch.finfo(size.dtype).tiny  # a row that is done stays as it is
    for _ in range(STEPS):
        curved = (direction @ moment).masked_fill(~mask, 0.0)
        step = size / (direction * curved).sum(dim=1, keepdim=True).clamp_min(tiny)
        fitted, left = fitted + step * direction, left - step * curved
        before, size = size, (left * left / scale).sum(dim=1, keepdim=True)
        direction = left / scale + size / before.clamp_min(tiny) * direction
    return fitted.to(weight.dtype)
