"""The handle of a pruned model of another library, and its towers: the stacks of blocks that prune in place of the model's own.

B samples, N tokens of a tower, C channels, K learnable tokens, D their channels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from madtp.attention.attend import recomputes_scores
from madtp.blocks import Guidance, TowerRecord, block_flops, run_blocks
from madtp.flops import GIGA
from madtp.packing import Layout, Valid, class_tokens, end_first, pack, padded
from madtp.patch.layers import WrappedBlock, layers_flops
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule

ATTRIBUTE = "madtp"  # of the model, where the handle is registered, so that its parameters train and are saved

Batch = Tensor | Sequence[Any] | Mapping[str, Any]  # images alone, or what the model's forward takes
MakePruner = Callable[..., TokenPruner]  # (dim, num_prefix_tokens=1) -> pruner


class Tower:
    """A stack of blocks, and the module of the model whose forward pass it replaces while it prunes.

    name: "vision" or "language"
    record: of the last pass; None before
    valid: mask of the last output (B, N), None where nothing is padded
    """

    module: Any  # other libraries are not typed
    pruning: "Pruning"

    def __init__(
        self,
        name: str,
        module: nn.Module,
        blocks: Sequence[Any],
        patches: Iterable[nn.Module] = (),
        first: Iterable[nn.Module] = (),
        each: Iterable[nn.Module | None] = (),
        once: Iterable[nn.Module | Tensor | None] = (),
    ):
        """
        Args:
            blocks: `PrunedBlock`s.
            patches, first, each, once: layers beside the blocks, for counting: applied to every token that enters without the
                prefix, to every token that enters, to every token that is left, and once per sample.
        """
        self.name, self.module, self.blocks = name, module, list(blocks)
        self.layers = tuple(map(tuple, (patches, first, each, once)))
        self.record: TowerRecord | None = None
        self.valid: Valid = None
        self.hooks: list[tuple[nn.Module, Callable[..., Any]]] = []  # before the forward passes of modules, while attached
        self._handles: list[Any] = []

    def attach(self, pruning: "Pruning") -> None:
        """Replaces the forward pass of the module."""
        self.pruning = pruning
        self.module.forward = partial(self._forward)
        self._handles = [module.register_forward_pre_hook(hook, with_kwargs=True) for module, hook in self.hooks]

    def detach(self) -> None:
        """Gives the module its forward pass back."""
        del self.module.forward  # uncovers the class's
        for handle in self._handles:
            handle.remove()

    def _forward(self, *inputs: Any, **options: Any) -> Any:
        if not self.pruning.is_on:
            self.record, self.valid = None, None
            return type(self.module).forward(self.module, *inputs, **options)
        return self.forward(*inputs, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Takes the place of the module's forward pass."""
        raise NotImplementedError

    def run(self, x: Tensor, valid: Valid = None, *context: object) -> tuple[Tensor, Layout]:
        """Runs the blocks on tokens (B, N, C) and returns those that are left, with their layout.

        context: read by each block's `transform`
        """
        pruning, layout = self.pruning, cast(Layout, valid)
        if pruning.packed:
            x, layout = pack(x, valid)
        again = recomputes_scores(x, layout, self.blocks[0].num_heads)
        x, layout, self.record = run_blocks(self.blocks, x, layout, pruning.guidance(), *context, recomputes_scores=again)
        return x, layout

    def run_to(self, x: Tensor, end: Tensor) -> Tensor:
        """Runs the blocks on texts (B, N, C) that are read at `end` (B,): this token goes first, and those behind it are dropped.

        Returns a tensor like x with the token that is read at its place, and zeros elsewhere.
        """
        front, valid = end_first(x, end)
        tokens, layout = self.run(front, None if bool(valid.all()) else valid)
        out, self.valid = torch.zeros_like(x), None
        out[torch.arange(len(out)), end] = class_tokens(tokens, layout).to(out.dtype)
        return out

    def padded(self, x: Tensor, layout: Layout) -> Tensor:
        """Returns tokens (B, N, C) and remembers their mask."""
        x, self.valid = padded(x, layout)
        return x

    def last(self) -> TowerRecord:
        """Returns the record of the last pass."""
        if self.record is None:
            raise ValueError(f"the {self.name} encoder has not run pruned")
        return self.record

    def flops(self, unpruned: bool = False) -> Tensor:
        """Counts the multiply-adds of the last pass per sample, (B,); `unpruned` those of the same samples without pruning."""
        record = self.last().unpruned() if unpruned else self.last()
        patches, first, each, once = self.layers
        entering, leaving = record.entering[0], record.leaving[-1]
        prefix = self.blocks[0].pruner.rule.num_prefix_tokens
        total = block_flops(self.blocks, record, *self.context_tokens(unpruned))
        total = total + layers_flops(patches, entering - prefix) + layers_flops(first, entering) + layers_flops(each, leaving)
        return (total + layers_flops(once, torch.ones_like(leaving))).cpu()

    def context_tokens(self, unpruned: bool) -> tuple[object, ...]:
        """Returns the token counts of what the blocks read beside their own tokens."""
        return ()


