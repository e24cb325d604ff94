"""Pruning BLIP of transformers: its image encoder, and its text encoder with cross-attention to the image tokens that are left.

The text decoders of captioning and question answering run unpruned on what the encoders leave.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

from madtp import flops
from madtp.attention.attend import attend
from madtp.blocks import PrunedBlock
from madtp.importance import AttentionStatistics
from madtp.packing import Layout, Valid, count_tokens, pack
from madtp.patch.base import Batch, MakePruner, Tower
from madtp.patch.layers import layers_flops
from madtp.patch.transformers import check_layers, reads_text, vision_tower
from madtp.pruning import TokenPruner
from madtp.rule import PruningRule


class BlipTextBlock(PrunedBlock):
    """A layer of BLIP's text encoder: self-attention, pruning, cross-attention, MLP, each followed by its norm."""

    def __init__(self, layer: Any, pruner: TokenPruner):
        super().__init__()
        self.layer, self.pruner = layer, pruner
        self.num_heads = layer.attention.self.num_attention_heads

    @property
    def norms(self) -> tuple[nn.Module]:
        return (self.layer.attention.output.LayerNorm,)

    @property
    def key_dim(self) -> int:
        return self.layer.attention.self.attention_head_size

    def _attended(
        self, part: Any, x: Tensor, source: Tensor, layout: Layout, source_layout: Layout, rule: PruningRule | None
    ) -> tuple[Tensor, AttentionStatistics | None]:
        heads, training = part.self, self.layer.training
        query, key, value = heads.query(x), heads.key(source), heads.value(source)
        dropout = heads.dropout.p if training else 0.0
        out, statistics = attend(query, key, value, self.num_heads, layout, source_layout, dropout, rule, training=training)
        return part.output(out, x), statistics

    def attend(self, x: Tensor, layout: Layout, rule: PruningRule | None) -> tuple[Tensor, AttentionStatistics | None]:
        return self._attended(self.layer.attention, x, x, layout, layout, rule)

    def transform(self, x: Tensor, layout: Layout, *context: Any) -> Tensor:
        """context: image tokens, padded or packed as x is, and their layout; nothing for a text alone."""
        if context:
            x, _ = self._attended(self.layer.crossattention, x, context[0], layout, context[1], None)
        return self.layer.feed_forward_chunk(x)

    def _cost(self, part: Any, queries: Tensor, keys: Tensor) -> Tensor:
        heads = part.self
        total = layers_flops([heads.query, *part.output.modules()], queries) + layers_flops([heads.key, heads.value], keys)
        return total + flops.attention(queries, keys, heads.all_head_size)

    def attend_flops(self, tokens: Tensor) -> Tensor:
        return self._cost(self.layer.attention, tokens, tokens)

    def transform_flops(self, tokens: Tensor, *context: Any) -> Tensor:
        total = layers_flops([self.layer.intermediate.dense, *self.layer.output.modules()], tokens)
        return total + self._cost(self.layer.crossattention, tokens, context[0]) if context else total


class BlipTextTower(Tower):
    """BLIP's text encoder."""

    def __init__(self, encoder: Any, make_pruner: MakePruner, images: Tower | None, **layers: Any):
        """
        Args:
            encoder: a BlipTextModel.
            images: the pruned image encoder whose tokens it reads; None for one that is whole.
        """
        blocks = [BlipTextBlock(layer, make_pruner(encoder.config.hidden_size)) for layer in encoder.encoder.layer]
        super().__init__("language", encoder.encoder, blocks, **layers)
        self.images = images
        self.mask: Valid = None  # of the text tokens that enter
        self.image_tokens: Tensor | None = None  # (B,) of the last pass
        self.hooks.append((encoder, self._see))

    def _see(self, encoder: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        mask = options.get("attention_mask", inputs[1] if len(inputs) > 1 else None)
        self.mask = None if mask is None or bool(mask.all()) else mask.bool()

    def forward(self, hidden_states: Tensor, *inputs: Any, encoder_hidden_states: Tensor | None = None, **options: Any) -> Any:
        context: tuple[Any, ...] = ()
        self.image_tokens = None
        if encoder_hidden_states is not None:
            context = encoder_hidden_states, None if self.images is None else self.images.valid
            context = pack(*context) if self.pruning.packed else context
            self.image_tokens = count_tokens(*context)
        x, left = self.run(hidden_states, self.mask, *context)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=self.padded(x, left))

    def context_tokens(self, unpruned: bool) -> tuple[object, ...]:
        if self.image_tokens is None:
            return ()
        return (self.images.last().entering[0] if unpruned and self.images is not None else self.image_tokens,)


def read(tower: Tower, model: Any) -> None:
    """Lets a text model that stays whole read what a tower leaves of its tokens, without the padding.

    The cross-attentions of transformers' BLIP drop the mask that the model is given.
    """
    for layer in model.encoder.layer:
        tower.hooks.append((layer.crossattention.self, partial(mask_padding, tower)))


def mask_padding(
    tower: Tower, attention: nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Gives a cross-attention the mask of its keys, as a hook before its forward pass."""
    if not tower.pruning.is_on or tower.valid is None:
        return None
    x: Tensor = inputs[0] if inputs else options["hidden_states"]
    valid = tower.valid.repeat_interleave(len(x) // len(tower.valid), dim=0)[:, None, None]  # beams are neighbours
    mask = torch.zeros_like(valid, dtype=x.dtype).masked_fill_(~valid, torch.finfo(x.dtype).min)
    return inputs, options | {"encoder_attention_mask": mask}


__all__ = ["call", "reads_text", "towers"]


def towers(model: Any, make_pruner: MakePruner, wanted: Callable[[str], bool]) -> list[Tower]:
    images = vision_tower(model, make_pruner, norm_of_all=True) if wanted("vision") else None
    encoder, decoder, texts = getattr(model, "text_encoder", None), getattr(model, "text_decoder", None), None
    if encoder is not None and wanted("language"):
        once = [getattr(model, "itm_head", None)]
        texts = BlipTextTower(encoder, make_pruner, images, first=[encoder.embeddings.LayerNorm], once=once)
    if images is not None and encoder is not None and texts is None:
        read(images, encoder)
    source = images if encoder is None else texts  # an answer is decoded from its question, a caption from its image
    if source is not None and decoder is not None:
        read(source, decoder.bert)
    built: list[Tower] = [tower for tower in (images, texts) if tower is not None]
    check_layers(model, built)
    return built


def call(model: Any, batch: Batch) -> Any:
    """Runs the encoders of the model: the image encoder, and the text encoder where there is one and the batch has texts."""
    batch = batch if isinstance(batch, Mapping) else {"pixel_values": batch}
    images = getattr(model, "vision_model", model)(pixel_values=batch["pixel_values"])[0]
    if "input_ids" not in batch or getattr(model, "text_encoder", None) is None:
        return images
    return model.text_encoder(
        input_ids=batch["input_ids"],
        attention_mask=batch.get("attention_mask"),
        encoder_hidden_states=images,
        encoder_attention_mask=torch.ones(images.shape[:2], dtype=torch.long, device=images.device),
    )[0]
