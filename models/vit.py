"""Vision transformer with a pruner slot in every block. Parameter names are those of BLIP and timm.

B batch, N tokens with the class token first, C channels. Tokens are (B, N, C) with a mask, or packed, (T, C) with a layout.
"""

from collections.abc import Callable

import torch
from timm.layers import Mlp, PatchEmbed, trunc_normal_
from torch import Tensor, nn

from madtp import flops
from madtp.attention.attend import attend, recomputes_scores
from madtp.blocks import UNPRUNED, Guidance, PreNormBlock, TowerRecord, block_flops, run_blocks
from madtp.importance import AttentionStatistics
from madtp.packing import Layout, pack
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule
from models.checkpointing import checkpoint_last

NORM_EPS = 1e-6  # of BLIP and timm


class SelfAttention(nn.Module):
    """Multi-head self-attention over x (B, N, C) or packed."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        heads = self.qkv(x).chunk(3, dim=-1)
        out, statistics = attend(*heads, self.num_heads, layout, layout, rule=rule, training=self.training)
        return self.proj(out), statistics


class Block(PreNormBlock):
    """A block with the names of BLIP and timm."""

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float, drop_path: float, pruner: TokenPruner | None, norm_eps: float = NORM_EPS
    ):
        super().__init__(dim, drop_path, pruner)
        self.norm1 = nn.LayerNorm(dim, eps=norm_eps)
        self.attn = SelfAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=norm_eps)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def attention(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        return self.attn(self.norm1(x), layout, rule)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(x))

    @property
    def key_dim(self) -> int:
        return self.dim // self.attn.num_heads

    @property
    def attention_weights(self) -> list[nn.Parameter]:
        return [self.attn.qkv.weight, self.attn.proj.weight]

    @property
    def mlp_weights(self) -> list[nn.Parameter]:
        return [self.mlp.fc1.weight, self.mlp.fc2.weight]


class VisionTransformer(nn.Module):
    def __init__(
        self,
        image_size: int,
        patch_size: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        make_pruner: Callable[[int], TokenPruner | None] = lambda dim: None,
        checkpoint_blocks: int = 0,
        norm_eps: float = NORM_EPS,
    ):
        """
        Args:
            make_pruner: builds the pruner of a block from its number of channels; None leaves the block dense.
            checkpoint_blocks: number of last blocks that recompute their activations in the backward pass.
            norm_eps: epsilon of all LayerNorms.
        """
        super().__init__()
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed(image_size, patch_size, in_chans=3, embed_dim=embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.patch_embed.num_patches, embed_dim))
        rates = [drop_path * index / max(1, depth - 1) for index in range(depth)]
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, rate, make_pruner(embed_dim), norm_eps) for rate in rates
        )
        self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        trunc_normal_(self.cls_token, std=0.02)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(_init_linear)
        checkpoint_last(self.blocks, checkpoint_blocks)

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def forward(self, images: Tensor, guidance: Guidance = UNPRUNED) -> tuple[Tensor, Layout, TowerRecord]:
        """Encodes images (B, 3, H, W) into tokens, padded or packed, with their layout and the record of all blocks."""
        x = self.patch_embed(images)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x], dim=1) + self.pos_embed
        x, layout = pack(x, None) if guidance.packed else (x, None)
        again = recomputes_scores(x, layout, self.blocks[0].attn.num_heads)
        x, layout, record = run_blocks(self.blocks, x, layout, guidance, recomputes_scores=again)
        return self.norm(x), layout, record

    def flops(self, record: TowerRecord) -> Tensor:
        """Counts the multiply-adds of `forward` per image, (B,)."""
        patch = self.patch_embed.proj
        first, last = record.entering[0], record.leaving[-1]
        total = flops.linear(first - 1, patch.weight[0].numel(), self.embed_dim) + flops.layer_norm(last, self.embed_dim)
        return total + block_flops(self.blocks, record)


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
