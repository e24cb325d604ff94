"""What the image and the text tower have in common: how blocks hand tokens on, and what they leave on record."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from madtp.packing import Packed
from madtp.pruning import Layout


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


def dense_record(depth: int, tokens: int, samples: int) -> TowerRecord:
    """The record of a pass in which nothing is pruned: `tokens` a sample, class token included, in every block."""
    record = TowerRecord()
    for _ in range(depth):
        record.add(torch.full((samples,), tokens), torch.full((samples,), tokens), None, None)
    return record
