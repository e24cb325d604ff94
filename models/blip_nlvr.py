"""BLIP for NLVR2: does a sentence hold for a pair of images?

Shapes: B pairs of images, S sentences (S / B neighbours about each pair), L text tokens, K learnable tokens, D their width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madtp.alignment import similarity_loss
from madtp.flops import GIGA, linear
from madtp.packing import class_tokens
from madtp.pruning import OFF, PruneSetting
from models.bert import TextEncoder
from madtp.blocks import AlignedModel, TowerRecord, dense_record, halves
from models.vit import VisionTransformer


@dataclass
class NlvrOutput:
    """logits (S, 2), class 1 is True; one record a tower (images: 2 * B, left first); similarity: L_sim, None without alignment
    features."""

    logits: Tensor
    vision: TowerRecord
    language: TowerRecord
    similarity: Tensor | None = None


class BlipNlvr(AlignedModel):
    def __init__(
        self,
        visual_encoder: VisionTransformer,
        text_encoder: TextEncoder,
        learnable_tokens: tuple[int, int, float] | None = None,
    ):
        """
        Args:
            learnable_tokens: number K, width D and initial std of the tokens that both towers share; None without pruners.
        """
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        width = text_encoder.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.init_learnable_tokens(learnable_tokens)

    @property
    def answer_head(self) -> nn.Module:
        return self.cls_head

    @property
    def depth(self) -> int:
        """Blocks of the deeper tower: how far `prune_from` can be raised."""
        return max(self.visual_encoder.depth, self.text_encoder.depth)

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        setting: PruneSetting = OFF,
        align: bool = False,
        packed: bool = False,
    ) -> NlvrOutput:
        """
        Args:
            images: (B, 2, 3, H, W), left and right.
            input_ids, attention_mask: (S, L), [ENC] first.
            setting: how hard to prune.
            align: whether to collect the alignment features that L_sim compares.
            packed: without padding and attention maps, for inference; the same answer, sooner.
        """
        tokens, layout, vision = self.visual_encoder(
            images.transpose(0, 1).flatten(0, 1), self.learnable_tokens, setting, align, packed
        )
        text, layout, language = self.text_encoder(
            input_ids, attention_mask, halves(tokens, layout), self.learnable_tokens, setting, align, packed
        )
        similarity = None
        if vision.features is not None:  # the mean of the two images' with the sentence's
            left, right = vision.features.chunk(2)
            similarity = similarity_loss(per_sentence((left + right) / 2, len(language.features)), language.features)
        return NlvrOutput(self.cls_head(class_tokens(text, layout)), vision, language, similarity)

    def tokens_kept(self, output: NlvrOutput) -> Tensor:
        """Tokens of both images and the sentence after the last block, (S,)."""
        left, right = output.vision.leaving[-1].chunk(2)
        text = output.language.leaving[-1]
        return per_sentence(left + right, len(text)) + text

    def traced(self, *inputs: Tensor, setting: PruneSetting = OFF) -> Tensor:
        """What a tracer sees of a sample: the logits of `forward`."""
        return self(*inputs, setting).logits

    def costs(self, *inputs: Tensor, setting: PruneSetting = OFF, packed: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """GFLOPs of each sample by module, and in deployment, which is the same here, of inputs as `forward` takes them."""
        by_module = self.gflops_by_module(self(*inputs, setting, packed=packed), setting)
        return by_module, sum(by_module.values())

    def gflops(self, output: NlvrOutput, setting: PruneSetting = OFF, training: bool = False) -> Tensor:
        """GFLOPs of each sentence with its two images, (S,) float64, closed form at true lengths."""
        return sum(self.gflops_by_module(output, setting, training).values())

    def gflops_by_module(self, output: NlvrOutput, setting: PruneSetting = OFF, training: bool = False) -> dict[str, Tensor]:
        left, right = self.visual_encoder.flops(output.vision, setting, training).chunk(2)
        sentences = len(output.language.entering[0])
        both = per_sentence(left + right, sentences)
        image_tokens = [per_sentence(half, sentences) for half in output.vision.leaving[-1].chunk(2)]
        text = self.text_encoder.flops(output.language, image_tokens, setting, training)
        width = self.text_encoder.hidden_size
        head = torch.full_like(text, linear(1, width, width) + linear(1, width, 2))
        parts = {"visual_encoder": both, "text_encoder": text, "cls_head": head}
        return {name: part.double() / GIGA for name, part in parts.items()}


def per_sentence(values: Tensor, sentences: int) -> Tensor:
    """(B, ...) of the pairs -> (S, ...), each pair's value for every sentence about it."""
    return values.repeat_interleave(sentences // len(values), dim=0)


REFERENCE_TEXT_TOKENS = 36  # of the sentence with which the paper counts 132.54 GFLOPs


def reference_gflops(model: BlipNlvr) -> float:
    """GFLOPs of the uncompressed model by the paper's convention: two whole images, 36 text tokens. No data needed."""
    vision = dense_record(model.visual_encoder.depth, model.visual_encoder.pos_embed.shape[1], samples=2)
    language = dense_record(model.text_encoder.depth, REFERENCE_TEXT_TOKENS, samples=1)
    return float(model.gflops(NlvrOutput(torch.empty(0), vision, language)))
