"""The parts of a model that are exported, each as a module from tensors to tensors with constant shapes but for the batch.

B batch, N image tokens, C their channels, L text tokens, E channels of the common space.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.blocks import Encoded, Guidance, run_blocks
from madtp.flops import GIGA
from madtp.packing import class_tokens, end_first
from madtp.rule import PruneSetting
from models.blip_nlvr import BlipNlvr, per_sentence
from models.clip_retrieval import ClipRetrieval
from models.vit import VisionTransformer
from tasks.task import Inputs
from utils import UserError

IMAGE_ENCODER, TEXT_ENCODER, MODEL = "image_encoder", "text_encoder", "model"


@dataclass(frozen=True)
class Part:
    """A part of a model.

    name: of its file
    module: `inputs` -> a tuple of `outputs`, all by name
    select: a task's inputs -> this part's
    gflops: inputs and setting -> the GFLOPs of each sample, (B,)
    """

    name: str
    module: nn.Module
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    select: Callable[[Inputs], Inputs]
    gflops: Callable[[Inputs, PruneSetting], Tensor]


class ImageTokens(nn.Module):
    """BLIP's image encoder: images (B, 3, H, W) -> tokens (B, N, C)."""

    def __init__(self, encoder: VisionTransformer, guidance: Guidance):
        super().__init__()
        self.encoder, self.guidance = encoder, guidance

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(images, self.guidance)[0],)


class ImageFeature(ImageTokens):
    """BLIP's image encoder for retrieval: also the normalised feature (B, E)."""

    def __init__(self, encoder: VisionTransformer, projection: nn.Linear, guidance: Guidance):
        super().__init__(encoder, guidance)
        self.projection = projection

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (tokens,) = super().forward(images)
        return tokens, F.normalize(self.projection(class_tokens(tokens, None)), dim=-1)


class ClipImage(nn.Module):
    """CLIP's image tower: images (B, 3, H, W) -> normalised features (B, E)."""

    def __init__(self, tower: nn.Module, guidance: Guidance):
        super().__init__()
        self.tower, self.guidance = tower, guidance

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (F.normalize(self.tower(images, self.guidance).feature, dim=-1),)


class ClipText(nn.Module):
    """CLIP's text tower: token ids (B, L), padded to a constant length -> normalised features (B, E)."""

    def __init__(self, model: ClipRetrieval, guidance: Guidance):
        super().__init__()
        self.embedding, self.norm, self.blocks = model.token_embedding, model.ln_final, model.transformer.resblocks
        self.position, self.projection = model.positional_embedding, model.text_projection
        self.guidance = guidance

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        length = input_ids.shape[1]
        x, layout = end_first(self.embedding(input_ids) + self.position[:length], input_ids.argmax(dim=1), length)
        x, layout, _ = run_blocks(self.blocks, x, layout, self.guidance)
        return (F.normalize(class_tokens(self.norm(x), layout) @ self.projection, dim=-1),)


class Nlvr(nn.Module):
    """The whole BLIP-NLVR: images (B, 2, 3, H, W), token ids and mask (B, L) -> logits (B, 2)."""

    def __init__(self, model: BlipNlvr, guidance: Guidance):
        super().__init__()
        self.model, self.guidance = model, guidance

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.model(images, input_ids, attention_mask, self.guidance).logits,)


def parts_of(task: str, model: nn.Module, setting: PruneSetting, length: int, names: Sequence[str] = ()) -> list[Part]:
    """Returns the parts of a task's model in evaluation mode.

    Args:
        setting: at which the blocks prune, or off.
        length: tokens that texts are padded to.
        names: of the parts wanted; those that the task uses by default, if empty.
    Raises:
        UserError: when the task has no such part.
    """
    guidance = Guidance(setting, learnable_tokens=model.learnable_tokens)
    if task == "nlvr":
        known, default = {MODEL: nlvr_part, IMAGE_ENCODER: image_part}, (MODEL,)
    elif task == "retrieval_clip":
        known, default = {IMAGE_ENCODER: clip_image_part, TEXT_ENCODER: clip_text_part}, (IMAGE_ENCODER, TEXT_ENCODER)
    else:
        known, default = {IMAGE_ENCODER: retrieval_image_part if task == "retrieval" else image_part}, (IMAGE_ENCODER,)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--parts {unknown[0]}: task {task!r} has no such part; choose from {', '.join(known)}")
    if getattr(model, "text_guides", False) and setting.temperature is not None and IMAGE_ENCODER in (names or default):
        raise UserError("guide: text prunes an image by its text; an image encoder alone cannot be exported")
    return [known[name](model, guidance, length) for name in names or default]


