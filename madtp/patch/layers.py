"""Blocks of other libraries with a pruner between attention and MLP, and the cost of their layers.

B samples, N tokens, T tokens of a packed batch, C channels, H heads of D channels each.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from madtp import flops
from madtp.attention.attend import Causal, attend
from madtp.blocks import DropPath, PreNormBlock
from madtp.importance import AttentionStatistics
from madtp.packing import Layout
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule


class WrappedBlock(PreNormBlock):
    """A pre-norm block with a pruner. It runs the layers of the original block.

    Subclasses give the layers their roles: `norms`, `mlp`, `scales` (of attention and MLP), `project`, `output` and, for counting,
    `attention_layers`.
    """

    num_heads: int
    width: int  # H * D
    causal: Causal = None
    attention_dropout = 0.0

    def __init__(self, layer: Any, pruner: TokenPruner, drop_paths: Sequence[nn.Module | None] = (None, None)):
        """
        Args:
            layer: the original block.
            drop_paths: its layers that drop branches. Theirs would drop single tokens of a packed batch instead of samples.
        """
        super().__init__(pruner.dim, 0.0, pruner)
        self.layer = layer
        self.paths = [DropPath(getattr(path, "drop_prob", 0.0) or 0.0) for path in drop_paths]

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        raise NotImplementedError

    @property
    def mlp(self) -> nn.Module:
        return self.layer.mlp

    @property
    def scales(self) -> tuple[nn.Module, nn.Module]:
        return nn.Identity(), nn.Identity()

    def project(self, x: Tensor) -> Sequence[Tensor]:
        """Maps normalised tokens (..., C) to queries, keys and values, (..., H * D) each."""
        raise NotImplementedError

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        """Maps the heads' outputs (..., H * D) to (..., C). x are the normalised tokens."""
        raise NotImplementedError

    @property
    def attention_layers(self) -> list[nn.Module | Tensor | None]:
        """The layers of the attention, or their weights, without its norm."""
        raise NotImplementedError

    def attention(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        x, training = self.norms[0](x), self.layer.training
        dropout = self.attention_dropout if training else 0.0
        query, key, value = self.project(x)
        out, statistics = attend(query, key, value, self.num_heads, layout, layout, dropout, rule, self.causal, training)
        return self.output(out, x), statistics

    def _dropped(self, path: int, branch: Tensor, layout: Layout) -> Tensor:
        self.paths[path].training = self.layer.training
        return self.paths[path](branch, layout)

    def attend(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        attended, statistics = self.attention(x, layout, rule)
        return x + self._dropped(0, self.scales[0](attended), layout), statistics

    def transform(self, x: Tensor, layout: Layout, *context: object) -> Tensor:
        return x + self._dropped(1, self.scales[1](self.feed_forward(x)), layout)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norms[1](x))

    @property
    def key_dim(self) -> int:
        return self.width // self.num_heads

    def attend_flops(self, tokens: Tensor) -> Tensor:
        total = layer_flops(self.norms[0], tokens) + flops.attention(tokens, tokens, self.width)
        return total + layers_flops(self.attention_layers, tokens, self.width)

    def transform_flops(self, tokens: Tensor, *context: object) -> Tensor:
        return layers_flops([self.norms[1], *self.mlp.modules()], tokens)


def layer_flops(layer: nn.Module | Tensor | None, tokens: Tensor, width: int | None = None) -> Tensor:
    """Counts the multiply-adds of a linear layer, its weight, a layer norm, or a convolution over patches; 0 for any other layer.

    width: channels per token, where a norm is applied to several heads of a token
    """
    if isinstance(layer, Tensor):
        return flops.products(tokens, layer)
    if isinstance(layer, nn.Linear):
        return flops.products(tokens, layer.weight)
    if isinstance(layer, nn.Conv2d):  # its stride is its size
        return tokens * layer.weight.numel()
    if isinstance(layer, nn.LayerNorm):
        return flops.layer_norm(tokens, width or layer.normalized_shape[0])
    return torch.zeros_like(tokens)


def layers_flops(layers: Iterable[nn.Module | Tensor | None], tokens: Tensor, width: int | None = None) -> Tensor:
    total = torch.zeros_like(tokens)
    for layer in layers:
        total = total + layer_flops(layer, tokens, width)
    return total


def pool_flops(attention: nn.MultiheadAttention, tokens: Tensor, others: Iterable[nn.Module]) -> Tensor:
    """Counts attention of one learned query to (B,) tokens, and the other layers of the pooling, applied once."""
    once, width = torch.ones_like(tokens), attention.embed_dim
    query, key, value = attention.in_proj_weight.chunk(3)
    total = flops.products(tokens, key, value) + flops.attention(once, tokens, width)
    return total + layers_flops([query, attention.out_proj, *others], once)
