"""Refitting kept weights after masking: least squares of a layer's outputs (Frantar and Alistarh, SparseGPT, 2023).

Let x be the inputs of a layer and w a row of its weight. The refitted row w' is zero where it is masked and minimises
E[((w - w') x)^2]. This needs only the second moments of x.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from madtp.sparsity.hooks import LinearInputHook

# Added to each channel's second moment, as shares of itself and of the mean: weights stay close to their old values where the
# inputs carry little information. Much less overfits the small slice, much more fits worse.
DAMPING, FLOOR = 1e-3, 1e-6
STEPS = 30  # of conjugate gradients; more hardly reduce the output error


@torch.no_grad()
def second_moments(weights: Mapping[str, Tensor], forward: Callable[[], object]) -> dict[str, Tensor]:
    """Returns, for each weight (O, I), the sum of x x^T over the inputs x of a forward pass: name -> (I, I) float32."""
    moments = {name: weight.new_zeros(weight.shape[1], weight.shape[1], dtype=torch.float32) for name, weight in weights.items()}

    def record(name: str, x: Tensor) -> None:
        rows = x.detach().flatten(0, -2).float()
        with torch.autocast(x.device.type, enabled=False):
            moments[name].addmm_(rows.t(), rows)

    with LinearInputHook(weights, record):
        forward()
    return moments


def can_be_fitted(moment: Tensor) -> bool:
    """Tells whether calibration data reached the layer without overflowing."""
    return bool(moment.any()) and bool(moment.isfinite().all())


def damping(moment: Tensor) -> Tensor:
    """(I, I) -> (I,)"""
    return DAMPING * moment.diagonal() + FLOOR * moment.diagonal().mean()


@torch.no_grad()
def refit(weight: Tensor, mask: Tensor, moment: Tensor) -> Tensor:
    """Returns the masked weight whose outputs are closest to those of the dense weight.

    Conjugate gradients start from the masked weight, so that no step makes it worse.

    Args:
        weight: (O, I).
        mask: (O, I) bool, True where a weight is kept.
        moment: (I, I), from `second_moments`.
    Returns:
        (O, I), zero outside the mask; masked but not refitted where the moment is empty or not finite.
    """
    if not can_be_fitted(moment):
        return weight.masked_fill(~mask, 0.0)
    moment = moment + damping(moment).diag()
    scale = moment.diagonal()
    fitted = weight.float().masked_fill(~mask, 0.0)
    left = ((weight.float() - fitted) @ moment).masked_fill(~mask, 0.0)  # minus half of the gradient
    direction = left / scale
    size = (left * direction).sum(dim=1, keepdim=True)
    tiny = torch.finfo(size.dtype).tiny  # keeps finished rows unchanged
    for _ in range(STEPS):
        curved = (direction @ moment).masked_fill(~mask, 0.0)
        step = size / (direction * curved).sum(dim=1, keepdim=True).clamp_min(tiny)
        fitted, left = fitted + step * direction, left - step * curved
        before, size = size, (left * left / scale).sum(dim=1, keepdim=True)
        direction = left / scale + size / before.clamp_min(tiny) * direction
    return fitted.to(weight.dtype)
