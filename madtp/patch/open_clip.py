"""Pruning open_clip's CLIP: its own image encoder or one of timm, and its text encoder."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from madtp.patch.base import Batch, MakePruner, Tower, end_place, highest_place, last_place
from madtp.patch.layers import WrappedBlock
from madtp.patch.timm import TimmTower
from madtp.pruning import TokenPruner

PLACES = {"argmax": highest_place, "last": last_place}


class OpenClipBlock(WrappedBlock):
    """open_clip's ResidualAttentionBlock."""

    def __init__(self, block: ResidualAttentionBlock, pruner: TokenPruner, causal: bool = False):
        super().__init__(block, pruner)
        attn = block.attn
        self.num_heads, self.width, self.attention_dropout = attn.num_heads, attn.embed_dim, attn.dropout
        self.causal = "class_last" if causal else None

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.layer.ln_1, self.layer.ln_2

    @property
    def scales(self) -> tuple[nn.Module, nn.Module]:
        return self.layer.ls_1, self.layer.ls_2

    def project(self, x: Tensor) -> Sequence[Tensor]:
        attn = self.layer.attn
        return F.linear(x, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        return self.layer.attn.out_proj(attended)

    @property
    def attention_layers(self) -> list[nn.Module | Tensor | None]:
        return [self.layer.attn.in_proj_weight, self.layer.attn.out_proj]


class OpenClipTower(Tower):
    """An encoder whose Transformer is replaced."""

    def __init__(self, name: str, transformer: Any, make_pruner: MakePruner, causal: bool = False, **layers: Any):
        blocks = []
        for index, block in enumerate(transformer.resblocks):
            if type(block) is not ResidualAttentionBlock:
                kind = type(block).__name__
                raise TypeError(f"block {index} of the {name} encoder is a {kind}; supported is ResidualAttentionBlock")
            blocks.append(OpenClipBlock(block, make_pruner(transformer.width), causal))
        if transformer.grad_checkpointing:
            raise TypeError("the model recomputes activations; call set_grad_checkpointing(False) first")
        super().__init__(name, transformer, blocks, **layers)
        self.tokens_first = not hasattr(transformer, "batch_first")  # older versions run on (N, B, C)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = self.encode(x.transpose(0, 1) if self.tokens_first else x)
        return x.transpose(0, 1) if self.tokens_first else x

    def encode(self, x: Tensor) -> Tensor:
        """Maps tokens (B, N, C) to those that are left, padded."""
        return self.padded(*self.run(x))


class TextTower(OpenClipTower):
    """The text encoder, of which one token is read: the end of the text, or the last place."""

    def __init__(self, text: Any, place: Callable[[Tensor], Tensor], make_pruner: MakePruner, **layers: Any):
        """
        Args:
            place: ids (B, L) -> the place of the token that is read, (B,).
        """
        super().__init__("language", text.transformer, make_pruner, text.attn_mask is not None, **layers)
        self.place = place
        self.hooks.append((text.token_embedding, self._see))

    def _see(self, embedding: nn.Module, inputs: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        (self.ids,) = inputs

    def encode(self, x: Tensor) -> Tensor:
        return self.run_to(x, self.place(self.ids))


def vision_tower(visual: Any, make_pruner: MakePruner) -> Tower:
    """
    Raises:
        TypeError: naming the part that is not supported.
    """
    trunk = getattr(visual, "trunk", None)
    if isinstance(trunk, VisionTransformer):
        return TimmTower(trunk, make_pruner, [*visual.head.modules()])
    if trunk is not None or not hasattr(visual, "transformer"):
        raise TypeError(f"the image encoder is a {type(trunk or visual).__name__}; supported are vision transformers")
    if visual.pool_type != "tok" or visual.attn_pool is not None or visual.output_tokens:
        raise TypeError("the image encoder does not pool by its class token alone (pool_type 'tok')")
    norm: dict[str, Any] = {"once" if visual.final_ln_after_pool else "each": [visual.ln_post]}
    norm["once"] = [*norm.get("once", []), visual.proj]
    return OpenClipTower("vision", visual.transformer, make_pruner, patches=[visual.conv1], first=[visual.ln_pre], **norm)


def text_tower(text: Any, make_pruner: MakePruner) -> TextTower:
    """
    Raises:
        TypeError: naming the part that is not supported.
    """
    hint = "give images alone, to prune the image encoder alone"
    if not hasattr(text, "token_embedding"):
        raise TypeError(f"the text encoder is a {type(text).__name__}, which is not supported; {hint}")
    pool = getattr(text, "text_pool_type", getattr(text, "pool_type", "argmax"))  # CLIP has its text encoder's parts itself
    place = PLACES.get(pool)
    if pool == "eos":
        place = partial(end_place, text.text_eos_id if hasattr(text, "text_eos_id") else text.eos_id)
    if place is None or (text.attn_mask is None and pool != "last"):
        raise TypeError(f"the text encoder reads its tokens by {pool!r}, which is not supported; {hint}")
    if getattr(text, "cls_emb", None) is not None or getattr(text, "use_pad_mask", False):
        raise TypeError(f"the text encoder masks its tokens by their ids, which is not supported; {hint}")
    return TextTower(text, place, make_pruner, each=[text.ln_final], once=[text.text_projection])


def towers(model: Any, make_pruner: MakePruner, wanted: Callable[[str], bool]) -> list[Tower]:
    found = [vision_tower(model.visual, make_pruner)] if wanted("vision") else []
    return found + ([text_tower(getattr(model, "text", model), make_pruner)] if wanted("language") else [])


def reads_text(batch: Batch) -> bool:
    return "text" in batch if isinstance(batch, Mapping) else not isinstance(batch, Tensor) and len(batch) > 1


def call(model: Any, batch: Batch) -> Any:
    """Runs the model on images and texts, or its image encoder on images alone."""
    if isinstance(batch, Tensor):
        return model.encode_image(batch)
    return model(**batch) if isinstance(batch, Mapping) else model(*batch)
