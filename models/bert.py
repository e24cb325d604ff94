"""BERT text encoder with optional cross-attention to images and a pruner slot in every layer. Parameter names are BLIP's.

S texts, L text tokens with [ENC]/[CLS] first, C channels; B images, M image tokens, V their channels. S is a multiple of B: the
first S / B texts are about the first image, and so on. Texts and images may be packed instead of padded; the images' layout may
then hold the number of texts about each image.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp import flops
from madtp.attention.attend import attend, recomputes_scores
from madtp.blocks import UNPRUNED, Guidance, PrunedBlock, TowerRecord, block_flops, run_blocks
from madtp.importance import AttentionStatistics
from madtp.packing import Layout, Packed, pack
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule

NORM_EPS = 1e-12
FIRST_MERGE_LAYER = 6  # BLIP-NLVR: from here on a linear layer joins the two cross-attentions, before it their mean


@dataclass(frozen=True)
class BertSize:
    vocab_size: int
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    dropout: float = 0.1


class Heads(nn.Module):
    """Query, key and value maps, and attention between them. Keys and values may come from tokens of another width."""

    def __init__(self, size: BertSize, key_width: int):
        super().__init__()
        self.num_heads, self.dropout = size.num_attention_heads, size.dropout
        self.query = nn.Linear(size.hidden_size, size.hidden_size)
        self.key = nn.Linear(key_width, size.hidden_size)
        self.value = nn.Linear(key_width, size.hidden_size)

    def forward(
        self, x: Tensor, source: Tensor, layout: Layout, source_layout: Layout, rule: PruningRule | None = None
    ) -> tuple[Tensor, AttentionStatistics | None]:
        """x (S, L, C), source (B, M, V) -> (S, L, C), statistics or None.

        Neighbouring texts share a source, whose keys and values are computed once: S / B texts, or the `readers` of a packed one.
        """
        query, key, value = self.query(x), self.key(source), self.value(source)
        if not isinstance(layout, Packed):
            query = query.reshape(source.shape[0], -1, query.shape[-1])  # len() would fix the batch size of an exported model
        elif layout is not source_layout:
            layout = layout.joined(source_layout)
        dropout = self.dropout if self.training else 0.0
        out, statistics = attend(query, key, value, self.num_heads, layout, source_layout, dropout, rule, training=self.training)
        return out.reshape(x.shape), statistics

    def flops(self, queries: Tensor, keys: Tensor) -> Tensor:
        total = flops.products(queries, self.query.weight) + flops.products(keys, self.key.weight, self.value.weight)
        return total + flops.attention(queries, keys, self.query.out_features)


class ResidualOutput(nn.Module):
    """LayerNorm(dropout(dense(x)) + residual)."""

    def __init__(self, in_features: int, size: BertSize):
        super().__init__()
        self.dense = nn.Linear(in_features, size.hidden_size)
        self.LayerNorm = nn.LayerNorm(size.hidden_size, eps=NORM_EPS)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(x)) + residual)

    def flops(self, tokens: Tensor) -> Tensor:
        return flops.products(tokens, self.dense.weight) + flops.layer_norm(tokens, self.dense.out_features)


class Attention(nn.Module):
    def __init__(self, size: BertSize):
        super().__init__()
        self.self = Heads(size, size.hidden_size)
        self.output = ResidualOutput(size.hidden_size, size)

    def forward(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        attended, statistics = self.self(x, x, layout, layout, rule)
        return self.output(attended, x), statistics

    def flops(self, tokens: Tensor) -> Tensor:
        return self.self.flops(tokens, tokens) + self.output.flops(tokens)


class PairedOutput(nn.Module):
    """Joins the cross-attentions to two images: their mean, or a linear layer over both (`merge`)."""

    def __init__(self, size: BertSize, merge: bool):
        super().__init__()
        width = size.hidden_size
        self.LayerNorm = nn.LayerNorm(width, eps=NORM_EPS)
        self.dropout = nn.Dropout(size.dropout)
        self.dense0 = nn.Linear(width, width)
        self.dense1 = nn.Linear(width, width)
        self.merge_layer = nn.Linear(2 * width, width) if merge else None

    def forward(self, first: Tensor, second: Tensor, residual: Tensor) -> Tensor:
        first, second = self.dense0(first), self.dense1(second)
        if self.merge_layer is None:
            joined = (first + second) / 2
        else:
            joined = self.merge_layer(torch.cat([first, second], dim=-1))
        return self.LayerNorm(self.dropout(joined) + residual)

    def flops(self, tokens: Tensor) -> Tensor:
        linears = [linear for linear in (self.dense0, self.dense1, self.merge_layer) if linear is not None]
        products = flops.products(tokens, *(linear.weight for linear in linears))
        return products + flops.layer_norm(tokens, self.dense0.out_features)


class PairedCrossAttention(nn.Module):
    """BLIP-NLVR's cross-attention to two images, each with its own weights."""

    def __init__(self, size: BertSize, image_width: int, merge: bool):
        super().__init__()
        self.self0 = Heads(size, image_width)
        self.self1 = Heads(size, image_width)
        self.output = PairedOutput(size, merge)

    def forward(self, x: Tensor, layout: Layout, images: Sequence[tuple[Tensor, Layout]]) -> Tensor:
        """images: the tokens of the left and of the right ones, each with its layout."""
        (left, left_layout), (right, right_layout) = images
        first, _ = self.self0(x, left, layout, left_layout)
        second, _ = self.self1(x, right, layout, right_layout)
        return self.output(first, second, x)

    def flops(self, tokens: Tensor, images: Sequence[Tensor]) -> Tensor:
        return self.self0.flops(tokens, images[0]) + self.self1.flops(tokens, images[1]) + self.output.flops(tokens)


