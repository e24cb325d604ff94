"""Pruning CLIP, SigLIP, SigLIP 2 and DINOv2 of transformers: each encoder's stack of layers runs pruned."""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from madtp.packing import Valid
from madtp.patch.base import Batch, MakePruner, Pruning, Tower, end_place, highest_place, last_place
from madtp.patch.layers import WrappedBlock, pool_flops
from madtp.pruning import TokenPruner

LEGACY_END = 2  # an end-of-text id of CLIP's older configurations, which means the highest id


class HuggingFaceBlock(WrappedBlock):
    """A layer of CLIP, SigLIP or BLIP's image encoder, whose projections may be one linear layer."""

    def __init__(self, layer: Any, pruner: TokenPruner, causal: bool = False):
        super().__init__(layer, pruner)
        attention = layer.self_attn
        self.num_heads, self.width = attention.num_heads, attention.embed_dim
        self.attention_dropout = getattr(attention.dropout, "p", attention.dropout)
        self.causal = "class_last" if causal else None

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.layer.layer_norm1, self.layer.layer_norm2

    def project(self, x: Tensor) -> Sequence[Tensor]:
        attention = self.layer.self_attn
        if hasattr(attention, "qkv"):
            return attention.qkv(x).chunk(3, dim=-1)
        return attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        attention = self.layer.self_attn
        return (attention.projection if hasattr(attention, "qkv") else attention.out_proj)(attended)

    @property
    def attention_layers(self) -> list[nn.Module | Tensor | None]:
        return [layer for layer in self.layer.self_attn.modules() if isinstance(layer, nn.Linear)]


class DinoBlock(WrappedBlock):
    """A layer of DINOv2."""

    def __init__(self, layer: Any, pruner: TokenPruner):
        super().__init__(layer, pruner, (layer.drop_path, layer.drop_path))
        heads = getattr(layer.attention, "attention", layer.attention)  # nested in older versions of transformers
        self.num_heads = heads.num_attention_heads
        self.maps = [getattr(heads, name, None) or getattr(heads, old) for name, old in MAPS.items()]
        self.width = self.maps[0].out_features
        self.attention_dropout = getattr(heads, "dropout_prob", getattr(heads, "attention_dropout", 0.0))
        output = getattr(layer.attention, "output", None)
        self.last = nn.Sequential(output.dense, output.dropout) if output is not None else layer.attention.o_proj

    @property
    def norms(self) -> tuple[nn.Module, nn.Module]:
        return self.layer.norm1, self.layer.norm2

    @property
    def scales(self) -> tuple[nn.Module, nn.Module]:
        return self.layer.layer_scale1, self.layer.layer_scale2

    def project(self, x: Tensor) -> Sequence[Tensor]:
        return [linear(x) for linear in self.maps]

    def output(self, attended: Tensor, x: Tensor) -> Tensor:
        return self.last(attended)

    @property
    def attention_layers(self) -> list[nn.Module | Tensor | None]:
        return [*self.maps, *self.last.modules()]


MAPS = {"q_proj": "query", "k_proj": "key", "v_proj": "value"}


class StackTower(Tower):
    """An encoder whose stack of layers is replaced: the layers before and behind it stay the model's own.

    While it prunes, the encoder's last_hidden_state has only the tokens that are left, padded to the longest sample; `valid` marks
    them.
    """

    def __init__(
        self, name: str, encoder: nn.Module, stack: nn.Module, blocks: Sequence[Any], pool: Any = None, **layers: Any
    ):
        """
        Args:
            encoder: calls the stack, and knows the arguments that the user gave.
            stack: runs the layers.
            pool: attention pooling of the tokens that are left; None for a class token.
            layers: see `Tower`.
        """
        super().__init__(name, stack, blocks, **layers)
        self.encoder, self.pool = encoder, pool
        self.arguments: dict[str, Any] = {}  # of the encoder's running forward pass
        self.hooks.append((encoder, self._see))

    def attach(self, pruning: Pruning) -> None:
        super().attach(pruning)
        if self.pool is not None:
            self.pool.forward = partial(self._pool)

    def detach(self) -> None:
        super().detach()
        if self.pool is not None:
            del self.pool.forward

    def _see(self, encoder: nn.Module, inputs: tuple, options: dict[str, Any]) -> None:
        self.arguments = inspect.signature(type(encoder).forward).bind_partial(encoder, *inputs, **options).arguments

    def mask(self) -> Valid:
        """Returns the mask of the tokens that enter, (B, N); None where nothing is padded."""
        mask = self.arguments.get("pixel_attention_mask", self.arguments.get("attention_mask"))
        return None if mask is None or bool(mask.all()) else mask.bool()

    def forward(self, inputs_embeds: Tensor, *inputs: Any, **options: Any) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.padded(*self.run(inputs_embeds, self.mask())))

    def _pool(self, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        head = self.pool
        if not self.pruning.is_on:
            options = {} if attention_mask is None else {"attention_mask": attention_mask}
            return type(head).forward(head, hidden_state, **options)
        probe, padding = head.probe.expand(len(hidden_state), -1, -1), None if self.valid is None else ~self.valid
        pooled = head.attention(probe, hidden_state, hidden_state, key_padding_mask=padding, need_weights=False)[0]
        return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]

    def flops(self, unpruned: bool = False) -> Tensor:
        total, head = super().flops(unpruned), self.pool
        if head is None:
            return total
        last = (self.last().unpruned() if unpruned else self.last()).leaving[-1].cpu()
        return total + pool_flops(head.attention, last, [head.layernorm, *head.mlp.modules()])


