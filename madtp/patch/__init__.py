"""Pruning models of other libraries in place. Only the adapters in this package import those libraries."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from madtp.budget import calibrate
from madtp.patch.base import ATTRIBUTE, Pruning
from madtp.pruning import PruningRule

INSTANCE = PruningRule(keep="instance")


def prune(
    model: nn.Module,
    calibration: Tensor | Iterable[Tensor],
    p: float = 0.5,
    *,
    rule: PruningRule = INSTANCE,
    num_learnable: int = 100,
    init_std: float = 0.02,
    packed: bool = True,
    seed: int = 0,
) -> Pruning:
    """Makes a model of another library prune its tokens, in place, so that p of its GFLOPs are gone.

    Supported: timm's VisionTransformer with any number of prefix tokens, such as CLIP's and ViT's (1), DINOv2's with registers (5)
    and SigLIP's (0, where the importance leaves S_cls out). The learnable tokens are random; `rule.gradient` lets a loss train
    them. The prune temperature is searched on the calibration images.

    Args:
        calibration: a few normalised images (N, 3, H, W), or batches of them; no labels are needed.
        p: share of the GFLOPs to remove, 0 < p < 1.
        rule: how tokens are selected; its number of prefix tokens is set to the model's.
        num_learnable: number of learnable tokens.
        init_std: their initial standard deviation.
        packed: run batches without padding, so that an answer does not depend on the batch (with `keep: instance`).
        seed: of the learnable tokens.
    Returns:
        The handle of the pruned model, which has its setting, GFLOPs and record. `restore` removes it.
    Raises:
        TypeError: for a model that cannot be pruned, naming the part that is not supported.
        UnreachableTarget: when no temperature removes p.
    """
    if not 0 < p < 1:
        raise ValueError(f"p must be above 0 and below 1, got {p}")
    adapter = _adapter_of(model)
    batches = [calibration] if isinstance(calibration, Tensor) else list(calibration)
    pruning = adapter(model, rule, num_learnable, init_std, packed, torch.Generator().manual_seed(seed))
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        pruning.dense_gflops = pruning.mean_gflops(batches)
        target = pruning.dense_gflops * (1 - p)
        found = calibrate(lambda setting: pruning.mean_gflops(batches, setting), target, max_prune_from=pruning.depth - 1)
    except BaseException:
        restore(model)
        raise
    finally:
        for module in training:
            module.training = True
    pruning.setting = found.setting
    return pruning


def restore(model: nn.Module) -> nn.Module:
    """Gives a pruned model its original forward pass back and removes the learnable tokens."""
    pruning = getattr(model, ATTRIBUTE, None)
    if pruning is None:
        raise ValueError("the model is not pruned")
    pruning.detach()
    return model


def _adapter_of(model: nn.Module) -> Callable[..., Pruning]:
    """Finds the adapter by the names of the model's classes, so that no library is imported for another one's model."""
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ValueError("the model is pruned already; call restore first")
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in type(model).__mro__}
    if "timm.models.vision_transformer.VisionTransformer" in names:
        from madtp.patch.timm import TimmPruning

        return TimmPruning
    raise TypeError(
        f"{type(model).__qualname__} cannot be pruned; supported is timm's VisionTransformer. Build your own model from"
        " madtp.PreNormBlock and madtp.run_blocks"
    )