class CrossAttention(nn.Module):
    """BLIP's cross-attention to one image."""

    def __init__(self, size: BertSize, image_width: int):
        super().__init__()
        self.self = Heads(size, image_width)
        self.output = ResidualOutput(size.hidden_size, size)

    def forward(self, x: Tensor, layout: Layout, images: Sequence[tuple[Tensor, Layout]]) -> Tensor:
        """images: one entry, the tokens of the images with their layout."""
        ((image, image_layout),) = images
        attended, _ = self.self(x, image, layout, image_layout)
        return self.output(attended, x)

    def flops(self, tokens: Tensor, images: Sequence[Tensor]) -> Tensor:
        return self.self.flops(tokens, images[0]) + self.output.flops(tokens)


class FeedForward(nn.Module):
    def __init__(self, size: BertSize):
        super().__init__()
        self.dense = nn.Linear(size.hidden_size, size.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.dense(x))


class Layer(PrunedBlock):
    """Post-norm layer: self-attention, pruning, cross-attention, feed-forward. With `pruner=None` it is the dense layer.

    Without images the cross-attention is skipped.
    """

    def __init__(self, size: BertSize, cross_attention: nn.Module, pruner: TokenPruner | None):
        super().__init__()
        self.attention = Attention(size)
        self.crossattention = cross_attention
        self.intermediate = FeedForward(size)
        self.output = ResidualOutput(size.intermediate_size, size)
        self.pruner = pruner

    def attend(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        return self.attention(x, layout, rule)

    def transform(self, x: Tensor, layout: Layout, images: Sequence[tuple[Tensor, Layout]]) -> Tensor:
        if images:
            x = self.crossattention(x, layout, images)
        return self.output(self.intermediate(x), x)

    def attend_flops(self, tokens: Tensor) -> Tensor:
        return self.attention.flops(tokens)

    def transform_flops(self, tokens: Tensor, images: Sequence[Tensor]) -> Tensor:
        total = self.output.flops(tokens) + flops.products(tokens, self.intermediate.dense.weight)
        return total + self.crossattention.flops(tokens, images) if images else total


class Embeddings(nn.Module):
    """Word and position embeddings; there are no token types."""

    def __init__(self, size: BertSize):
        super().__init__()
        self.word_embeddings = nn.Embedding(size.vocab_size, size.hidden_size, padding_idx=0)
        self.position_embeddings = nn.Embedding(size.max_position_embeddings, size.hidden_size)
        self.LayerNorm = nn.LayerNorm(size.hidden_size, eps=NORM_EPS)
        self.dropout = nn.Dropout(size.dropout)

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        return self.dropout(self.LayerNorm(self.word_embeddings(input_ids) + self.position_embeddings(positions)))


class LayerStack(nn.Module):
    def __init__(self, layers: Sequence[Layer]):
        super().__init__()
        self.layer = nn.ModuleList(layers)


class TextEncoder(nn.Module):
    def __init__(
        self,
        size: BertSize,
        make_cross_attention: Callable[[int], nn.Module],
        make_pruner: Callable[[int], TokenPruner | None] = lambda dim: None,
    ):
        """
        Args:
            make_cross_attention: builds the cross-attention of a layer from the layer's index.
            make_pruner: builds the pruner of a layer from its channels; None leaves the layer dense.
        """
        super().__init__()
        self.hidden_size = size.hidden_size
        self.embeddings = Embeddings(size)
        self.encoder = LayerStack(
            [Layer(size, make_cross_attention(i), make_pruner(size.hidden_size)) for i in range(size.num_hidden_layers)]
        )
        self.apply(_init_weights)

    @property
    def depth(self) -> int:
        return len(self.encoder.layer)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        images: Sequence[tuple[Tensor, Layout]],
        guidance: Guidance = UNPRUNED,
    ) -> tuple[Tensor, Layout, TowerRecord]:
        """Encodes texts into tokens with their layout and the record of all layers.

        Args:
            input_ids, attention_mask: (S, L).
            images: tokens that each cross-attention reads, (B, M, V), with their layout; empty for the text alone. They are packed
                when the guidance says `packed`, and only then.
        """
        x, layout = self.embeddings(input_ids), attention_mask.bool()
        if guidance.packed:
            x, layout = pack(x, layout)
        again = recomputes_scores(x, layout, self.encoder.layer[0].attention.self.num_heads)
        return run_blocks(self.encoder.layer, x, layout, guidance, images, recomputes_scores=again)

    def guides(self, input_ids: Tensor, attention_mask: Tensor, learnable_tokens: Tensor) -> Tensor:
        """Returns the features that the learnable tokens collect from each text's embeddings (Eq. 3), to guide its image.

        They keep the lengths of the learnable tokens, on which the sharpness of the attention depends.

        Args:
            input_ids, attention_mask: (S, L).
            learnable_tokens: (K, D).
        Returns:
            (S, K, D)
        """
        _, features = self.encoder.layer[0].pruner.align(
            self.embeddings(input_ids), attention_mask.bool(), learnable_tokens, features=True
        )
        return F.normalize(features, dim=-1) * learnable_tokens.norm(dim=-1, keepdim=True)

    def guide_flops(self, tokens: Tensor) -> Tensor:
        """Counts the multiply-adds of `guides` for texts of `tokens` (S,) tokens."""
        pruner = self.encoder.layer[0].pruner
        words = tokens - pruner.rule.num_prefix_tokens
        collected = pruner.alignment.flops(words, pruner.num_learnable) + words * pruner.num_learnable * pruner.token_dim
        return flops.layer_norm(tokens, self.hidden_size) + collected

    def flops(self, record: TowerRecord, images: Sequence[Tensor]) -> Tensor:
        """Counts the multiply-adds of `forward` per text (S,); `images`: (S,) image tokens that each cross-attention reads."""
        embeddings = flops.layer_norm(record.entering[0], self.hidden_size)
        return embeddings + block_flops(self.encoder.layer, record, images)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