class TextTower(StackTower):
    """A text encoder that reads one token, which goes first: the end of the text in CLIP, the last place in SigLIP.

    While it prunes, the encoder's last_hidden_state has this token at its place and zeros elsewhere.
    """

    def __init__(
        self, encoder: nn.Module, stack: nn.Module, blocks: Sequence[Any], place: Callable[[Tensor], Tensor], **layers: Any
    ):
        """
        Args:
            place: input ids (B, L) -> the place of the token that is read, (B,).
        """
        super().__init__("language", encoder, stack, blocks, **layers)
        self.place = place

    def forward(self, inputs_embeds: Tensor, *inputs: Any, **options: Any) -> BaseModelOutput:
        """
        Raises:
            ValueError: when the attention mask hides tokens that the encoder would prune among.
        """
        end, mask = self.place(self.arguments["input_ids"].view(-1, inputs_embeds.shape[1])), self.arguments.get("attention_mask")
        if mask is not None:
            seen = torch.arange(mask.shape[1], device=mask.device) <= end.unsqueeze(1)
            if bool((seen & (mask == 0)).any()):
                raise ValueError("a pruned text encoder takes no attention mask that hides tokens before the one that it reads")
        return BaseModelOutput(last_hidden_state=self.run_to(inputs_embeds, end))


def holder(model: nn.Module, norm: str) -> Any | None:
    """Finds the module that runs a stack of layers, called encoder, and a norm of this name; None if there is none."""
    found = (module for module in model.modules() if hasattr(module, norm) and hasattr(module, "encoder"))
    return next(found, None)


def vision_tower(model: nn.Module, make_pruner: MakePruner, norm_of_all: bool = False) -> StackTower | None:
    """norm_of_all: the last norm is applied to all tokens, and not to the one that is read alone."""
    encoder = holder(model, "post_layernorm")
    if encoder is None:
        return None
    embeddings, dim = encoder.embeddings, encoder.post_layernorm.normalized_shape[0]
    pool = getattr(encoder, "head", None)
    prefix = int(hasattr(embeddings, "class_embedding"))
    if not prefix and pool is None:
        raise TypeError(f"{type(encoder).__name__} has neither a class token nor a pooling head, and returns all its tokens")
    blocks = [HuggingFaceBlock(layer, make_pruner(dim, prefix)) for layer in encoder.encoder.layers]
    first = [encoder.pre_layrnorm] if hasattr(encoder, "pre_layrnorm") else []
    norm_of_all = norm_of_all or pool is not None
    each, once = ([encoder.post_layernorm], []) if norm_of_all else ([], [encoder.post_layernorm])
    once.append(getattr(model, "visual_projection", None))
    patches = [embeddings.patch_embedding]
    return StackTower("vision", encoder, encoder.encoder, blocks, pool, patches=patches, first=first, each=each, once=once)


def text_tower(model: nn.Module, make_pruner: MakePruner) -> TextTower | None:
    encoder = holder(model, "final_layer_norm")
    if encoder is None:
        return None
    reads_last = isinstance(getattr(encoder, "head", None), nn.Linear)  # SigLIP
    dim = encoder.final_layer_norm.normalized_shape[0]
    blocks = [HuggingFaceBlock(layer, make_pruner(dim), causal=not reads_last) for layer in encoder.encoder.layers]
    end_id = encoder.config.eos_token_id
    place = last_place if reads_last else highest_place if end_id == LEGACY_END else partial(end_place, end_id)
    once = [getattr(encoder, "head", None), getattr(model, "text_projection", None)]
    return TextTower(encoder, encoder.encoder, blocks, place, each=[encoder.final_layer_norm], once=once)


def dino_tower(model: Any, make_pruner: MakePruner) -> StackTower:
    dim, patches = model.layernorm.normalized_shape[0], [model.embeddings.patch_embeddings.projection]
    blocks = [DinoBlock(layer, make_pruner(dim)) for layer in model.encoder.layer]
    return StackTower("vision", model, model.encoder, blocks, patches=patches, each=[model.layernorm])


def check_layers(model: PreTrainedModel, towers: Iterable[Tower]) -> None:
    """
    Raises:
        TypeError: for what the blocks would leave out.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        raise TypeError("the model recomputes activations; call gradient_checkpointing_disable() first")
    for tower in towers:
        for index, block in enumerate(tower.blocks):
            if not isinstance(block.norms[0], nn.LayerNorm):
                raise TypeError(f"block {index} has a {type(block.norms[0]).__name__}; supported is LayerNorm")


def towers(model: PreTrainedModel, make_pruner: MakePruner, wanted: Callable[[str], bool]) -> list[Tower]:
    if type(model).__name__.startswith("Dinov2"):
        found: list[Tower | None] = [dino_tower(model, make_pruner)]
    else:
        found = [vision_tower(model, make_pruner) if wanted("vision") else None]
        found += [text_tower(model, make_pruner) if wanted("language") else None]
    built = [tower for tower in found if tower is not None]
    check_layers(model, built)
    return built


def reads_text(batch: Batch) -> bool:
    return isinstance(batch, Mapping) and "input_ids" in batch


def call(model: PreTrainedModel, batch: Batch) -> Any:
    """Runs the model, or the one encoder that the batch is for."""
    batch = batch if isinstance(batch, Mapping) else {"pixel_values": batch}
    alone = getattr(model, "get_image_features" if "pixel_values" in batch else "get_text_features", None)
    return (model if alone is None or {"pixel_values", "input_ids"} <= batch.keys() else alone)(**batch)