class Pruning(nn.Module):
    """The pruning of a model: its learnable tokens, the pruners of its blocks, and how hard they prune.

    setting: how hard to prune; with madtp.OFF the model runs its original forward pass
    packed: run batches without padding
    align: collect the alignment features that the similarity loss compares
    dense_gflops: mean GFLOPs of a calibration sample without pruning
    progress: wraps the batches of a measurement, for example to show a bar
    """

    def __init__(
        self,
        model: nn.Module,
        towers: Sequence[Tower],
        call: Callable[[nn.Module, Batch], Any],
        learnable_tokens: Tensor | None,
        packed: bool,
    ):
        """
        Args:
            call: runs the model on a batch.
            learnable_tokens: (K, D); None for a rule without.
        """
        super().__init__()
        self.towers, self._call = list(towers), call
        self._model = [model]  # in a list: a submodule would make a circle
        self.pruners = nn.ModuleList(block.pruner for tower in towers for block in tower.blocks)
        self.learnable_tokens = None if learnable_tokens is None else nn.Parameter(learnable_tokens)
        self.setting, self.packed, self.align, self._counts = OFF, packed, False, False
        self.dense_gflops = float("nan")
        self.progress: Callable[[Iterable[Batch]], Iterable[Batch]] = iter
        for tower in towers:
            tower.attach(self)
        model.add_module(ATTRIBUTE, self)

    @property
    def align(self) -> bool:
        return self._align

    @align.setter
    def align(self, wanted: bool) -> None:
        if wanted and self.learnable_tokens is None:
            raise ValueError("there are no learnable tokens to align with; prune with a rule with mag=True")
        self._align = wanted

    @property
    def blocks(self) -> list[WrappedBlock]:
        """The blocks of all towers."""
        return [block for tower in self.towers for block in tower.blocks]

    @property
    def rule(self) -> PruningRule:
        """The rule of the first tower."""
        return self.towers[0].blocks[0].pruner.rule

    @property
    def depth(self) -> int:
        return max(len(tower.blocks) for tower in self.towers)

    @property
    def is_on(self) -> bool:
        """Tells whether the towers run in place of the model's own layers."""
        return self.setting.temperature is not None or self.align or self._counts

    @property
    def records(self) -> dict[str, TowerRecord | None]:
        """The records of the last pruned forward pass, by tower."""
        return {tower.name: tower.record for tower in self.towers}

    @property
    def record(self) -> TowerRecord | None:
        """The record of the first tower, the image encoder."""
        return self.towers[0].record

    def guidance(self) -> Guidance:
        """Returns the guidance of a forward pass."""
        return Guidance(self.setting, self.align, packed=self.packed, learnable_tokens=self.learnable_tokens)

    def detach(self) -> None:
        """Gives the model its original forward pass back."""
        for tower in self.towers:
            tower.detach()
        delattr(self._model[0], ATTRIBUTE)

    @contextmanager
    def at(self, setting: PruneSetting | None) -> Iterator[None]:
        """Runs the towers at a setting, None for the current one, also where it is OFF, so that they leave records."""
        before, self.setting, self._counts = self.setting, self.setting if setting is None else setting, True
        try:
            yield
        finally:
            self.setting, self._counts = before, False

    @torch.no_grad()
    def run(self, batch: Batch, setting: PruneSetting | None = None) -> None:
        """Runs the model on a batch at a setting, by default the current one."""
        with self.at(setting):
            self._call(self._model[0], batch)

    def gflops(self, batch: Batch, setting: PruneSetting | None = None) -> Tensor:
        """Returns the GFLOPs of each sample at a setting, by default the current one, (B,) float64.

        batch: images (B, 3, H, W), or what the model's forward takes: a dictionary of its arguments, or a tuple

        Raises:
            ValueError: when the batch has another number of images than of texts, so that there is no cost per sample.
        """
        each = self._each(batch, setting)
        if len({len(costs) for costs in each}) > 1:
            raise ValueError("the batch has another number of images than of texts; give as many of each")
        return torch.stack(each).sum(dim=0)

    def mean_gflops(self, batches: Iterable[Batch], setting: PruneSetting = OFF) -> float:
        """Returns the mean GFLOPs per sample at a setting; of a model with two encoders those of an image and a text."""
        return self.compare(batches, setting)[0]

    def compare(self, batches: Iterable[Batch], setting: PruneSetting) -> tuple[float, float]:
        """Returns the mean GFLOPs per sample at a setting, and of the same samples without pruning."""
        parts = [self._each(batch, setting) + self._each() for batch in self.progress(batches)]
        means = [float(torch.cat(costs).mean()) for costs in zip(*parts, strict=True)]
        return sum(means[: len(self.towers)]), sum(means[len(self.towers) :])

    def _each(self, batch: Batch | None = None, setting: PruneSetting | None = None) -> list[Tensor]:
        """Returns the GFLOPs of each tower on a batch; without one, of the last pass if it had not pruned."""
        if batch is not None:
            self.run(batch, setting)
        return [tower.flops(unpruned=batch is None).double() / GIGA for tower in self.towers]

    def extra_repr(self) -> str:
        return f"{', '.join(tower.name for tower in self.towers)}: {self.setting}, packed={self.packed}"


def count_samples(batch: Batch) -> int:
    return len(_tensors(batch)[0])


def first_samples(batch: Batch, number: int) -> Batch:
    """Returns a batch of the first samples."""
    cut = [values[:number] for values in _tensors(batch)]
    if isinstance(batch, Tensor):
        return cut[0]
    return dict(zip(batch, cut, strict=True)) if isinstance(batch, Mapping) else tuple(cut)


def _tensors(batch: Batch) -> list[Tensor]:
    if isinstance(batch, Tensor):
        return [batch]
    return list(batch.values() if isinstance(batch, Mapping) else batch)


def end_place(end_id: int, ids: Tensor) -> Tensor:
    """Returns the place of the first end-of-text token of each text. (B, L) -> (B,)."""
    return (ids == end_id).int().argmax(dim=1)


def last_place(ids: Tensor) -> Tensor:
    return torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)


def highest_place(ids: Tensor) -> Tensor:
    """Returns the place of the highest id, which ends a text of CLIP."""
    return ids.argmax(dim=1)
