"""BLIP for captioning: a pruned image encoder, and a decoder that writes what it sees.

Shapes: B images, L text tokens, K learnable tokens, D their width.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from madtp.alignment import Alignment, Valid, aligned_features, similarity_loss, token_attention
from madtp.flops import GIGA
from madtp.pruning import OFF, Layout, PruneSetting
from models.bert import BertSize
from models.decoder import IGNORED, decoder_flops, generation_flops, text_decoder, written_lengths
from madtp.blocks import AlignedModel, TowerRecord, dense_record, padded
from models.vit import VisionTransformer

REFERENCE_TEXT_TOKENS = 15  # of the caption with which the paper counts 65.72 GFLOPs
REPETITION_PENALTY = 1.1  # of words already drawn, where captions are sampled


@dataclass
class CaptionOutput:
    """losses: "task", of the next tokens, the prompt's left out, and with alignment features "similarity"; logits (B, L, words)."""

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
        return self.text_decoder

    @property
    def depth(self) -> int:
        """Blocks that prune: how far `prune_from` can be raised."""
        return self.visual_encoder.depth

    def encode(self, images: Tensor, setting: PruneSetting, align: bool, packed: bool) -> tuple[Tensor, Layout, TowerRecord]:
        """images (B, 3, H, W) -> padded tokens (B, M, C), their mask or None, record."""
        tokens, layout, record = self.visual_encoder(images, self.learnable_tokens, setting, align, packed)
        return *padded(tokens, layout), record

    def forward(
        self,
        images: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        setting: PruneSetting = OFF,
        align: bool = False,
        packed: bool = False,
    ) -> CaptionOutput:
        """
        Args:
            images (B, 3, H, W); input_ids, attention_mask (B, L): the captions, the prompt in front, [DEC] first, [SEP] last.
            align: whether to collect the alignment features; the decoder's are read from what enters its layers.
            packed: the image encoder without padding and attention maps; the same answer, sooner.
        """
        *image, record = self.encode(images, setting, align, packed)
        output = self.tell(*image, input_ids, attention_mask, align)
        losses = {"task": output.loss}
        if align:
            language = self._aligned(output.hidden_states[:-1], attention_mask)
            losses["similarity"] = similarity_loss(record.features, language)
        return CaptionOutput(losses, output.logits, record)

    def tell(self, tokens: Tensor, valid: Valid, input_ids: Tensor, attention_mask: Tensor, hidden_states: bool = False):
        """The decoder's output, its loss that of the next tokens, for captions of images encoded before: their tokens (B, M, C),
        and the mask (B, M) or None."""
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

    def _aligned(self, entering: tuple[Tensor, ...], attention_mask: Tensor) -> Tensor:
        """E_l of the tokens that enter the decoder's layers (Eq. 3), [DEC] left out, summed over the layers. (B, K, D)"""
        valid, features = attention_mask[:, 1:].bool(), []
        for alignment, tokens in zip(self.decoder_alignment, entering, strict=True):
            products, mapped = alignment(tokens[:, 1:], self.learnable_tokens)
            features.append(aligned_features(token_attention(products, alignment.token_dim, valid), mapped))
        return sum(features)

    @torch.no_grad()
    def generate(
        self,
        images: Tensor,
        setting: PruneSetting = OFF,
        packed: bool = False,
        num_beams: int = 3,
        max_length: int = 20,
        min_length: int = 5,
        top_p: float | None = None,
        seed: int = 0,
    ) -> tuple[Tensor, TowerRecord]:
        """Captions as token ids (B, L), prompt included, and the record of the image encoder.

        Args:
            num_beams: of beam search.
            max_length, min_length: in tokens, the prompt included.
            top_p: write by nucleus sampling instead, each word drawn from the likeliest that hold this share.
            seed: of sampling; a batch's captions depend on it, and not on what was drawn before.
        """
        tokens, valid, record = self.encode(images, setting, False, packed)
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

    def generation_gflops(self, record: TowerRecord, ids: Tensor, num_beams: int, setting: PruneSetting = OFF) -> Tensor:
        """GFLOPs of captions as `generate` wrote them with so many beams, the image encoder's included. (B,) float64"""
        lengths = written_lengths(ids, self.end)
        source = record.leaving[-1].to(ids.device)
        decoder = generation_flops(self.text_decoder, len(self.prompt), lengths, num_beams, source)
        return (self.visual_encoder.flops(record, setting).to(ids.device) + decoder).double() / GIGA

    def traced(self, *inputs: Tensor, setting: PruneSetting = OFF) -> Tensor:
        """What a tracer sees of a sample: the logits of `forward`."""
        return self(*inputs, setting).logits

    def costs(self, *inputs: Tensor, setting: PruneSetting = OFF, packed: bool = False) -> tuple[dict[str, Tensor], Tensor]:
        """GFLOPs of each image with its teacher-forced caption by module, and together; writing one is `generation_gflops`."""
        images, _, attention_mask = inputs
        by_module = self.gflops_by_module(self.encode(images, setting, False, packed)[2], attention_mask.sum(dim=1), setting)
        return by_module, sum(by_module.values())

    def gflops_by_module(self, vision: TowerRecord, text_tokens: Tensor, setting: PruneSetting = OFF) -> dict[str, Tensor]:
        """GFLOPs of images with captions of so many tokens, (B,) float64."""
        encoder = self.visual_encoder.flops(vision, setting).to(text_tokens.device)  # a packed record is on the CPU
        decoder = decoder_flops(self.text_decoder, text_tokens, vision.leaving[-1].to(text_tokens.device))
        return {"visual_encoder": encoder.double() / GIGA, "text_decoder": decoder.double() / GIGA}

    def reference_gflops(self) -> float:
        """GFLOPs of the uncompressed model by the paper's convention: an image and a caption of 15 tokens. No data needed."""
        record = dense_record(self.visual_encoder.depth, self.visual_encoder.pos_embed.shape[1], samples=1)
        return float(sum(self.gflops_by_module(record, torch.tensor([REFERENCE_TEXT_TOKENS])).values()))
