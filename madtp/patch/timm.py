"""Pruning timm's VisionTransformer: CLIP-style and plain (class token), DINOv2 with registers, SigLIP without class token."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from madtp import flops
from madtp.packing import Layout, count_tokens, padded
from madtp.patch.base import Batch, MakePruner, Tower
from madtp.patch.layers import WrappedBlock, layer_flops, layers_flops
from madtp.pruning import TokenPruner


class TimmBlock(WrappedBlock):
    """timm's Block."""

    def __init__(self, block: Block, pruner: TokenPruner):
        super().__init__(block, pruner, (block.drop_path1, block.drop_path2))
        attn = block.attn
        self.num_heads, self.width = attn.num_heads, attn.qkv.out_features // 3
        self.attention_dropout = attn.attn_drop.p

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.layer.norm1, self.layer.norm2

    @property
    def scales(self) -> tuple[nn.Module, nn.Module]:
        return self.layer.ls1, self.layer.ls2

    def project(self, x: Tensor) -> Sequence[Tensor]:
        attn = self.layer.attn
        query, key, value = attn.qkv(x).chunk(3, dim=-1)
        # Queries and keys may be normalised head by head.
        query, key = (
            norm(part.unflatten(-1, (attn.num_heads, -1))).flatten(-2)
            for norm, part in ((attn.q_norm, query), (attn.k_norm, key))
        )
        return query, key, value

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        attn = self.layer.attn
        attended = getattr(attn, "norm", nn.Identity())(attended)
        if getattr(attn, "gate", None) is not None:
            attended = attended * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(attended))

    @property
    def attention_layers(self) -> list[nn.Module | Tensor | None]:
        attn = self.layer.attn
        return [attn.q_norm, attn.k_norm, getattr(attn, "norm", None), attn.qkv, getattr(attn, "gate", None), attn.proj]


class TimmTower(Tower):
    """A whole VisionTransformer."""

    def __init__(self, model: VisionTransformer, make_pruner: MakePruner, once: Iterable[nn.Module] = ()):
        """
        Args:
            once: layers behind the model, for counting.
        """
        check(model)
        blocks = [TimmBlock(block, make_pruner(model.embed_dim, model.num_prefix_tokens)) for block in model.blocks]
        super().__init__("vision", model, blocks, [model.patch_embed.proj], [model.norm_pre], [model.norm], once)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
        """Maps images (B, 3, H, W) to the output of the head."""
        if attn_mask is not None or any(options.values()):
            raise ValueError("a pruned model takes no attention mask")
        model = self.module
        tokens, layout = self.run(model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x)))))
        return pool(model, model.norm(tokens), layout)

    def flops(self, unpruned: bool = False) -> Tensor:
        model, total = self.module, super().flops(unpruned)
        last = (self.last().unpruned() if unpruned else self.last()).leaving[-1].cpu()
        if model.attn_pool is not None:
            reads_prefix = getattr(model, "pool_include_prefix", True)  # older versions of timm have no choice
            total = total + pool_flops(model.attn_pool, last if reads_prefix else last - model.num_prefix_tokens)
        return total + layers_flops((model.fc_norm, model.head), torch.ones_like(last) if model.global_pool else last)


def towers(model: VisionTransformer, make_pruner: MakePruner, wanted: Callable[[str], bool]) -> list[Tower]:
    return [TimmTower(model, make_pruner)]


def reads_text(batch: Batch) -> bool:
    return False


def call(model: VisionTransformer, batch: Batch) -> Tensor:
    return model(batch)


def check(model: VisionTransformer) -> None:
    """
    Raises:
        TypeError: naming the first part that is not supported.
    """
    for index, block in enumerate(model.blocks):
        if type(block) is not Block or type(block.attn) is not Attention:
            kind = type(block).__name__ if type(block) is not Block else type(block.attn).__name__
            raise TypeError(f"block {index} is a {kind}; supported are timm's Block and Attention")
        if not isinstance(block.norm1, nn.LayerNorm):
            raise TypeError(f"block {index} has a {type(block.norm1).__name__}; supported is LayerNorm")
    if model.global_pool == "":
        raise TypeError("the model returns all its tokens, and pruned images have fewer; choose another global_pool than ''")
    pool = model.attn_pool
    if pool is not None and type(pool).__name__ != "AttentionPoolLatent":
        raise TypeError(f"the model pools by {type(pool).__name__}; supported is AttentionPoolLatent")
    if pool is not None and pool.pos_embed is not None:
        raise TypeError("the attention pool has position embeddings, which pruned tokens no longer match")
    if model.grad_checkpointing:
        raise TypeError("the model recomputes activations; call set_grad_checkpointing(False) first")


def pool(model: VisionTransformer, tokens: Tensor, layout: Layout) -> Tensor:
    """Runs the head on the tokens of each image, without padding: images that keep the same number of tokens run together."""
    lengths = count_tokens(tokens, layout).to(tokens.device)
    tokens, _ = padded(tokens, layout)
    if model.global_pool == "token" or bool((lengths == tokens.shape[1]).all()):
        return model.forward_head(tokens)
    groups = [(lengths == length).nonzero().flatten() for length in lengths.unique()]
    outputs = torch.cat([model.forward_head(tokens[group, : int(lengths[group[0]])]) for group in groups])
    return outputs[torch.cat(groups).argsort()]


def pool_flops(pool: Any, tokens: Tensor) -> Tensor:
    """Counts the multiply-adds of timm's AttentionPoolLatent over (B,) tokens."""
    latents, width = torch.full_like(tokens, pool.latent_len), pool.kv.out_features // 2
    reads_tokens = (pool.kv, pool.k_norm)
    total = flops.attention(latents, tokens, width) + layers_flops(reads_tokens, tokens, width)
    others = [layer for layer in pool.modules() if layer not in (*reads_tokens, pool.q_norm)]
    return total + layer_flops(pool.q_norm, latents, width) + layers_flops(others, latents)
