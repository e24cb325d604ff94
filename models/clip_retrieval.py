"""CLIP for image-text retrieval, trained with momentum encoders and queues."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from clip.model import Clip, ClipSize, MakePruner
from madtp.pruning import OFF, PruneSetting
from models.momentum import MomentumModel, PairPasses, dense_encoded
from madtp.blocks import Encoded

MOMENTUM_PARTS = ("visual", "transformer", "token_embedding", "ln_final", "positional_embedding", "text_projection")
LARGEST_SCALE = math.log(100)  # of the similarities, as CLIP was trained
SLOW = "_m"


class ClipRetrieval(Clip, MomentumModel):
    def __init__(
        self,
        size: ClipSize,
        queue_size: int = 57600,
        momentum: float = 0.995,
        make_pruner: MakePruner = lambda dim: None,
        learnable_tokens: tuple[int, int, float] | None = None,
        checkpoint_blocks: int = 0,
    ):
        super().__init__(size, make_pruner, learnable_tokens, checkpoint_blocks=checkpoint_blocks)
        self.init_momentum(MOMENTUM_PARTS, size.embed_dim, queue_size, momentum)

    def pair_logits(self, vision: Tensor, language: Tensor) -> Tensor:
        """(B, B) from the class tokens (B, C) that the towers' blocks end with."""
        image = F.normalize((self.visual.ln_post(vision) @ self.visual.proj).float(), dim=-1)
        text = F.normalize((self.ln_final(language) @ self.text_projection).float(), dim=-1)
        with torch.autocast(vision.device.type, enabled=False):  # a low temperature makes much of little rounding
            return image @ text.t() / self.temperature

    @property
    def temperature(self) -> Tensor:
        """By which similarities are divided."""
        return (-self.logit_scale).exp()

    @torch.no_grad()
    def limit_temperature(self) -> None:
        self.logit_scale.clamp_(max=LARGEST_SCALE)

    def encode_image(
        self, images: Tensor, setting: PruneSetting = OFF, align: bool = False, packed: bool = False, slow: bool = False
    ) -> Encoded:
        """images (B, 3, H, W), features normalised; `slow`: by the momentum encoder."""
        return _normalised(super().encode_image(images, setting, align, packed, SLOW if slow else ""))

    def encode_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        setting: PruneSetting = OFF,
        align: bool = False,
        packed: bool = False,
        slow: bool = False,
    ) -> Encoded:
        """input_ids (B, L), features normalised; no mask is needed: the end-of-text token tells where a text ends."""
        return _normalised(super().encode_text(input_ids, setting, align, packed, SLOW if slow else ""))

    def tower_flops(self, image: Encoded, text: Encoded, setting: PruneSetting) -> tuple[Tensor, Tensor]:
        """Multiply-adds of both towers with their projections, (B,) each."""
        return self.visual.flops(image, setting), self.text_flops(text, setting)

    def dense_passes(self, text_tokens: int) -> PairPasses:
        image = dense_encoded(len(self.visual.transformer.resblocks), len(self.visual.positional_embedding))
        text = dense_encoded(len(self.transformer.resblocks), text_tokens)
        return PairPasses(image, text, image, text)


def _normalised(encoded: Encoded) -> Encoded:
    encoded.feature = F.normalize(encoded.feature.float(), dim=-1)
    return encoded
