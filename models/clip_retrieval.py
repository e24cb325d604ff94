"""CLIP and SigLIP for image-text retrieval, trained with momentum encoders and queues."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import Clip, ClipSize, MakePruner
from clip.siglip import Siglip
from configs.schema import ClipRetrievalConfig
from madtp.blocks import UNPRUNED, Encoded, Guidance
from models.checkpointing import checkpoint_last
from models.momentum import MomentumModel, PairPasses, dense_encoded

MOMENTUM_PARTS = ("visual", "transformer", "token_embedding", "ln_final", "positional_embedding", "text_projection")
LARGEST_SCALE = math.log(100)  # of the similarities, as CLIP was trained
SLOW = "_m"


class ClipRetrieval(Clip, MomentumModel):
    def __init__(
        self,
        size: ClipSize,
        queue_size: int = 57600,
        momentum: float = 0.995,
        make_pruner: MakePruner = lambda dim, **options: None,
        learnable_tokens: tuple[int, int, float] | None = None,
        checkpoint_blocks: int = 0,
        make_text_pruner: MakePruner | None = None,
    ):
        """checkpoint_blocks: number of last image blocks that recompute their activations in the backward pass."""
        super().__init__(size, make_pruner, learnable_tokens, make_text_pruner=make_text_pruner)
        checkpoint_last(self.visual.transformer.resblocks, checkpoint_blocks)
        self.init_momentum(MOMENTUM_PARTS, size.embed_dim, queue_size, momentum)

    def pair_logits(self, vision: Tensor, language: Tensor) -> Tensor:
        """Returns the similarities (B, B) of the class tokens (B, C) behind the last blocks."""
        image = F.normalize(self.visual.project(vision).float(), dim=-1)
        text = F.normalize(self.project_text(self.ln_final(language), self.text_projection).float(), dim=-1)
        with torch.autocast(vision.device.type, enabled=False):  # a low temperature amplifies rounding errors
            return image @ text.t() / self.contrastive_temperature

    @property
    def contrastive_temperature(self) -> Tensor:
        """The contrastive temperature."""
        return (-self.logit_scale).exp()

    @torch.no_grad()
    def limit_contrastive_temperature(self) -> None:
        self.logit_scale.clamp_(max=LARGEST_SCALE)

    def encode_image(self, images: Tensor, guidance: Guidance = UNPRUNED, slow: bool = False) -> Encoded:
        """Encodes images (B, 3, H, W) into normalised features; `slow` uses the momentum encoder."""
        return _normalised(super().encode_image(images, guidance, SLOW if slow else ""))

    def encode_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        guidance: Guidance = UNPRUNED,
        slow: bool = False,
    ) -> Encoded:
        """Encodes texts (B, L) into normalised features. The mask is not used: the texts show where they end."""
        return _normalised(super().encode_text(input_ids, guidance, SLOW if slow else ""))

    def tower_flops(self, image: Encoded, text: Encoded) -> tuple[Tensor, Tensor]:
        """Counts the multiply-adds of both towers with their projections, (B,) each."""
        return self.visual.flops(image), self.text_flops(text)

    def dense_passes(self, text_tokens: int) -> PairPasses:
        image = dense_encoded(len(self.visual.transformer.resblocks), len(self.visual.positional_embedding))
        text = dense_encoded(len(self.transformer.resblocks), text_tokens)
        return PairPasses(image, text, image, text)


class SiglipRetrieval(ClipRetrieval, Siglip):
    """SigLIP in the place of CLIP: what `ClipRetrieval` asks of its base class, `Siglip` answers, which comes before `Clip`."""


FAMILIES = {"clip": ClipRetrieval, "siglip": SiglipRetrieval}  # by the key clip.family


def clip_size(config: ClipRetrievalConfig, words: int) -> ClipSize:
    """Returns the sizes of a config's model. words: of the tokenizer, the model's vocabulary unless the config has its number"""
    sizes = config.clip.model_dump()
    return ClipSize(image_size=config.image_size, **{**sizes, "vocab_size": sizes["vocab_size"] or words})


def _normalised(encoded: Encoded) -> Encoded:
    encoded.feature = F.normalize(encoded.feature.float(), dim=-1)
    return encoded