def image_part(model: nn.Module, guidance: Guidance, length: int) -> Part:
    """BLIP's image encoder of NLVR2, VQA or captioning. The two images of a pair are two samples."""
    encoder = model.visual_encoder

    def select(inputs: Inputs) -> Inputs:
        images = inputs[0]
        return (images.flatten(0, 1) if images.dim() == 5 else images,)

    def gflops(inputs: Inputs, setting: PruneSetting) -> Tensor:
        return encoder.flops(encoder(*inputs, replace(guidance, setting=setting))[2]).double() / GIGA

    return Part(IMAGE_ENCODER, ImageTokens(encoder, guidance), ("images",), ("tokens",), select, gflops)


def retrieval_image_part(model: nn.Module, guidance: Guidance, length: int) -> Part:
    """The online image encoder of BLIP's retrieval with its projection; the momentum encoders only serve training."""
    part, projection = image_part(model, guidance, length), model.vision_proj

    def gflops(inputs: Inputs, setting: PruneSetting) -> Tensor:
        return part.gflops(inputs, setting) + projection.weight.numel() / GIGA

    module = ImageFeature(model.visual_encoder, projection, guidance)
    return replace(part, module=module, outputs=("tokens", "feature"), gflops=gflops)


def clip_image_part(model: ClipRetrieval, guidance: Guidance, length: int) -> Part:
    def gflops(inputs: Inputs, setting: PruneSetting) -> Tensor:
        return model.visual.flops(model.encode_image(*inputs, Guidance(setting))).double() / GIGA

    return Part(IMAGE_ENCODER, ClipImage(model.visual, guidance), ("images",), ("feature",), lambda given: given[:1], gflops)


def clip_text_part(model: ClipRetrieval, guidance: Guidance, length: int) -> Part:
    def gflops(inputs: Inputs, setting: PruneSetting) -> Tensor:
        encoded: Encoded = model.encode_text(*inputs, None, Guidance(setting))
        return model.text_flops(encoded).double() / GIGA

    def select(inputs: Inputs) -> Inputs:
        return (padded_to(inputs[1], length),)

    return Part(TEXT_ENCODER, ClipText(model, guidance), ("input_ids",), ("feature",), select, gflops)


def nlvr_part(model: BlipNlvr, guidance: Guidance, length: int) -> Part:
    def gflops(inputs: Inputs, setting: PruneSetting) -> Tensor:
        return model.gflops(model(*inputs, Guidance(setting)))

    def select(inputs: Inputs) -> Inputs:
        images, *text = inputs
        return per_sentence(images, len(text[0])), *(padded_to(part, length) for part in text)

    return Part(MODEL, Nlvr(model, guidance), ("images", "input_ids", "attention_mask"), ("logits",), select, gflops)


def padded_to(text: Tensor, length: int) -> Tensor:
    """Pads token ids or a mask (B, L) with zeros to the length of an exported file.

    Raises:
        UserError: when a text is longer.
    """
    if text.shape[1] > length:
        raise UserError(f"a text of {text.shape[1]} tokens is longer than the exported {length}; export with --text-tokens")
    return F.pad(text, (0, length - text.shape[1]))


def longest_text(batches: Iterable[Inputs]) -> int:
    """Returns the tokens of the longest text; 1 where there are none."""
    return max((part.shape[1] for inputs in batches for part in inputs[1:2]), default=1)


def first_samples(inputs: Sequence[Inputs], number: int) -> Inputs:
    """Returns the first samples of several batches of a part's inputs as one batch."""
    return tuple(torch.cat(parts)[:number] for parts in zip(*inputs, strict=True))
