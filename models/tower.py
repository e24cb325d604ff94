"""What the image and the text tower have in common: how blocks hand tokens on, and what they leave on record."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from madtp.alignment import Valid


@dataclass
class TowerRecord:
    """What a pass through a tower leaves beside its tokens, one entry a block.

    entering, leaving: (B,) valid tokens, class token included, before and after the block's pruning
    kept: (B, N) bool over the block's tokens without the class token, None where the block did not prune
    features: (B, K, D) sum over the blocks of the alignment features, None unless asked for
    """

    entering: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    features: Tensor | None = None

    def add(self, before: Tensor, after: Tensor, kept: Tensor | None, features: Tensor | None) -> None:
        self.entering.append(before)
        self.leaving.append(after)
        self.kept.append(kept)
        if features is not None:
            self.features = features if self.features is None else self.features + features


def count_tokens(x: Tensor, valid: Valid) -> Tensor:
    """(B,) number of valid tokens of x (B, N, C)."""
    return x.new_full((x.shape[0],), x.shape[1]).long() if valid is None else valid.sum(dim=1)


def dense_record(depth: int, tokens: int, samples: int) -> TowerRecord:
    """The record of a pass in which nothing is pruned: `tokens` a sample, class token included, in every block."""
    record = TowerRecord()
    for _ in range(depth):
        record.add(torch.full((samples,), tokens), torch.full((samples,), tokens), None, None)
    return record
