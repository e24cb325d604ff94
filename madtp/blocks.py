"""Transformer blocks that prune: the order of their parts, a pass through a stack of them, and the record that it leaves.

B batch, N tokens of a sample with its prefix tokens, C channels, K learnable tokens, D their channels, T tokens of a packed batch.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from madtp import flops
from madtp.importance import AttentionStatistics
from madtp.packing import Layout, Packed, class_tokens, count_tokens
from madtp.pruning import WHOLE, Execution, TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from madtp.selection import static_removal


@dataclass(frozen=True, eq=False)
class Guidance:
    """The state of one forward pass that all blocks share: how hard they prune, and the learnable tokens that guide them.

    setting: how hard to prune
    align: collect the alignment features that L_sim compares (Eq. 3)
    negatives: L_sim also contrasts a pair with the others of its batch (see alignment.contrastive_similarity_loss)
    packed: run without padding; for inference also without attention maps
    learnable_tokens: E (K, D), or each sample its own, (B, K, D); models fill in their own
    relaxation: width of the soft decisions that gradients see, for a rule with gradient "decision" (see selection.decision_gate)
    block: index of the block that is running
    entered: (B,) tokens of each sample, prefix tokens included, that entered the first block
    """

    setting: PruneSetting = OFF
    align: bool = False
    negatives: bool = False
    packed: bool = False
    learnable_tokens: Tensor | None = None
    relaxation: float = 1.0
    block: int = 0
    entered: Tensor | None = None

    def temperature(self, rule: PruningRule) -> float | None:
        """Returns the temperature of the running block, None where it does not prune."""
        return self.setting.at(self.block, rule)

    def removal(self, rule: PruningRule) -> Tensor | None:
        """Returns the tokens (B,) that a static method removes in the running block; None for other methods."""
        temperature = self.temperature(rule)
        if not rule.is_static or self.entered is None or temperature is None:
            return None
        pruned_before = (self.block - self.setting.prune_from) // rule.every
        return static_removal(self.entered - rule.num_prefix_tokens, temperature, pruned_before)

    @property
    def is_on(self) -> bool:
        """Tells whether any block reads the learnable tokens."""
        return self.align or self.setting.temperature is not None


UNPRUNED = Guidance()


@dataclass
class TowerRecord:
    """The trace of a pass through the blocks of a tower, one entry per block.

    entering, leaving: (B,) valid tokens, prefix tokens included, before and after the block's pruning
    kept: (B, N - P) bool over the block's tokens without the prefix, None where the block did not prune
    features: (B, K, D) alignment features summed over the blocks, None unless collected
    packed: the batch was packed; recomputes_scores: the pruners' scores cost a second Q K^T
    """

    entering: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    features: Tensor | None = None
    packed: bool = False
    recomputes_scores: bool = False

    def add(self, before: Tensor, after: Tensor, kept: Tensor | None, features: Tensor | None = None) -> None:
        self.entering.append(before)
        self.leaving.append(after)
        self.kept.append(kept)
        if features is not None:
            self.features = features if self.features is None else self.features + features

    @property
    def is_guided(self) -> bool:
        """Tells whether any block has read the learnable tokens."""
        return self.features is not None or any(kept is not None for kept in self.kept)

    def execution(self, block: int) -> Execution:
        """Returns the parts of its pruner that a block executed."""
        return Execution(self.kept[block] is not None, self.features is not None, self.packed, self.recomputes_scores)

    def unpruned(self) -> "TowerRecord":
        """Returns the record that the same samples leave when nothing is pruned."""
        depth, tokens = len(self.entering), self.entering[0]
        return replace(self, entering=[tokens] * depth, leaving=[tokens] * depth, kept=[None] * depth, features=None)


def dense_record(depth: int, tokens: int, samples: int) -> TowerRecord:
    """Returns the record of a pass in which nothing is pruned and every sample has `tokens` tokens, prefix tokens included."""
    record = TowerRecord()
    for _ in range(depth):
        record.add(torch.full((samples,), tokens), torch.full((samples,), tokens), None)
    return record


@dataclass
class Encoded:
    """The output of a tower: tokens with their layout, the feature (B, E) of each sample, and the record of the pass."""

    tokens: Tensor
    layout: Layout
    feature: Tensor
    record: TowerRecord


class AlignedModel(nn.Module):
    """A model whose towers share learnable tokens E; `space_dict` is their published name."""

    space_dict: nn.Parameter | None
    answer_head: nn.Module | None = None  # its output are the logits that distillation compares

    @property
    def branches(self) -> Mapping[str, nn.ModuleList]:
        """The blocks of each branch with a `class_token`: "vision" and, where there is one, "language"."""
        raise NotImplementedError

    def class_token(self, branch: str, x: Tensor, layout: Layout) -> Tensor:
        """Returns what stands for each sample behind a block of a branch, (B, C): its class token, or what takes its place."""
        return class_tokens(x, layout)

    @property
    def depth(self) -> int:
        """Number of blocks of the deepest branch, the limit of `prune_from`."""
        return max(len(blocks) for blocks in self.branches.values())

    def init_learnable_tokens(self, sizes: tuple[int, int, float] | None) -> None:
        """Draws the learnable tokens.

        Args:
            sizes: number K, channels D and initial standard deviation; None for a model without pruners.
        """
        self.space_dict = None
        if sizes is not None:
            number, token_dim, std = sizes
            self.space_dict = nn.Parameter(torch.randn(number, token_dim) * std)

    @property
    def learnable_tokens(self) -> Tensor | None:
        """(K, D)"""
        return self.space_dict

    def guided(self, guidance: Guidance) -> Guidance:
        """Returns the guidance with this model's learnable tokens, unless it has some already."""
        return guidance if guidance.learnable_tokens is not None else replace(guidance, learnable_tokens=self.learnable_tokens)


