"""BLIP for NLVR2: decides whether a sentence is true of a pair of images.

B pairs of images, S sentences (S / B neighbouring ones about each pair), L text tokens.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from madtp.alignment import alignment_loss
from madtp.blocks import UNPRUNED, AlignedModel, Guidance, TowerRecord, dense_record
from madtp.flops import GIGA, linear
from madtp.packing import class_tokens, halves
from models.bert import TextEncoder
from models.vit import VisionTransformer

REFERENCE_TEXT_TOKENS = 36  # of the sentence for which the paper counts 132.54 GFLOPs


@dataclass
class NlvrOutput:
    """logits: (S, 2), class 1 is True
    vision, language: records of the towers; vision of 2 * B images, all left ones first
    similarity: L_sim, None without alignment features
    """

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
        text_guides: bool = False,
    ):
        """
        Args:
            learnable_tokens: number K, width D and initial std of the tokens that both towers share; None without pruners.
            text_guides: prune the images for each sentence anew, guided by its words (see `TextEncoder.guides`), beyond the paper.
        """
        super().__init__()
        self.text_guides = text_guides
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        width = text_encoder.hidden_size
        self.cls_head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
        self.init_learnable_tokens(learnable_tokens)

    @property
    def answer_head(self) -> nn.Module:
        return self.cls_head

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        return {"vision": self.visual_encoder.blocks, "language": self.text_encoder.encoder.layer}

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor, guidance: Guidance = UNPRUNED) -> NlvrOutput:
        """Judges sentences about pairs of images.

        Args:
            images: (B, 2, 3, H, W), left and right.
            input_ids, attention_mask: (S, L), [ENC] first.
        """
        guidance = seeing = self.guided(guidance)
        if self.text_guides and guidance.is_on:
            images = per_sentence(images, len(input_ids))
            guides = self.text_encoder.guides(input_ids, attention_mask, guidance.learnable_tokens)
            seeing = replace(guidance, learnable_tokens=guides.repeat(2, 1, 1))
        tokens, layout, vision = self.visual_encoder(images.transpose(0, 1).flatten(0, 1), seeing)
        text, layout, language = self.text_encoder(input_ids, attention_mask, halves(tokens, layout), guidance)
        similarity = None
        if vision.features is not None:  # the mean of both images against the sentence
            left, right = vision.features.chunk(2)
            pairs = per_sentence(torch.arange(len(left), device=left.device), len(language.features))
            similarity = alignment_loss(((left + right) / 2)[pairs], language.features, pairs, guidance.negatives)
        return NlvrOutput(self.cls_head(class_tokens(text, layout)), vision, language, similarity)

    def tokens_kept(self, output: NlvrOutput) -> Tensor:
        """Counts the tokens of both images and the sentence after the last block, (S,)."""
        left, right = output.vision.leaving[-1].chunk(2)
        text = output.language.leaving[-1]
        return per_sentence(left + right, len(text)) + text

    def traced(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> Tensor:
        """Returns the logits of `forward`, the single tensor that a tracer can follow."""
        return self(*inputs, guidance).logits

    def costs(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the GFLOPs of each sample by module, and in deployment, which is their sum. inputs: as for `forward`."""
        by_module = self.gflops_by_module(self(*inputs, guidance))
        return by_module, sum(by_module.values())

    def gflops(self, output: NlvrOutput) -> Tensor:
        """Returns the GFLOPs of each sentence with its two images, (S,) float64, in closed form at true lengths."""
        return sum(self.gflops_by_module(output).values())

    def gflops_by_module(self, output: NlvrOutput) -> dict[str, Tensor]:
        left, right = self.visual_encoder.flops(output.vision).chunk(2)
        sentences = len(output.language.entering[0])
        both = per_sentence(left + right, sentences)
        image_tokens = [per_sentence(half, sentences) for half in output.vision.leaving[-1].chunk(2)]
        text = self.text_encoder.flops(output.language, image_tokens)
        if self.text_guides and output.vision.is_guided:
            text = text + self.text_encoder.guide_flops(output.language.entering[0])
        width = self.text_encoder.hidden_size
        head = torch.full_like(text, linear(1, width, width) + linear(1, width, 2))
        parts = {"visual_encoder": both, "text_encoder": text, "cls_head": head}
        return {name: part.double() / GIGA for name, part in parts.items()}

    def reference_gflops(self) -> float:
        """Returns the GFLOPs of the uncompressed model by the paper's convention: two images, 36 text tokens. Needs no data."""
        vision = dense_record(self.visual_encoder.depth, self.visual_encoder.pos_embed.shape[1], samples=2)
        language = dense_record(self.text_encoder.depth, REFERENCE_TEXT_TOKENS, samples=1)
        return float(self.gflops(NlvrOutput(torch.empty(0), vision, language)))


def per_sentence(values: Tensor, sentences: int) -> Tensor:
    """Repeats each pair's value for every sentence about it. (B, ...) -> (S, ...)."""
    return values.repeat_interleave(sentences // len(values), dim=0)
