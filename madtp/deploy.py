"""The deployment form of a pruned model: every sample keeps the same number of tokens in a block, so that shapes are constant.

The numbers are a quantile of what the samples of a calibration set keep under the rule "instance", chosen to meet a GFLOPs target.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from madtp.blocks import TowerRecord
from madtp.packing import count_tokens
from madtp.pruning import WHOLE
from madtp.rule import PruneSetting, PruningRule

Branches = Mapping[str, Iterable[Any]]  # name -> `PrunedBlock`s
Counts = dict[str, list[int]]  # branch -> tokens to keep in each block, WHOLE where it does not prune

STEPS = 12  # of the bisection: a quantile to 1 in 4096
TOLERANCE = 0.002  # relative distance from the target that ends it


class KeptTokens:
    """The numbers of tokens that samples keep in the blocks of a branch, without prefix and merged tokens."""

    def __init__(self, depth: int):
        self.kept: list[list[Tensor]] = [[] for _ in range(depth)]
        self.prunes = [False] * depth

    @classmethod
    def joined(cls, parts: Sequence["KeptTokens"]) -> "KeptTokens":
        """Returns the numbers of several sets of samples together."""
        whole = cls(len(parts[0].prunes))
        for block, kept in enumerate(whole.kept):
            kept += [numbers for part in parts for numbers in part.kept[block]]
            whole.prunes[block] = any(part.prunes[block] for part in parts)
        return whole

    def add(self, block: int, kept: Tensor, entering: Tensor, leaving: Tensor) -> None:
        """Adds a pass of a batch through a block: kept (B, N) bool, and the samples' tokens (B,) before and after."""
        self.kept[block].append(kept.sum(dim=1).cpu())
        self.prunes[block] |= bool((leaving < entering).any())

    def quantile(self, share: float) -> list[int]:
        """Returns the number of tokens that a `share` of the samples does not exceed, at least 1, by block."""
        return [
            max(1, round(float(torch.cat(each).double().quantile(share)))) if prunes else WHOLE
            for each, prunes in zip(self.kept, self.prunes, strict=True)
        ]


def fix_counts(branches: Branches, counts: Counts) -> None:
    """Makes the blocks keep these numbers of tokens of every sample."""
    for name, blocks in branches.items():
        for block, count in zip(blocks, counts[name], strict=True):
            if block.pruner is not None:
                block.pruner.fixed = count


def fixed_record(counts: Sequence[int] | None, tokens: Tensor, rule: PruningRule, setting: PruneSetting, depth: int) -> TowerRecord:
    """Returns the record that a pass with fixed numbers of tokens leaves, without running it; `kept` tells which blocks prune.

    Args:
        counts: of the blocks; None where nothing prunes.
        tokens: (B,) of the samples that enter, prefix tokens included.
    """
    record = TowerRecord()
    for block in range(depth):
        left, kept = tokens, None
        if counts is not None and setting.at(block, rule) is not None and counts[block] != WHOLE:
            kept = torch.zeros(len(tokens), 0, dtype=torch.bool)
            fewer = rule.num_prefix_tokens + counts[block] + rule.merge
            left = torch.where(tokens - rule.num_prefix_tokens > counts[block], fewer, tokens)
        record.add(tokens, left, kept)
        tokens = left
    return record


@contextmanager
def recording(branches: Branches) -> Iterator[dict[str, KeptTokens]]:
    """Yields the kept tokens by branch, which fill while batches run through the blocks."""
    handles, found = [], {}
    for name, blocks in branches.items():
        blocks = list(blocks)
        found[name] = KeptTokens(len(blocks))
        for index, block in enumerate(blocks):
            handles.append(block.register_forward_hook(_recorder(found[name], index)))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _recorder(found: KeptTokens, index: int) -> Callable[[nn.Module, tuple, tuple], None]:
    def record(block: nn.Module, inputs: tuple, outputs: tuple) -> None:
        (before, layout_before, *_), (after, layout_after, kept, _) = inputs, outputs
        if kept is not None:
            found.add(index, kept, count_tokens(before, layout_before), count_tokens(after, layout_after))

    return record


def solve_counts(kept: Mapping[str, KeptTokens], measure: Callable[[Counts], float], target: float) -> tuple[Counts, float]:
    """Finds the quantile at which fixed numbers of tokens cost `target` GFLOPs.

    Args:
        measure: numbers -> mean GFLOPs per sample, which rise with them.
    Returns:
        The numbers and what they cost; the nearest ones if no quantile meets the target.
    """
    low, high = 0.0, 1.0
    tried: list[tuple[float, Counts, float]] = []
    for _ in range(STEPS):
        share = (low + high) / 2
        counts = {name: each.quantile(share) for name, each in kept.items()}
        cost = measure(counts)
        tried.append((abs(cost - target), counts, cost))
        if abs(cost - target) <= TOLERANCE * target:
            break
        low, high = (share, high) if cost < target else (low, share)
    return min(tried, key=lambda each: each[0])[1:]