class DropPath(nn.Module):
    """Stochastic depth: in training a share `rate` of the samples skips the branch, and the others are scaled up."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """x: (B, N, C), or packed (T, C)."""
        if self.rate == 0 or not self.training:
            return x
        if isinstance(layout, Packed):
            lengths = layout.offsets.diff()
            keep = x.new_empty(len(lengths)).bernoulli_(1 - self.rate) / (1 - self.rate)
            return x * keep.repeat_interleave(lengths, output_size=layout.total).unsqueeze(1)
        return x * x.new_empty(len(x), 1, 1).bernoulli_(1 - self.rate) / (1 - self.rate)


class PrunedBlock(nn.Module):
    """A transformer block with a pruner: align, attend, prune, transform. With `pruner=None` it is the dense block.

    Subclasses define `attend` and `transform` and, for counting, `attend_flops` and `transform_flops`. `context` is whatever their
    `transform` reads beside x, such as image tokens.
    """

    pruner: TokenPruner | None

    def attend(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        """Runs self-attention with its residual and returns the statistics that `rule` asks for."""
        raise NotImplementedError

    def transform(self, x: Tensor, layout: Layout, *context: object) -> Tensor:
        """Runs the layers behind the pruning, such as the MLP, with their residuals."""
        raise NotImplementedError

    def attend_flops(self, tokens: Tensor) -> Tensor:
        raise NotImplementedError

    def transform_flops(self, tokens: Tensor, *context: object) -> Tensor:
        raise NotImplementedError

    def forward(
        self, x: Tensor, layout: Layout, guidance: Guidance, *context: object
    ) -> tuple[Tensor, Layout, Tensor | None, Tensor | None]:
        """Returns the remaining tokens, their layout, kept (B, N - P) or None, and alignment features (B, K, D) or None.

        Args:
            x: (B, N, C), or packed (T, C).
        """
        pruner = self.pruner
        temperature = None if pruner is None or pruner.fixed == WHOLE else guidance.temperature(pruner.rule)
        scores, features, kept = None, None, None
        if pruner is not None and (temperature is not None or guidance.align):
            scores, features = pruner.align(x, layout, guidance.learnable_tokens, guidance.align)
        x, statistics = self.attend(x, layout, None if pruner is None or temperature is None else pruner.rule)
        if pruner is not None and temperature is not None:
            removed = guidance.removal(pruner.rule)
            x, layout, kept = pruner.prune(x, layout, scores, statistics, temperature, guidance.relaxation, removed)
        return self.transform(x, layout, *context), layout, kept, features

    def flops(self, entering: Tensor, leaving: Tensor, execution: Execution, *context: object) -> Tensor:
        """Counts the multiply-adds of `forward` for samples with these token counts before and after pruning.

        context: token counts of what `transform` reads
        """
        total = self.attend_flops(entering) + self.transform_flops(leaving, *context)
        if self.pruner is None:
            return total
        if self.pruner.rule.needs_keys:
            execution = execution._replace(key_dim=self.key_dim)
        return total + self.pruner.flops(entering, execution)

    @property
    def key_dim(self) -> int:
        """Channels of a head's key in self-attention."""
        raise NotImplementedError(f"{type(self).__name__} must define key_dim for the cost of matching tokens")


