"""BLIP for image-text retrieval: contrastive features of images and texts, and a matching head that reads them together.

B pairs of an image and a text, S texts, L text tokens, E channels of the common space, K learnable tokens, D their channels.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.blocks import UNPRUNED, Encoded, Guidance, TowerRecord, dense_record
from madtp.flops import GIGA, linear
from madtp.packing import Layout, Packed, class_tokens, concatenate, count_tokens, pack, select
from madtp.rule import OFF, PruneSetting
from models.bert import TextEncoder
from models.momentum import MomentumModel, PairPasses, dense_encoded, hard_negatives
from models.vit import VisionTransformer
from utils import gather_padded, gather_tensors

TEMPERATURES = (0.001, 0.5)  # range of the learned contrastive temperature
START_TEMPERATURE = 0.07


@dataclass
class MatchingPasses(PairPasses):
    """The outputs of a training step with matching: B pairs, then, unless R is 0, R negatives with another image or another text.

    logits: (B + 2 R, 2) of the matching head, class 1 is a match
    targets: (B + 2 R,)
    matching: the text's record of each matching pass, and the number of image tokens that each text read
    """

    logits: Tensor
    targets: Tensor
    matching: list[tuple[TowerRecord, Tensor]]


class BlipRetrieval(MomentumModel):
    def __init__(
        self,
        visual_encoder: VisionTransformer,
        text_encoder: TextEncoder,
        enc_token: int,
        embed_dim: int = 256,
        queue_size: int = 57600,
        momentum: float = 0.995,
        negative_all_rank: bool = True,
        learnable_tokens: tuple[int, int, float] | None = None,
        padded_to: int = 0,
    ):
        """
        Args:
            enc_token: id of [ENC], the first token of a text that is read with an image.
            embed_dim: channels E of the common space.
            negative_all_rank: draw negatives from the batches of all processes, not only from the own one.
            learnable_tokens: number K, width D and initial std of the tokens that all towers share; None without pruners.
            padded_to: pad texts to this length, for the authors' formulas (`variant: released`), in which padding takes part.
        """
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        self.vision_proj = nn.Linear(visual_encoder.embed_dim, embed_dim)
        self.text_proj = nn.Linear(text_encoder.hidden_size, embed_dim)
        self.itm_head = nn.Linear(text_encoder.hidden_size, 2)
        self.temp = nn.Parameter(torch.tensor(START_TEMPERATURE))
        self.enc_token, self.negative_all_rank, self.padded_to = enc_token, negative_all_rank, padded_to
        self.init_learnable_tokens(learnable_tokens)
        self.init_momentum(("visual_encoder", "text_encoder", "vision_proj", "text_proj"), embed_dim, queue_size, momentum)

    def pair_logits(self, vision: Tensor, language: Tensor) -> Tensor:
        """Returns the similarities (B, B) of the class tokens (B, C) behind the last blocks."""
        image = F.normalize(self.vision_proj(self.visual_encoder.norm(vision)).float(), dim=-1)
        text = F.normalize(self.text_proj(language).float(), dim=-1)
        with torch.autocast(vision.device.type, enabled=False):  # a low temperature amplifies rounding errors
            return image @ text.t() / self.contrastive_temperature

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        return {"vision": self.visual_encoder.blocks, "language": self.text_encoder.encoder.layer}

    @property
    def contrastive_temperature(self) -> Tensor:
        """The contrastive temperature."""
        return self.temp

    @torch.no_grad()
    def limit_contrastive_temperature(self) -> None:
        self.temp.clamp_(*TEMPERATURES)

    def encode_image(self, images: Tensor, guidance: Guidance = UNPRUNED, slow: bool = False) -> Encoded:
        """Encodes images (B, 3, H, W); `slow` uses the momentum encoder."""
        encoder, project = (self.visual_encoder_m, self.vision_proj_m) if slow else (self.visual_encoder, self.vision_proj)
        tokens, layout, record = encoder(images, self.guided(guidance))
        return Encoded(tokens, layout, F.normalize(project(class_tokens(tokens, layout)).float(), dim=-1), record)

    def encode_text(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        guidance: Guidance = UNPRUNED,
        slow: bool = False,
    ) -> Encoded:
        """Encodes texts (S, L), [CLS] first; `slow` uses the momentum encoder."""
        encoder, project = (self.text_encoder_m, self.text_proj_m) if slow else (self.text_encoder, self.text_proj)
        tokens, layout, record = encoder(*self._padded(input_ids, attention_mask), (), self.guided(guidance))
        return Encoded(tokens, layout, F.normalize(project(class_tokens(tokens, layout)).float(), dim=-1), record)

    def match(
        self, input_ids: Tensor, attention_mask: Tensor, image: tuple[Tensor, Layout], setting: PruneSetting = OFF
    ) -> tuple[Tensor, TowerRecord]:
        """Matches texts with images: logits (S, 2), class 1 is a match; and the text encoder's record.

        The first S / B texts are read with the first image, and so on, or as many as the `readers` of a packed layout say.

        Args:
            input_ids, attention_mask: (S, L), [CLS] first, which is replaced by [ENC].
            image: image tokens of B samples with their layout; texts are packed when these are.
        """
        input_ids = torch.cat([torch.full_like(input_ids[:, :1], self.enc_token), input_ids[:, 1:]], dim=1)
        guidance = Guidance(setting, packed=isinstance(image[1], Packed), learnable_tokens=self.learnable_tokens)
        tokens, layout, record = self.text_encoder(*self._padded(input_ids, attention_mask), [image], guidance)
        with torch.autocast(tokens.device.type, enabled=False):  # the logits are added to similarities that differ by little
            return self.itm_head(class_tokens(tokens, layout).float()), record

    def _padded(self, *text: Tensor) -> tuple[Tensor, ...]:
        """Pads token ids and mask (S, L) with zeros to the length of the authors' code, if the model follows it."""
        return tuple(F.pad(part, (0, max(0, self.padded_to - part.shape[1]))) for part in text)

    def passes(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        image_ids: Tensor | None = None,
        guidance: Guidance = UNPRUNED,
    ) -> MatchingPasses:
        """Runs the passes of any pair model, then the matching of the pairs and of negatives.

        Without `image_ids`, for counting what a step costs, each pair also stands for its negatives, so that its cost does not
        depend on the other pairs.
        """
        pair = super().passes(images, input_ids, attention_mask, image_ids, guidance)
        image, text = (pair.image.tokens, pair.image.layout), (input_ids, attention_mask)
        logits, record = self.match(*text, image, guidance.setting)
        matching = [(record, count_tokens(*image))]
        others, rows, negative_image, negative_text = self._negatives(pair, image, text, image_ids)
        if len(rows):
            two_images = concatenate(select(*others[0], negative_image), select(*image, rows))
            two_texts = [_stacked(own[rows], other[negative_text]) for own, other in zip(text, others[1], strict=True)]
            negative, record = self.match(*two_texts, two_images, guidance.setting)
            logits = torch.cat([logits, negative])
            matching.append((record, count_tokens(*two_images)))
        targets = torch.arange(len(logits), device=logits.device) < len(input_ids)
        return MatchingPasses(**vars(pair), logits=logits, targets=targets.long(), matching=matching)

    def _negatives(self, pair: PairPasses, image: tuple[Tensor, Layout], text: tuple[Tensor, ...], image_ids: Tensor | None):
        """Draws negatives.

        Returns:
            the images with their layout and the texts to draw from; the R pairs that have negatives; and for each of these the
            index of a negative image and of a negative text.
        """
        own = torch.arange(len(text[0]), device=text[0].device)
        if image_ids is None:
            return (image, text), own, own, own
        others, ids = (image, text), image_ids
        image_features, text_features = pair.image.feature, pair.text.feature
        if self.negative_all_rank:
            others = gather_samples(*image), [gather_padded(part) for part in text]
            with torch.no_grad():
                ids, image_features, text_features = map(gather_tensors, (ids, image_features, text_features))
        negative_image = hard_negatives(pair.text.feature, image_features, image_ids, ids, self.temp)
        negative_text = hard_negatives(pair.image.feature, text_features, image_ids, ids, self.temp)
        rows = own[negative_image >= 0]  # a pair without a negative image has no negative text either
        return others, rows, negative_image[rows], negative_text[rows]

    def losses(self, passes: MatchingPasses, image_ids: Tensor, alpha: float, negatives: bool = False) -> dict[str, Tensor]:
        matching = F.cross_entropy(passes.logits.float(), passes.targets)
        return {"matching": matching, **super().losses(passes, image_ids, alpha, negatives)}

    def tower_flops(self, image: Encoded, text: Encoded) -> tuple[Tensor, Tensor]:
        """Counts the multiply-adds of both towers with their projections, (B,) each."""
        vision = self.visual_encoder.flops(image.record) + self.vision_proj.weight.numel()
        return vision, self.text_encoder.flops(text.record, ()) + self.text_proj.weight.numel()

    def dense_passes(self, text_tokens: int) -> MatchingPasses:
        image = dense_encoded(self.visual_encoder.depth, self.visual_encoder.pos_embed.shape[1])
        text = dense_encoded(self.text_encoder.depth, text_tokens)
        two = dense_record(self.text_encoder.depth, text_tokens, samples=2)
        read = image.record.leaving[-1]
        matching = [(text.record, read), (two, read.expand(2))]
        return MatchingPasses(image, text, image, text, logits=torch.empty(0), targets=torch.empty(0), matching=matching)

    def gflops_by_module(self, passes: MatchingPasses) -> dict[str, Tensor]:
        pairs, negatives = (self.matching_gflops(*each) for each in passes.matching)
        own_text, own_image = negatives.chunk(2)
        return {**super().gflops_by_module(passes), "matching": pairs + own_text + own_image}

    def deployment_gflops(self, passes: MatchingPasses) -> Tensor:
        return super().deployment_gflops(passes) + self.matching_gflops(*passes.matching[0])

    def matching_gflops(self, record: TowerRecord, read: Tensor) -> Tensor:
        """Returns the GFLOPs of `match` from its record and the (S,) image tokens that its texts read, (S,) float64."""
        cost = self.text_encoder.flops(record, [read]) + linear(1, self.text_encoder.hidden_size, 2)
        return cost.double() / GIGA


def gather_samples(x: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """Gathers the samples of all processes, in the order of the ranks, into one batch; gradients flow back to each process."""
    if not dist.is_initialized():
        return x, layout
    if isinstance(layout, Packed):  # padding holds tokens of other samples, and no gradient may reach them through it
        padded = layout.pad(x) * layout.valid.unsqueeze(-1)
        return pack(gather_padded(padded), gather_padded(layout.valid.byte()).bool())
    valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if layout is None else layout
    return gather_padded(x), gather_padded(valid.byte()).bool()


def _stacked(first: Tensor, second: Tensor) -> Tensor:
    """Joins two batches of texts, (R, L) and (R, L') with L' >= L; padding is 0."""
    return torch.cat([F.pad(first, (0, second.shape[1] - first.shape[1])), second])
