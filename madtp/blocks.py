"""What the image and the text tower have in common: how blocks hand tokens on, and what they leave on record."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from madtp import flops
from madtp.alignment import Valid
from madtp.importance import AttentionStatistics
from madtp.packing import Packed, pack
from madtp.pruning import Execution, Layout, PruneSetting, TokenPruner
from utils import gather_padded


@dataclass
class TowerRecord:
    """What a pass through a tower leaves beside its tokens, one entry a block.

    entering, leaving: (B,) valid tokens, class token included, before and after the block's pruning
    kept: (B, N) bool over the block's tokens without the class token, None where the block did not prune
    features: (B, K, D) sum over the blocks of the alignment features, None unless asked for
    packed: the layout of the tokens; scored_again: whether the pruners' scores cost a second Q K^T
    """

    entering: list[Tensor] = field(default_factory=list)
    leaving: list[Tensor] = field(default_factory=list)
    kept: list[Tensor | None] = field(default_factory=list)
    features: Tensor | None = None
    packed: bool = False
    scored_again: bool = False

    def ran(self, active: bool, training: bool) -> Execution:
        return Execution(active, training, self.packed, self.scored_again)

    def add(self, before: Tensor, after: Tensor, kept: Tensor | None, features: Tensor | None) -> None:
        self.entering.append(before)
        self.leaving.append(after)
        self.kept.append(kept)
        if features is not None:
            self.features = features if self.features is None else self.features + features

    def unpruned(self) -> "TowerRecord":
        """What the same samples leave on record when nothing is pruned."""
        depth, tokens = len(self.entering), self.entering[0]
        return replace(self, entering=[tokens] * depth, leaving=[tokens] * depth, kept=[None] * depth, features=None)


@dataclass
class Encoded:
    """The tokens of a tower with their layout, the normalised feature (B, E) of each sample, and the record."""

    tokens: Tensor
    layout: Layout
    feature: Tensor
    record: TowerRecord


def count_tokens(x: Tensor, layout: Layout) -> Tensor:
    """(B,) number of valid tokens of x (B, N, C), or packed (T, C)."""
    if isinstance(layout, Packed):
        return torch.tensor(layout.lengths)
    return torch.full(x.shape[:1], x.shape[1], device=x.device) if layout is None else layout.sum(dim=1)


def padded(x: Tensor, layout: Layout) -> tuple[Tensor, Valid]:
    """Tokens (B, N, C), and their mask (B, N) or None where nothing is padding, from either layout."""
    if not isinstance(layout, Packed):
        return x, layout
    return layout.pad(x), None if layout.uniform else layout.valid


def halves(x: Tensor, layout: Layout) -> list[tuple[Tensor, Layout]]:
    """A batch as two of equally many samples, each with its layout."""
    if isinstance(layout, Packed):
        return layout.chunk(x, 2)
    return list(zip(x.chunk(2), (None, None) if layout is None else layout.chunk(2), strict=True))


def select(x: Tensor, layout: Layout, samples: Tensor) -> tuple[Tensor, Layout]:
    """The samples of these numbers (n,), in that order; one may come twice."""
    if isinstance(layout, Packed):
        return layout.select(x, samples)
    return x[samples], None if layout is None else layout[samples]


def concatenate(first: tuple[Tensor, Layout], second: tuple[Tensor, Layout]) -> tuple[Tensor, Layout]:
    """The samples of two batches, each given with its layout, as one batch."""
    if isinstance(first[1], Packed):
        return torch.cat([first[0], second[0]]), Packed.of(first[1].lengths + second[1].lengths, first[1].device)
    if first[1] is None and second[1] is None and first[0].shape[1] == second[0].shape[1]:
        return torch.cat([first[0], second[0]]), None
    width = max(first[0].shape[1], second[0].shape[1])
    tokens, masks = zip(*(_widen(*batch, width) for batch in (first, second)), strict=True)
    return torch.cat(tokens), torch.cat(masks)


def gather_samples(x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """The samples of all processes, in the order of the ranks, as one batch; gradients find their way back to each process."""
    if not dist.is_initialized():
        return x, layout
    if isinstance(layout, Packed):  # padding holds tokens of other samples, and no gradient may reach them through it
        padded = layout.pad(x) * layout.valid.unsqueeze(-1)
        return pack(gather_padded(padded), gather_padded(layout.valid.byte()).bool())
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
    return gather_padded(x), gather_padded(valid.byte()).bool()


def _widen(x: Tensor, valid: Valid, width: int) -> tuple[Tensor, Tensor]:
    """x (B, N, C) padded to `width` tokens, and its mask."""
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
    more = width - x.shape[1]
    return F.pad(x, (0, 0, 0, more)), F.pad(valid, (0, more))


class AlignedModel(nn.Module):
    """A model whose towers share learnable tokens E; `space_dict` is their published name."""

    space_dict: nn.Parameter | None
    answer_head: nn.Module | None = None  # see madtp.distillation, as of `branches` and `pair_logits`

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        """The blocks of each branch that has a class token."""
        return {"vision": self.visual_encoder.blocks, "language": self.text_encoder.encoder.layer}

    def init_learnable_tokens(self, sizes: tuple[int, int, float] | None) -> None:
        """sizes: number K, width D and initial standard deviation; None without pruners."""
        self.space_dict = None
        if sizes is not None:
            number, token_dim, std = sizes
            self.space_dict = nn.Parameter(torch.randn(number, token_dim) * std)

    @property
    def learnable_tokens(self) -> Tensor | None:
        """(K, D)"""
        return self.space_dict


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

    def __init__(self, dim: int, drop_path: float, pruner: TokenPruner | None):
        super().__init__()
        self.dim = dim
        self.drop_path = DropPath(drop_path)
        self.pruner = pruner

    def attention(self, x: Tensor, layout: Layout, pruner: TokenPruner | None) -> tuple[Tensor, AttentionStatistics | None]:
        """Self-attention of the normed tokens x (B, N, C) or packed, and the statistics that `pruner` asks for."""
        raise NotImplementedError

    def feed_forward(self, x: Tensor) -> Tensor:
        """The MLP of the normed tokens."""
        raise NotImplementedError

    @property
    def attention_weights(self) -> list[nn.Parameter]:
        """Weights of the linear layers in `attention`."""
        raise NotImplementedError

    @property
    def mlp_weights(self) -> list[nn.Parameter]:
        """Weights of the linear layers in `feed_forward`."""
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

    def flops(self, entering: Tensor, leaving: Tensor, ran: Execution) -> Tensor:
        """Multiply-adds of `forward` for samples with these token counts before and after pruning."""
        dim = self.dim
        total = flops.layer_norm(entering, dim) + flops.attention(entering, entering, dim)
        total = total + flops.products(entering, *self.attention_weights)
        total = total + flops.layer_norm(leaving, dim) + flops.products(leaving, *self.mlp_weights)
        if self.pruner is not None:
            total = total + self.pruner.flops(entering, ran)
        return total


def checkpoint_last(blocks: nn.ModuleList, number: int) -> None:
    """Let the last `number` blocks recompute their activations in the backward pass, in the precision and along the path of the
    forward pass: which tokens are pruned must not change. Hooks on a block see the forward pass alone."""
    for block in list(blocks)[max(0, len(blocks) - number) :]:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    layout: Layout,
    learnable_tokens: Tensor | None,
    setting: PruneSetting,
    align: bool,
    scored_again: bool,
    *context: object,
) -> tuple[Tensor, Layout, TowerRecord]:
    """x (B, N, C) or packed, through all blocks -> x, its layout, the record; `context` is what a block reads beside x."""
    record = TowerRecord(packed=isinstance(layout, Packed), scored_again=scored_again)
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
        block.flops(entering, leaving, record.ran(setting.at(index) is not None, training), *context)
        for index, (block, entering, leaving) in steps
    )


def dense_record(depth: int, tokens: int, samples: int) -> TowerRecord:
    """The record of a pass in which nothing is pruned: `tokens` a sample, class token included, in every block."""
    record = TowerRecord()
    for _ in range(depth):
        record.add(torch.full((samples,), tokens), torch.full((samples,), tokens), None, None)
    return record