class PreNormBlock(PrunedBlock):
    """A block of a vision transformer or of CLIP: x + attention(norm(x)), pruning, x + mlp(norm(x)).

    Subclasses name their layers as published weights do and define `attention`, `feed_forward` and their weights.
    """

    def __init__(self, dim: int, drop_path: float, pruner: TokenPruner | None):
        super().__init__()
        self.dim = dim
        self.drop_path = DropPath(drop_path)
        self.pruner = pruner

    def attention(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        """Runs norm and self-attention on x (B, N, C) or packed, and returns the statistics that `rule` asks for."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor) -> Tensor:
        """Runs norm and MLP."""
        raise NotImplementedError

    @property
    def attention_weights(self) -> list[nn.Parameter]:
        """Weights of the linear layers in `attention`."""
        raise NotImplementedError(f"{type(self).__name__} must define attention_weights for its multiply-adds to be counted")

    @property
    def mlp_weights(self) -> list[nn.Parameter]:
        """Weights of the linear layers in `feed_forward`."""
        raise NotImplementedError(f"{type(self).__name__} must define mlp_weights for its multiply-adds to be counted")

    def attend(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        attended, statistics = self.attention(x, layout, rule)
        return x + self.drop_path(attended, layout), statistics

    def transform(self, x: Tensor, layout: Layout, *context: object) -> Tensor:
        return x + self.drop_path(self.feed_forward(x), layout)

    def attend_flops(self, tokens: Tensor) -> Tensor:
        norm = flops.layer_norm(tokens, self.dim)
        return norm + flops.attention(tokens, tokens, self.dim) + flops.products(tokens, *self.attention_weights)

    def transform_flops(self, tokens: Tensor, *context: object) -> Tensor:
        return flops.layer_norm(tokens, self.dim) + flops.products(tokens, *self.mlp_weights)


def run_blocks(
    blocks: Iterable[Any], x: Tensor, layout: Layout, guidance: Guidance, *context: object, recomputes_scores: bool = False
) -> tuple[Tensor, Layout, TowerRecord]:
    """Runs x (B, N, C), or packed (T, C), through all blocks.

    Args:
        blocks: `PrunedBlock`s.
        context: read by each block's `transform`.
        recomputes_scores: see `attention.attend.recomputes_scores`.
    Returns:
        The remaining tokens, their layout, and the record.
    """
    record = TowerRecord(packed=isinstance(layout, Packed), recomputes_scores=recomputes_scores)
    entered = count_tokens(x, layout)
    for index, block in enumerate(blocks):
        before = count_tokens(x, layout)
        x, layout, kept, features = block(x, layout, replace(guidance, block=index, entered=entered), *context)
        record.add(before, count_tokens(x, layout), kept, features)
    if isinstance(layout, Packed) and layout.sizes is not None:
        layout = replace(layout, sizes=None)  # they matter to self-attention alone
    return x, layout, record


def block_flops(blocks: Iterable[Any], record: TowerRecord, *context: object) -> Tensor:
    """Counts the multiply-adds of a pass through `run_blocks` per sample, (B,).

    context: token counts of what the blocks read beside x
    """
    steps = enumerate(zip(blocks, record.entering, record.leaving, strict=True))
    costs = [block.flops(entering, leaving, record.execution(index), *context) for index, (block, entering, leaving) in steps]
    return torch.stack(costs).sum(dim=0)
