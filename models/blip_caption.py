"""BLIP for captioning: an image encoder that prunes, and a text decoder.

B images, M image tokens, L text tokens, K learnable tokens, D their channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.alignment import Alignment, aligned_features, alignment_loss, token_attention
from madtp.blocks import UNPRUNED, AlignedModel, Guidance, TowerRecord, dense_record
from madtp.flops import GIGA
from madtp.packing import Packed, Valid, padded
from models.bert import BertSize
from models.decoder import (
    IGNORED,
    decode_packed,
    decoder_flops,
    generation_flops,
    packed_next_tokens,
    predicting,
    text_decoder,
    written_lengths,
)
from models.vit import VisionTransformer

REFERENCE_TEXT_TOKENS = 15  # of the caption with which the paper counts 65.72 GFLOPs
REPETITION_PENALTY = 1.1  # of words already drawn, where captions are sampled


@dataclass
class CaptionOutput:
    """losses: "task", of the next tokens, the prompt's left out, and with alignment features "similarity"
    logits: (B, L, words); of a packed pass (P, words), of the P tokens alone that predict a next one
    """

    losses: dict[str, Tensor]
    logits: Tensor
    vision: TowerRecord


class BlipCaption(AlignedModel):
    def __init__(
        self,
        visual_encoder: VisionTransformer,
        size: BertSize,
        prompt: list[int],
        end: int,
        padding: int,
        label_smoothing: float = 0.1,
        learnable_tokens: tuple[int, int, float] | None = None,
        projection: str = "auto",
    ):
        """
        Args:
            prompt: ids that every caption begins with, [DEC] first.
            end, padding: ids of [SEP] and [PAD].
            learnable_tokens: number K, width D and initial std of the tokens that both modalities share; None without pruners.
            projection: as of `Alignment`, for the decoder's layers.
        """
        super().__init__()
        self.visual_encoder = visual_encoder
        self.text_decoder = text_decoder(size, visual_encoder.embed_dim, label_smoothing, prompt[0], end, padding)
        self.prompt, self.end, self.padding = prompt, end, padding
        self.init_learnable_tokens(learnable_tokens)
        self.decoder_alignment = None
        if learnable_tokens is not None:
            token_dim, layers = learnable_tokens[1], range(size.num_hidden_layers)
            self.decoder_alignment = nn.ModuleList(Alignment(size.hidden_size, token_dim, projection) for _ in layers)

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        return {"vision": self.visual_encoder.blocks}  # the decoder has no class token

    @property
    def answer_head(self) -> nn.Module:
        return self.text_decoder.cls

    def encode(self, images: Tensor, guidance: Guidance = UNPRUNED) -> tuple[Tensor, Valid, TowerRecord]:
        """Encodes images (B, 3, H, W) into padded tokens (B, M, C), their mask or None, and the record."""
        tokens, layout, record = self.visual_encoder(images, self.guided(guidance))
        return *padded(tokens, layout), record

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        guidance: Guidance = UNPRUNED,
    ) -> CaptionOutput:
        """Computes the losses of captions.

        With `align`, the decoder's alignment features are read from the tokens that enter its layers.

        Args:
            images: (B, 3, H, W).
            input_ids, attention_mask: (B, L), the captions behind their prompt, [DEC] first, [SEP] last.
        """
        tokens, layout, record = self.visual_encoder(images, self.guided(guidance))
        if isinstance(layout, Packed):
            loss, logits, entering = self._decode_packed(tokens, layout, input_ids, attention_mask, guidance.align)
        else:
            output = self.decode(tokens, layout, input_ids, attention_mask, guidance.align)
            loss, logits, entering = output.loss, output.logits, output.hidden_states[:-1] if guidance.align else ()
        losses = {"task": loss}
        if guidance.align:
            language = self._aligned(entering, attention_mask)
            groups = torch.arange(len(language), device=language.device)
            losses["similarity"] = alignment_loss(record.features, language, groups, guidance.negatives)
        return CaptionOutput(losses, logits, record)

    def _decode_packed(
        self, tokens: Tensor, layout: Packed, input_ids: Tensor, attention_mask: Tensor, hidden_states: bool
    ) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """Returns the next-token loss, the logits, and with `hidden_states` the tokens that enter each layer, padded (B, L, C).

        tokens: (T, C), with their layout. The last token of each caption predicts nothing and is read for `hidden_states` alone.
        """
        says = predicting(attention_mask, len(self.prompt))
        read = attention_mask.bool() if hidden_states else predicting(attention_mask)
        states, texts = decode_packed(self.text_decoder, input_ids, read, tokens, layout)
        logits, losses = packed_next_tokens(self.text_decoder, input_ids, says, states[-1], texts)
        entering = [F.pad(texts.pad(x), (0, 0, 0, input_ids.shape[1] - texts.longest)) for x in states[:-1] if hidden_states]
        return losses.sum() / len(logits), logits, entering

    def decode(self, tokens: Tensor, valid: Valid, input_ids: Tensor, attention_mask: Tensor, hidden_states: bool = False):
        """Returns the decoder's output, with the next-token loss, for captions of encoded images.

        tokens: (B, M, C); valid: their mask (B, M), or None
        """
        targets = input_ids.masked_fill(attention_mask == 0, IGNORED)
        targets[:, : len(self.prompt)] = IGNORED
        return self.text_decoder(
            input_ids,
            attention_mask=attention_mask,
            encoder_hidden_states=tokens,
            encoder_attention_mask=None if valid is None else valid.long(),
            labels=targets,
            output_hidden_states=hidden_states,
        )

    def _aligned(self, entering: Sequence[Tensor], attention_mask: Tensor) -> Tensor:
        """Sums E_l (B, K, D) of the tokens that enter the decoder's layers (Eq. 3) over the layers; [DEC] is left out."""
        valid, features = attention_mask[:, 1:].bool(), []
        for alignment, tokens in zip(self.decoder_alignment, entering, strict=True):
            products, mapped = alignment(tokens[:, 1:], self.learnable_tokens)
            features.append(aligned_features(token_attention(products, alignment.token_dim, valid), mapped))
        return sum(features)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        guidance: Guidance = UNPRUNED,
        num_beams: int = 3,
        max_length: int = 20,
        min_length: int = 5,
        top_p: float | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, TowerRecord]:
        """Writes captions; returns token ids (B, L), prompt included, and the record of the image encoder.

        Args:
            num_beams: width of beam search.
            max_length, min_length: in tokens, prompt included.
            top_p: sample from the most likely words of this total probability instead of beam search.
            seed: of sampling, so that captions do not depend on earlier random numbers.
        """
        tokens, valid, record = self.encode(images, guidance)
        valid = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device) if valid is None else valid
        prompt = torch.tensor(self.prompt, device=tokens.device).expand(len(tokens), -1)
        how = {"do_sample": False, "num_beams": num_beams}
        if top_p is not None:
            # By itself transformers would draw from 50 words at most, in some versions; the penalty is BLIP's.
            how = {"do_sample": True, "top_p": top_p, "top_k": 0, "repetition_penalty": REPETITION_PENALTY}
        with torch.random.fork_rng([tokens.device] if tokens.device.type == "cuda" else []):
            torch.manual_seed(seed)
            ids = self.text_decoder.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                encoder_hidden_states=tokens,
                encoder_attention_mask=valid.long(),
                max_length=max_length,
                min_length=min_length,
                eos_token_id=self.end,
                pad_token_id=self.padding,
                **how,
            )
        return ids, record

    def generation_gflops(self, record: TowerRecord, ids: Tensor, num_beams: int) -> Tensor:
        """Returns the GFLOPs of writing the captions `ids` with `num_beams`, image encoder included, (B,) float64."""
        lengths = written_lengths(ids, self.end)
        source = record.leaving[-1].to(ids.device)
        decoder = generation_flops(self.text_decoder, len(self.prompt), lengths, num_beams, source)
        return (self.visual_encoder.flops(record).to(ids.device) + decoder).double() / GIGA

    def traced(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> Tensor:
        """Returns the logits of `forward`, the single tensor that a tracer can follow."""
        return self(*inputs, guidance).logits

    def costs(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the GFLOPs of each image with its teacher-forced caption by module, and their sum. inputs: as for `forward`.

        Writing a caption costs `generation_gflops`.
        """
        images, _, attention_mask = inputs
        by_module = self.gflops_by_module(self.encode(images, guidance)[2], attention_mask.sum(dim=1))
        return by_module, sum(by_module.values())

    def gflops_by_module(self, vision: TowerRecord, text_tokens: Tensor) -> dict[str, Tensor]:
        """Returns the GFLOPs of images with captions of `text_tokens` (B,), float64."""
        encoder = self.visual_encoder.flops(vision).to(text_tokens.device)  # a packed record is on the CPU
        decoder = decoder_flops(self.text_decoder, text_tokens, vision.leaving[-1].to(text_tokens.device))
        return {"visual_encoder": encoder.double() / GIGA, "text_decoder": decoder.double() / GIGA}

    def reference_gflops(self) -> float:
        """Returns the GFLOPs of the uncompressed model by the paper's convention, a caption of 15 tokens. Needs no data."""
        record = dense_record(self.visual_encoder.depth, self.visual_encoder.pos_embed.shape[1], samples=1)
        return float(sum(self.gflops_by_module(record, torch.tensor([REFERENCE_TEXT_TOKENS])).values()))
