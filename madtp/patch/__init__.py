"""Pruning models of other libraries in place. Only the adapters in this package import those libraries."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any, cast

import torch
from torch import Tensor, nn

from madtp.budget import calibrate
from madtp.initial import METHODS, TokenSample, tokens_from_data
from madtp.patch.base import ATTRIBUTE, Batch, Pruning, count_samples, first_samples
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule

# Without training, learnable tokens were measured to guide no better than S_cls and S_self alone (docs/results.md).
INSTANCE = PruningRule(keep="instance", mag=False)
INITS = ("random", *METHODS)
FEW, ROUNDS, TOLERANCE = 32, 4, 0.005  # samples of the coarse search; its repetitions; relative distance from the target
LEARNABLE = 100  # learnable tokens of a rule that has them
SAMPLED = 20_000  # tokens of calibration data, of which k-means and principal directions make learnable ones

# class of the model -> module of this package that adapts it
HUGGING_FACE = {
    "clip": ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPTextModel", "CLIPTextModelWithProjection"),
    "siglip": ("SiglipModel", "SiglipVisionModel", "SiglipTextModel"),
    "siglip2": ("Siglip2Model", "Siglip2VisionModel", "Siglip2TextModel"),
    "dinov2": ("Dinov2Model",),
    "blip": ("BlipForImageTextRetrieval", "BlipForQuestionAnswering", "BlipForConditionalGeneration", "BlipVisionModel"),
}
ADAPTERS = {
    "timm.models.vision_transformer.VisionTransformer": "timm",
    **dict.fromkeys(("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP"), "open_clip"),
    **{
        f"transformers.models.{family}.modeling_{family}.{name}": "blip" if family == "blip" else "transformers"
        for family, names in HUGGING_FACE.items()
        for name in names
    },
}


def prune(
    model: nn.Module,
    calibration: Batch | Iterable[Batch] = (),
    p: float = 0.5,
    *,
    rule: PruningRule = INSTANCE,
    num_learnable: int | None = None,
    init: str = "random",
    init_std: float = 0.02,
    packed: bool = True,
    seed: int = 0,
    setting: PruneSetting | None = None,
    towers: Sequence[str] | None = None,
    progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter,
) -> Pruning:
    """Makes a model of another library prune its tokens, in place, so that p of its GFLOPs are gone.

    Supported: timm's VisionTransformer with any number of prefix tokens, such as CLIP's and ViT's (1), DINOv2's with registers (5)
    and SigLIP's (0, where the importance leaves S_cls out); open_clip's CLIP; and of transformers CLIP, SigLIP, SigLIP 2, DINOv2
    and BLIP. The prune temperature is searched on the calibration data. By default there are no learnable tokens, which help only
    a model that is trained with them; a rule with `mag` has them, and its `gradient` lets a loss train them.

    Args:
        calibration: normalised images (N, 3, H, W), or batches of them; no labels. For a model that also reads text, dictionaries
            of the arguments of its forward pass (for open_clip tuples); from images alone, only its image encoder is pruned.
        p: share of the GFLOPs to remove, 0 < p < 1.
        rule: how tokens are selected; its number of prefix tokens is set to the model's.
        num_learnable: number of learnable tokens of a rule with `mag`; default: 100.
        init: "random" learnable tokens; "kmeans" or "principal" makes them of the calibration data (see `tokens_from_data`).
        init_std: their initial standard deviation.
        packed: run batches without padding, so that an answer does not depend on the batch (with `keep: instance`).
        seed: of the learnable tokens.
        setting: prune as hard as this, instead of searching, such as a search of an earlier day has found.
        towers: names of the encoders to prune, of "vision" and "language"; default: those that the calibration data reach.
        progress: wraps the batches of each pass over them, for example to show a bar.
    Returns:
        The handle of the pruned model: its setting, GFLOPs and record. `restore` removes it.
    Raises:
        TypeError: for a model that cannot be pruned, naming the part that is not supported.
        UnreachableTarget: when no temperature removes p.
    """
    _check(p, init, num_learnable, rule)
    adapter = _adapter_of(model)
    batches: list[Batch] = [cast(Batch, calibration)] if _is_batch(calibration) else list(calibration)
    if not batches and (setting is None or init != "random"):
        raise ValueError("no calibration data; give a few images, or the setting of an earlier search")
    if towers is None:
        towers = ("vision", "language") if not batches or adapter.reads_text(batches[0]) else ("vision",)
    number, generator = num_learnable or LEARNABLE, torch.Generator().manual_seed(seed)
    pruning = _attach(model, adapter, rule, number, init_std, packed, generator, towers)
    pruning.progress = progress
    try:
        with _evaluation(model):
            if init != "random" and pruning.learnable_tokens is not None:
                pruning.learnable_tokens.data.copy_(_made_of_data(pruning, batches, init, number, init_std, generator))
            pruning.setting = _solved(pruning, batches, p) if setting is None else setting
    except BaseException:
        restore(model)
        raise
    return pruning


def restore(model: nn.Module) -> nn.Module:
    """Gives a pruned model its original forward pass back and removes the learnable tokens."""
    pruning = getattr(model, ATTRIBUTE, None)
    if pruning is None:
        raise ValueError("the model is not pruned")
    pruning.detach()
    return model


def _check(p: float, init: str, num_learnable: int | None, rule: PruningRule) -> None:
    if not 0 < p < 1:
        raise ValueError(f"p must be above 0 and below 1, got {p}")
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(INITS)}, got {init!r}")
    if not rule.mag and (init != "random" or num_learnable is not None):
        given = f"init={init!r}" if init != "random" else f"num_learnable={num_learnable}"
        raise ValueError(f"{given}: the rule has no learnable tokens; give one with mag=True")


@contextmanager
def _evaluation(model: nn.Module) -> Iterator[None]:
    """Puts the model into evaluation mode, and each of its modules back into its own."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True


