"""SigLIP and SigLIP 2 of one resolution (Zhai et al., 2023; Tschannen et al., 2025) with a pruner slot in every block.

The towers are CLIP's but for these points. An image has no class token, so no S_cls: a learned probe attends to the tokens that are
left. A text is padded to one length, its padding takes part, and all tokens see one another; the last place is read. It comes first
in memory, as class tokens do everywhere. Parameter names follow CLIP's.

B images or texts, N tokens, L text tokens, C channels of a tower.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip.model import ACTIVATIONS, BlockForm, Clip, ClipSize, ImageTower, MakePruner, SelfAttention, Transformer
from madtp import flops
from madtp.attention.attend import Causal, attend
from madtp.blocks import Encoded, block_flops
from madtp.packing import Layout, Packed

FORM = BlockForm(activation="gelu_tanh", norm_eps=1e-6)
START_BIAS = -10.0  # of the sigmoid loss, as SigLIP was trained


class AttentionPool(nn.Module):
    """Attention of a learned probe to the tokens of each image, and an MLP."""

    def __init__(self, dim: int, num_heads: int, form: BlockForm):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, dim))
        self.attn = SelfAttention(dim, num_heads, None)
        self.ln = nn.LayerNorm(dim, form.norm_eps)
        self.mlp = form.mlp(dim)
        nn.init.normal_(self.attn.in_proj_weight, std=dim**-0.5)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """Pools tokens (B, N, C), or packed (T, C), to (B, C)."""
        dim, attn = self.probe.shape[-1], self.attn
        query = F.linear(self.probe, attn.in_proj_weight[:dim], attn.in_proj_bias[:dim])
        key, value = F.linear(x, attn.in_proj_weight[dim:], attn.in_proj_bias[dim:]).chunk(2, dim=-1)
        if isinstance(layout, Packed):
            number = len(layout.lengths)
            queries: Layout = Packed.of([1] * number, layout.device)
            query = query[0].expand(number, -1)
        else:
            queries, query = None, query.expand(len(x), -1, -1)
        pooled, _ = attend(query, key, value, attn.num_heads, queries, layout, training=self.training)
        pooled = attn.out_proj(pooled).reshape(-1, dim)
        return pooled + self.mlp(self.ln(pooled))

    def flops(self, tokens: Tensor) -> Tensor:
        """Counts the multiply-adds of pooling (B,) tokens."""
        once, dim = torch.ones_like(tokens), self.probe.shape[-1]
        query, *others = self.attn.in_proj_weight.chunk(3)
        total = flops.products(tokens, *others) + flops.attention(once, tokens, dim) + flops.layer_norm(once, dim)
        return total + flops.products(once, query, self.attn.out_proj.weight, self.mlp.c_fc.weight, self.mlp.c_proj.weight)


class SiglipTower(ImageTower):
    """SigLIP's image tower. The feature is the pooled token, of as many channels as the tower."""

    prefix_tokens = 0

    def __init__(self, size: ClipSize, make_pruner: MakePruner):
        super().__init__()
        width, patches = size.vision_width, (size.image_size // size.patch_size) ** 2
        form = replace(FORM, hidden=size.vision_hidden)
        self.conv1 = nn.Conv2d(3, width, size.patch_size, size.patch_size)
        self.positional_embedding = nn.Parameter(torch.randn(patches, width) * width**-0.5)
        make_pruner = partial(make_pruner, num_prefix_tokens=self.prefix_tokens)
        self.transformer = Transformer(width, size.vision_layers, size.vision_heads, None, make_pruner, form)
        self.ln_post = nn.LayerNorm(width, FORM.norm_eps)
        self.pool = AttentionPool(width, size.vision_heads, form)

    def embed(self, images: Tensor) -> Tensor:
        patches = self.conv1(images).flatten(2).transpose(1, 2)
        return patches + self.positional_embedding

    def read(self, x: Tensor, layout: Layout) -> Tensor:
        return self.pool(self.ln_post(x), layout)

    def project(self, token: Tensor) -> Tensor:
        return token

    def flops(self, encoded: Encoded) -> Tensor:
        record, width = encoded.record, self.conv1.out_channels
        total = flops.linear(record.entering[0], self.conv1.weight[0].numel(), width)
        total = total + flops.layer_norm(record.leaving[-1], width) + self.pool.flops(record.leaving[-1])
        return total + block_flops(self.transformer.resblocks, record)


class Siglip(Clip):
    image_tower = SiglipTower
    text_form = FORM

    def __init__(
        self, size: ClipSize, make_pruner: MakePruner = lambda dim, **options: None,
        learnable_tokens: tuple[int, int, float] | None = None, text_order: Causal = None,
        make_text_pruner: MakePruner | None = None,
    ):  # fmt: skip
        """
        Args:
            make_pruner: also takes `num_prefix_tokens`.
            text_order: None, since all tokens of a text see one another.
        """
        size = replace(size, activation=size.activation or FORM.activation)
        super().__init__(size, make_pruner, learnable_tokens, text_order, make_text_pruner)
        self.adopt(size.activation, size.vision_heads, size.text_heads)
        # The sigmoid loss adds it to every similarity. It changes no ranking and no softmax, so nothing here reads it; it is kept
        # so that weights go back to transformers whole.
        self.register_buffer("logit_bias", torch.tensor(START_BIAS))

    @staticmethod
    def text_head(width: int, embed_dim: int) -> nn.Module:
        return nn.Linear(width, embed_dim)

    def adopt(self, activation: str, vision_heads: int, text_heads: int) -> None:
        super().adopt(activation, vision_heads, text_heads)
        for module in self.modules():
            if isinstance(module, AttentionPool):
                module.mlp.gelu = ACTIVATIONS[activation]()
                module.attn.num_heads = vision_heads

    def class_first(self, x: Tensor, input_ids: Tensor) -> tuple[Tensor, Layout]:
        """Moves the token at the last place of each text to the front, whatever it is."""
        return x.roll(1, dims=1), None

    @staticmethod
    def project_text(token: Tensor, projection: Any) -> Tensor:
        return projection(token)
