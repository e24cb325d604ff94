"""What the image and the text tower have in common: how blocks hand tokens on, and what they leave on record."""

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from madtp import flops
from madtp.importance import AttentionStatistics
from madtp.packing import Packed
from madtp.pruning import Layout, PruneSetting, TokenPruner


@dataclass
class TowerRecord:
    """What a pass through a tower leaves beside its tokens, one entry a block.

    entering, leaving: (B,) valid tokens, class token included, before and after the block's pruning
    kept: (B, N) bool over the block's tokens without the class token, None where the block did not prune
    features: (B, K, D) sum over the blocks of the alignment features, None unless asked for
    without_map: whether the pruners scored without an attention map, which costs a second Q K^T
    """

    entering: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    features: Tensor | None = None
    without_map: bool = False

    def add(self, before: Tensor, after: Tensor, kept: Tensor | None, features: Tensor | None) -> None:
        self.entering.append(before)
        self.leaving.append(after)
        self.kept.append(kept)
        if features is not None:
            self.features = features if self.features is None else self.features + features


def count_tokens(x: Tensor, layout: Layout) -> Tensor:
    """(B,) number of valid tokens of x (B, N, C), or packed (T, C)."""
    if isinstance(layout, Packed):
        return torch.tensor(layout.lengths)
    return x.new_full((x.shape[0],), x.shape[1]).long() if layout is None else layout.sum(dim=1)


def class_tokens(x: Tensor, layout: Layout) -> Tensor:
    """The first token of each sample, (B, C)."""
    return layout.class_tokens(x) if isinstance(layout, Packed) else x[:, 0]


def halves(x: Tensor, layout: Layout) -> list[tuple[Tensor, Layout]]:
    """A batch as two of equally many samples, each with its layout."""
    if isinstance(layout, Packed):
        return layout.chunk(x, 2)
    return list(zip(x.chunk(2), (None, None) if layout is None else layout.chunk(2), strict=True))


class DropPath(nn.Module):
    """Stochastic depth: in training the branch of a share `rate` of the samples is dropped, that of the others scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x (B, N, C) or packed."""
        if self.rate == 0 or not self.training:
            return x
        if isinstance(layout, Packed):
            lengths = layout.offsets.diff()
            keep = x.new_empty(len(lengths)).bernoulli_(1 - self.rate) / (1 - self.rate)
            return x * keep.repeat_interleave(lengths, output_size=layout.total).unsqueeze(1)
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate) / (1 - self.rate)


class PreNormBlock(nn.Module):
    """Attention, pruning, MLP, each behind a norm. With `pruner=None` it is the dense block.

    Subclasses name the parts as published weights do, and say what `attention` and `feed_forward` are.
    """

    def __init__(self, dim: int, hidden: int, drop_path: float, pruner: TokenPruner | None):
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.drop_path = DropPath(drop_path)
        self.pruner = pruner

    def attention(self, x: Tensor, layout: Layout, pruner: TokenPruner | None) -> tuple[Tensor, AttentionStatistics | None]:
        """Self-attention of the normed tokens x (B, N, C) or packed, and the statistics that `pruner` asks for."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP of the normed tokens."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, layout: Layout, learnable_tokens: Tensor | None, temperature: float | None, align: bool
    ) -> tuple[Tensor, Layout, Tensor | None, Tensor | None]:
        """x (B, N, C) -> x (B, M, C), its layout, kept (B, N - 1) or None, alignment features (B, K, D) or None."""
        active = self.pruner is not None and temperature is not None
        products, features = None, None
        if self.pruner is not None and (active or align):
            products, features = self.pruner.align(x, layout, learnable_tokens, align)
        attended, statistics = self.attention(x, layout, self.pruner if active else None)
        x = x + self.drop_path(attended, layout)
        kept = None
        if active:
            x, layout, kept = self.pruner.prune(x, layout, products, statistics, temperature)
        x = x + self.drop_path(self.feed_forward(x), layout)
        return x, layout, kept, features

    def flops(self, entering: Tensor, leaving: Tensor, active: bool, training: bool, without_map: bool) -> Tensor:
        """Multiply-adds of `forward` for samples with these token counts before and after pruning."""
        dim = self.dim
        total = flops.layer_norm(entering, dim) + flops.linear(entering, dim, 4 * dim) + flops.attention(entering, entering, dim)
        total = total + flops.layer_norm(leaving, dim) + flops.mlp(leaving, dim, self.hidden)
        if self.pruner is not None:
            total = total + self.pruner.flops(entering, active, training, without_map)
        return total


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    layout: Layout,
    learnable_tokens: Tensor | None,
    setting: PruneSetting,
    align: bool,
    without_map: bool,
    *context: object,
) -> tuple[Tensor, Layout, TowerRecord]:
    """x (B, N, C) or packed, through all blocks -> x, its layout, the record; `context` is what a block reads beside x."""
    record = TowerRecord(without_map=without_map)
    for index, block in enumerate(blocks):
        before = count_tokens(x, layout)
        x, layout, kept, features = block(x, layout, learnable_tokens, setting.at(index), align, *context)
        record.add(before, count_tokens(x, layout), kept, features)
    return x, layout, record


def block_flops(
    blocks: Iterable[nn.Module], record: TowerRecord, setting: PruneSetting, training: bool, *context: object
) -> Tensor:
    """Multiply-adds of `run_blocks` per sample, (B,); `context`: the token counts of what the blocks read beside x."""
    steps = enumerate(zip(blocks, record.entering, record.leaving, strict=True))
    return sum(
        block.flops(entering, leaving, setting.at(index) is not None, training, record.without_map, *context)
        for index, (block, entering, leaving) in steps
    )


def dense_record(depth: int, tokens: int, samples: int) -> TowerRecord:
    """The record of a pass in which nothing is pruned: `tokens` a sample, class token included, in every block."""
    record = TowerRecord()
    for _ in range(depth):
        record.add(torch.full((samples,), tokens), torch.full((samples,), tokens), None, None)
    return record
