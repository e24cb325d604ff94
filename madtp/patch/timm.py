"""Pruning timm's VisionTransformer: CLIP-style and plain (class token), DINOv2 with registers, SigLIP without class token."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import Tensor, nn

from madtp import flops
from madtp.attention.attend import attend, recomputes_scores
from madtp.blocks import DropPath, PreNormBlock, TowerRecord, block_flops, run_blocks
from madtp.importance import AttentionStatistics
from madtp.packing import Layout, count_tokens, pack, padded
from madtp.patch.base import ATTRIBUTE, Pruning
from madtp.pruning import PruningRule, TokenPruner


class TimmBlock(PreNormBlock):
    """timm's Block with a pruner between attention and MLP. It runs the layers of the original block and owns none."""

    block: Any  # timm is not typed

    def __init__(self, block: Block, pruner: TokenPruner):
        super().__init__(block.norm1.normalized_shape[0], 0.0, pruner)
        self.block = block
        # timm's would drop single tokens of a packed batch instead of samples.
        self.paths = [DropPath(getattr(path, "drop_prob", 0.0) or 0.0) for path in (block.drop_path1, block.drop_path2)]

    def _dropped(self, path: int, branch: Tensor, layout: Layout) -> Tensor:
        self.paths[path].training = self.block.training
        return self.paths[path](branch, layout)

    def attend(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        attended, statistics = self.attention(x, layout, rule)
        return x + self._dropped(0, self.block.ls1(attended), layout), statistics

    def transform(self, x: Tensor, layout: Layout, *context: object) -> Tensor:
        return x + self._dropped(1, self.block.ls2(self.feed_forward(x)), layout)

    def attention(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        attn, x = self.block.attn, self.block.norm1(x)
        query, key, value = attn.qkv(x).chunk(3, dim=-1)
        # Queries and keys may be normalised head by head.
        query, key = (
            norm(part.unflatten(-1, (attn.num_heads, -1))).flatten(-2)
            for norm, part in ((attn.q_norm, query), (attn.k_norm, key))
        )
        training = self.block.training
        dropout = attn.attn_drop.p if training else 0.0
        out, statistics = attend(query, key, value, attn.num_heads, layout, layout, dropout, rule, training=training)
        out = getattr(attn, "norm", nn.Identity())(out)
        if getattr(attn, "gate", None) is not None:
            out = out * attn.gate(x).sigmoid()
        return attn.proj_drop(attn.proj(out)), statistics

    @property
    def key_dim(self) -> int:
        return self.block.attn.qkv.out_features // (3 * self.block.attn.num_heads)

    def feed_forward(self, x: Tensor) -> Tensor:
        return self.block.mlp(self.block.norm2(x))

    def attend_flops(self, tokens: Tensor) -> Tensor:
        attn = self.block.attn
        width = attn.qkv.out_features // 3
        total = layer_flops(self.block.norm1, tokens) + flops.attention(tokens, tokens, width)
        layers = (attn.q_norm, attn.k_norm, getattr(attn, "norm", None), attn.qkv, getattr(attn, "gate", None), attn.proj)
        return total + layers_flops(layers, tokens, width)

    def transform_flops(self, tokens: Tensor, *context: object) -> Tensor:
        return layers_flops([self.block.norm2, *self.block.mlp.modules()], tokens)


def layer_flops(layer: nn.Module | None, tokens: Tensor, width: int | None = None) -> Tensor:
    """Counts the multiply-adds of a linear layer or a layer norm; 0 for any other layer.

    width: channels per token, where a norm is applied to several heads of a token
    """
    if isinstance(layer, nn.Linear):
        return flops.products(tokens, layer.weight)
    if isinstance(layer, nn.LayerNorm):
        return flops.layer_norm(tokens, width or layer.normalized_shape[0])
    return torch.zeros_like(tokens)


def layers_flops(layers: Iterable[nn.Module | None], tokens: Tensor, width: int | None = None) -> Tensor:
    return torch.stack([layer_flops(layer, tokens, width) for layer in layers]).sum(dim=0)


class TimmPruning(Pruning):
    """The pruning of a timm VisionTransformer."""

    def __init__(
        self,
        model: VisionTransformer,
        rule: PruningRule,
        num_learnable: int,
        init_std: float,
        packed: bool,
        generator: torch.Generator,
    ):
        check(model)
        rule = replace(rule, num_prefix_tokens=model.num_prefix_tokens)
        dim = model.embed_dim
        learnable_tokens = (torch.randn(num_learnable, dim, generator=generator) * init_std).to(model.patch_embed.proj.weight)
        blocks = [TimmBlock(block, TokenPruner(dim, num_learnable, dim, rule)) for block in model.blocks]
        super().__init__(blocks, learnable_tokens, packed)
        self._attention_heads = model.blocks[0].attn.num_heads
        self._model = [model]  # in a list: a submodule would make a circle
        model.add_module(ATTRIBUTE, self)
        model.forward = partial(forward, model)

    @property
    def model(self) -> VisionTransformer:
        return self._model[0]

    def run(self, images: Tensor) -> TowerRecord:
        return self.encode(images)[2]

    def encode(self, images: Tensor) -> tuple[Tensor, Layout, TowerRecord]:
        """Encodes images (B, 3, H, W) into the tokens behind the last norm, with their layout and the record."""
        model = self.model
        x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
        layout: Layout = None
        if self.packed:
            x, layout = pack(x, None)
        again = recomputes_scores(x, layout, self._attention_heads)
        x, layout, self.record = run_blocks(self.blocks, x, layout, self.guidance(), recomputes_scores=again)
        return model.norm(x), layout, self.record

    def flops(self, record: TowerRecord) -> Tensor:
        model, (first, last) = self.model, (record.entering[0], record.leaving[-1])
        dim, prefix, patch = model.embed_dim, model.num_prefix_tokens, model.patch_embed.proj
        total = flops.linear(first - prefix, patch.weight[0].numel(), dim) + block_flops(self.blocks, record)
        total = total + layer_flops(model.norm_pre, first) + layer_flops(model.norm, last)
        pooled = torch.ones_like(last) if model.global_pool else last
        if model.attn_pool is not None:
            reads_prefix = getattr(model, "pool_include_prefix", True)  # older versions of timm have no choice
            total = total + pool_flops(model.attn_pool, last if reads_prefix else last - prefix)
        return total + layers_flops((model.fc_norm, model.head), pooled)

    def detach(self) -> None:
        model = self.model
        del model.forward  # uncovers the class's
        delattr(model, ATTRIBUTE)


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


def forward(model: VisionTransformer, x: Tensor, attn_mask: Tensor | None = None, **options: object) -> Tensor:
    """Replaces VisionTransformer.forward: images (B, 3, H, W) -> the output of the head."""
    pruning: TimmPruning = getattr(model, ATTRIBUTE)
    if pruning.setting.temperature is None and not pruning.align:
        return type(model).forward(model, x, **({} if attn_mask is None else {"attn_mask": attn_mask}), **options)
    if attn_mask is not None or any(options.values()):
        raise ValueError("a pruned model takes no attention mask")
    tokens, layout, _ = pruning.encode(x)
    return pool(model, tokens, layout)


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