def _solved(pruning: Pruning, batches: Sequence[Batch], p: float) -> PruneSetting:
    """Searches for the setting that removes p of the GFLOPs: on a few samples, then once or twice on all of them."""
    few: list[Batch] = []
    for batch in batches:
        few.append(first_samples(batch, FEW - sum(map(count_samples, few))))
        if sum(map(count_samples, few)) == FEW:
            break
    search = partial(calibrate, max_prune_from=pruning.depth - 1)
    dense = pruning.mean_gflops(few)
    goal = dense * (1 - p)
    found = search(partial(pruning.mean_gflops, few), goal)
    for _ in range(ROUNDS):
        reached, pruning.dense_gflops = pruning.compare(batches, found.setting)
        missed = reached / (pruning.dense_gflops * (1 - p))
        if abs(missed - 1) <= TOLERANCE:
            return found.setting
        goal /= missed
        found = search(partial(pruning.mean_gflops, few), goal, start=found.setting, tolerance=TOLERANCE / 2)
    # The few samples are unlike the others.
    return search(partial(pruning.mean_gflops, batches), pruning.dense_gflops * (1 - p), start=found.setting).setting


def _is_batch(given: Any) -> bool:
    """Tells one batch from several: a tuple that begins with a tensor is the arguments of one call."""
    return isinstance(given, Tensor | Mapping) or (isinstance(given, tuple) and bool(given) and isinstance(given[0], Tensor))


def _attach(
    model: nn.Module,
    adapter: ModuleType,
    rule: PruningRule,
    num_learnable: int,
    init_std: float,
    packed: bool,
    generator: torch.Generator,
    wanted: Sequence[str],
) -> Pruning:
    """Gives the model's towers their pruners. The learnable tokens are as wide as the first tower."""
    like = next(model.parameters())
    widths: list[int] = []

    def make_pruner(dim: int, num_prefix_tokens: int = 1) -> TokenPruner:
        widths.append(dim)
        return TokenPruner(dim, num_learnable, widths[0], replace(rule, num_prefix_tokens=num_prefix_tokens)).to(like)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())  # of the maps of towers with other widths
        towers = adapter.towers(model, make_pruner, wanted.__contains__)
    if not towers:
        raise TypeError(f"{type(model).__qualname__} has none of the encoders {', '.join(wanted)}")
    tokens = (torch.randn(num_learnable, widths[0], generator=generator) * init_std).to(like) if rule.mag else None
    return Pruning(model, towers, adapter.call, tokens, packed)


@torch.no_grad()
def _made_of_data(
    pruning: Pruning, batches: Sequence[Batch], method: str, number: int, std: float, generator: torch.Generator
) -> Tensor:
    """Makes learnable tokens (K, D) of the tokens that enter the blocks on the calibration data."""
    sample = TokenSample(generator)
    handles = [
        block.register_forward_pre_hook(lambda block, inputs, name=tower.name: sample.see(name, block, *inputs[:3]))
        for tower in pruning.towers
        for block in tower.blocks
    ]
    try:
        for batch in batches:
            pruning.run(batch, OFF)
    finally:
        for handle in handles:
            handle.remove()
    tokens = sample.tokens().cpu()
    tokens = tokens[torch.randperm(len(tokens), generator=generator)[:SAMPLED]]
    return tokens_from_data(method, tokens, number, std, generator)


def _adapter_of(model: nn.Module) -> ModuleType:
    """Finds the adapter by the names of the model's classes, so that no library is imported for another one's model."""
    if getattr(model, ATTRIBUTE, None) is not None:
        raise ValueError("the model is pruned already; call restore first")
    for kind in type(model).__mro__:
        name = ADAPTERS.get(f"{kind.__module__}.{kind.__qualname__}")
        if name is not None:
            return import_module(f"madtp.patch.{name}")
    known = ", ".join(name for names in HUGGING_FACE.values() for name in names)
    raise TypeError(
        f"{type(model).__qualname__} cannot be pruned; supported are timm's VisionTransformer, open_clip's CLIP, and of"
        f" transformers {known}. Build your own model from madtp.PreNormBlock and madtp.run_blocks"
    )
