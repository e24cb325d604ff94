"""BLIP for visual question answering: image and question encoders that prune, and an answer decoder.

B questions, each with its image, L question tokens, A answers (those to the first question, then those to the next), M answer
tokens, W candidate answers, C channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.alignment import alignment_loss
from madtp.blocks import UNPRUNED, AlignedModel, Guidance, TowerRecord, dense_record
from madtp.flops import GIGA
from madtp.packing import Layout, pack, padded
from models.bert import BertSize, TextEncoder
from models.decoder import (
    IGNORED,
    decode_packed,
    decoder_flops,
    generation_flops,
    key_flops,
    log_likelihoods,
    packed_next_tokens,
    predicting,
    text_decoder,
    written_lengths,
)
from models.vit import VisionTransformer

QUESTIONS, QUESTION_TOKENS, ANSWERS, ANSWER_TOKENS = 32, 14, 47, 5  # for which the paper counts 186.12 GFLOPs
TOKENS_AT_A_TIME = 4096  # of candidates: each token has a logit for every word


@dataclass
class Question:
    """Encoded questions, as the decoder reads them.

    tokens, valid: (B, N, C) and their mask (B, N)
    vision, language: records of both encoders
    """

    tokens: Tensor
    valid: Tensor
    vision: TowerRecord
    language: TowerRecord


@dataclass
class VqaOutput:
    """answer_losses: (A,), summed over tokens
    similarity: L_sim, None without alignment features
    logits: (A, M, words); of a packed pass (P, words), of the P tokens alone that predict a next one
    """

    answer_losses: Tensor
    similarity: Tensor | None
    logits: Tensor
    question: Question


class BlipVqa(AlignedModel):
    def __init__(
        self,
        visual_encoder: VisionTransformer,
        text_encoder: TextEncoder,
        size: BertSize,
        start: int,
        end: int,
        padding: int,
        label_smoothing: float = 0.1,
        learnable_tokens: tuple[int, int, float] | None = None,
        reads_padding: bool = False,
        text_guides: bool = False,
    ):
        """
        Args:
            size: sizes of the answer decoder.
            start, end, padding: ids of [DEC], [SEP] and [PAD].
            learnable_tokens: number K, width D and initial std of the tokens that both encoders share; None without pruners.
            reads_padding: let the decoder attend to a question's padding, as the authors' code does (`variant: released`).
            text_guides: prune the image for each question anew, guided by its words (see `TextEncoder.guides`), beyond the paper.
        """
        super().__init__()
        self.text_guides = text_guides
        self.reads_padding = reads_padding
        self.visual_encoder = visual_encoder
        self.text_encoder = text_encoder
        self.text_decoder = text_decoder(size, text_encoder.hidden_size, label_smoothing, start, end, padding)
        self.start, self.end, self.padding = start, end, padding
        self.init_learnable_tokens(learnable_tokens)

    @property
    def answer_head(self) -> nn.Module:
        return self.text_decoder.cls

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        return {"vision": self.visual_encoder.blocks, "language": self.text_encoder.encoder.layer}

    def encode(self, images: Tensor, question_ids: Tensor, question_mask: Tensor, guidance: Guidance = UNPRUNED) -> Question:
        """Encodes questions with their images.

        Args:
            images: (B, 3, H, W).
            question_ids, question_mask: (B, L), [ENC] first.
        """
        seeing = self.guided(guidance)
        if self.text_guides and guidance.is_on:
            images = images.repeat_interleave(len(question_ids) // len(images), dim=0)
            guides = self.text_encoder.guides(question_ids, question_mask, seeing.learnable_tokens)
            seeing = replace(seeing, learnable_tokens=guides)
        seen = self.visual_encoder(images, seeing)
        return self.encode_question(seen, question_ids, question_mask, guidance)

    def encode_question(
        self,
        seen: tuple[Tensor, Layout, TowerRecord],
        question_ids: Tensor,
        question_mask: Tensor,
        guidance: Guidance = UNPRUNED,
    ) -> Question:
        """Encodes questions about encoded images, the output of the image encoder."""
        *image, vision = seen
        text, layout, language = self.text_encoder(question_ids, question_mask, [image], self.guided(guidance))
        text, valid = padded(text, layout)
        if valid is None or self.reads_padding:
            valid = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        return Question(text, valid, vision, language)

    def forward(
        self,
        images: Tensor,
        question_ids: Tensor,
        question_mask: Tensor,
        answer_ids: Tensor,
        answer_mask: Tensor,
        answer_counts: Tensor,
        guidance: Guidance = UNPRUNED,
    ) -> VqaOutput:
        """Computes the loss of each answer.

        Args:
            images, question_ids, question_mask: as for `encode`.
            answer_ids, answer_mask: (A, M), [DEC] first, [SEP] last.
            answer_counts: (B,) answers of each question; they sum to A.
        """
        question = self.encode(images, question_ids, question_mask, guidance)
        answer = self.answer_packed if guidance.packed else self.answer
        losses, logits = answer(question, answer_ids, answer_mask, answer_counts)
        similarity = None
        if guidance.align:
            vision, language = question.vision.features, question.language.features
            similarity = alignment_loss(vision, language, torch.arange(len(vision), device=vision.device), guidance.negatives)
        return VqaOutput(losses, similarity, logits, question)

    def answer(self, question: Question, answer_ids: Tensor, answer_mask: Tensor, answer_counts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the losses (A,) and logits (A, M, words) of given answers; arguments as for `forward`."""
        logits = self._decode(question, answer_ids, answer_mask, answer_counts).logits
        targets = answer_ids.masked_fill(answer_mask == 0, IGNORED)[:, 1:]
        return next_token_losses(logits, targets, self.text_decoder.label_smoothing), logits

    def answer_packed(
        self, question: Question, answer_ids: Tensor, answer_mask: Tensor, answer_counts: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Returns the same losses, and the logits (P, words) of the P tokens that predict a next one.

        Padding is left out, and so is the last token of each answer. All answers to a question share its keys and values.
        """
        answered = slice(0, len(answer_counts))
        source, layout = pack(question.tokens[answered], question.valid[answered])
        layout = replace(layout, readers=tuple(answer_counts.tolist()))
        says = predicting(answer_mask)
        states, texts = decode_packed(self.text_decoder, answer_ids, says, source, layout)
        logits, losses = packed_next_tokens(self.text_decoder, answer_ids, says, states[-1], texts)
        return losses, logits

    def _decode(self, question: Question, answer_ids: Tensor, answer_mask: Tensor, counts: Tensor | None = None):
        """Runs the decoder.

        counts: (B,) answers to each question, or (1,): all to the first question, whose keys and values they share; None: one each
        """
        which = slice(None) if counts is None else slice(0, 1)
        if counts is not None and len(counts) > 1:
            which = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=len(answer_ids))
        return self.text_decoder(
            answer_ids,
            attention_mask=answer_mask,
            encoder_hidden_states=question.tokens[which],
            encoder_attention_mask=question.valid[which].long(),
            use_cache=False,
        )

    @torch.no_grad()
    def rank(self, question: Question, answer_ids: Tensor, answer_mask: Tensor, number: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ranks, for each question, the `number` candidates that are most likely by their first token.

        They are ranked by the training loss, as in BLIP: with label smoothing every further token costs a little.

        Args:
            answer_ids, answer_mask: (W, M), [DEC] first, [SEP] last.

        Returns:
            (B, n) indices of candidates, the best first, their losses and their log-likelihoods; n is at most W.
        """
        start = answer_ids[:1, :1].expand(len(question.tokens), 1)
        first = self._decode(question, start, torch.ones_like(start)).logits[:, 0].float().softmax(dim=-1)
        # Stable, unlike `topk`: many candidates share their first token.
        likely = first[:, answer_ids[:, 1]].argsort(dim=1, descending=True, stable=True)[:, :number]
        lengths = answer_mask.sum(dim=1)
        nodes = 1 + (lengths[likely] - 2).sum(dim=1).max()
        at_a_time = max(1, TOKENS_AT_A_TIME // int(nodes))
        parts = zip(likely.split(at_a_time), question.tokens.split(at_a_time), question.valid.split(at_a_time), strict=True)
        scores = [log_likelihoods(self.text_decoder, answer_ids[part], lengths[part], *read) for part, *read in parts]
        likelihoods, means = (torch.cat(each) for each in zip(*scores, strict=True))
        smoothing = self.text_decoder.label_smoothing
        losses, order = ((smoothing - 1) * likelihoods - smoothing * means).sort(dim=1, stable=True)
        return likely.gather(1, order), losses, likelihoods.gather(1, order)

    def ranking_gflops(self, source: Tensor, tokens: Tensor) -> Tensor:
        """Returns the GFLOPs of `rank` for questions of `source` (B,) tokens with candidates of `tokens` (B, n), (B,) float64."""
        first = decoder_flops(self.text_decoder, torch.ones_like(source), source)
        return (first + decoder_flops(self.text_decoder, 1 + (tokens - 2).sum(dim=1), source)).double() / GIGA

    @torch.no_grad()
    def generate(self, question: Question, num_beams: int = 3, max_length: int = 10) -> tuple[Tensor, Tensor]:
        """Writes answers by beam search; returns token ids (B, M), [DEC] first, and the GFLOPs (B,) of writing them."""
        start = torch.full((len(question.tokens), 1), self.start, device=question.tokens.device)
        ids = self.text_decoder.generate(
            start,
            attention_mask=torch.ones_like(start),
            encoder_hidden_states=question.tokens,
            encoder_attention_mask=question.valid.long(),
            max_length=max_length,
            min_length=1,
            num_beams=num_beams,
            do_sample=False,
            eos_token_id=self.end,
            pad_token_id=self.padding,
        )
        return ids, self.writing_gflops(question.valid.sum(dim=1), ids, num_beams)

    def writing_gflops(self, source: Tensor, ids: Tensor, num_beams: int) -> Tensor:
        """Returns the GFLOPs of writing answers (B, M) by `generate` to questions of `source` (B,) tokens, (B,) float64."""
        return generation_flops(self.text_decoder, 1, written_lengths(ids, self.end), num_beams, source).double() / GIGA

    def encoding_gflops(self, question: Question) -> Tensor:
        """Returns the GFLOPs of `encode` for each question with an image of its own, (B,) float64."""
        vision, patches = self.visual_encoder.flops(question.vision), question.vision.leaving[-1]
        total = vision + self._text_flops(question, patches)
        return total.to(question.valid.device).double() / GIGA

    def traced(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> Tensor:
        """Returns the logits of `forward`, the single tensor that a tracer can follow."""
        return self(*inputs, guidance).logits

    def costs(self, *inputs: Tensor, guidance: Guidance = UNPRUNED) -> tuple[dict[str, Tensor], Tensor]:
        """Returns the GFLOPs of each image with its questions and teacher-forced answers by module, and their sum.

        Answering costs `encoding_gflops` and `ranking_gflops` or `writing_gflops`. inputs: as for `forward`.
        """
        images, question_ids, question_mask, _, answer_mask, answer_counts = inputs
        question = self.encode(images, question_ids, question_mask, guidance)
        by_module = self.gflops_by_module(question, answer_mask.sum(dim=1), answer_counts, len(images))
        return by_module, sum(by_module.values())

    def gflops_by_module(self, question: Question, answer_tokens: Tensor, answer_counts: Tensor, images: int) -> dict[str, Tensor]:
        """Returns the GFLOPs of images, (I,) float64; keys and values that several texts read are counted once.

        Args:
            images: I.
            question: of Q questions, Q / I about each image.
            answer_tokens: (A,); answer_counts (Q,), or (1,) where all answers are to the first question of a single image.
        """
        vision = self.visual_encoder.flops(question.vision)
        patches, passes = question.vision.leaving[-1], len(vision)
        each = len(question.valid) // passes
        text = self._text_flops(question, patches.repeat_interleave(each))
        text = text.unflatten(0, (passes, each)).sum(dim=1) - (each - 1) * self._key_flops(patches)
        vision, text = (part.unflatten(0, (images, -1)).sum(dim=1) for part in (vision, text))
        source = question.valid[: len(answer_counts)].sum(dim=1)
        answers = decoder_flops(self.text_decoder, answer_tokens, source.repeat_interleave(answer_counts))
        decoder = torch.zeros_like(source).index_add_(
            0, torch.arange(len(source), device=source.device).repeat_interleave(answer_counts), answers
        )
        if len(answer_counts) == 1:
            decoder = decoder - (answer_counts - 1) * self._question_key_flops(source)
        decoder = decoder.unflatten(0, (images, -1)).sum(dim=1)
        vision, text = vision.to(decoder.device), text.to(decoder.device)  # packed records are on the CPU
        parts = {"visual_encoder": vision, "text_encoder": text, "text_decoder": decoder}
        return {name: part.double() / GIGA for name, part in parts.items()}

    def _text_flops(self, question: Question, patches: Tensor) -> Tensor:
        """Counts the multiply-adds of the question encoder, whose cross-attentions read `patches` (Q,) image tokens, (Q,)."""
        total = self.text_encoder.flops(question.language, [patches])
        if self.text_guides and question.vision.is_guided:
            total = total + self.text_encoder.guide_flops(question.language.entering[0])
        return total

    def _key_flops(self, patches: Tensor) -> Tensor:
        """Counts the multiply-adds of an image's keys and values in all cross-attentions."""
        return key_flops(self.text_encoder.encoder.layer, patches)

    def _question_key_flops(self, source: Tensor) -> Tensor:
        """Counts the same in the decoder, for questions of `source` (B,) tokens."""
        return key_flops(self.text_decoder.bert.encoder.layer, source)

    def reference_gflops(self) -> float:
        """Returns the GFLOPs of the uncompressed model by the paper's convention. Needs no data.

        The convention is unusual: a training step with one image, 32 questions of 14 tokens that all read it, and 47 answers of 5
        tokens that all belong to the first question.
        """
        image = dense_record(self.visual_encoder.depth, self.visual_encoder.pos_embed.shape[1], samples=1)
        text = dense_record(self.text_encoder.depth, QUESTION_TOKENS, samples=QUESTIONS)
        question = Question(torch.empty(0), torch.ones(QUESTIONS, QUESTION_TOKENS, dtype=torch.bool), image, text)
        answers = torch.full((ANSWERS,), ANSWER_TOKENS), torch.tensor([ANSWERS])
        return float(sum(self.gflops_by_module(question, *answers, images=1).values()))


def one_sample(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Returns the first question with its answers from the inputs of `BlipVqa.forward`."""
    *question, answer_ids, answer_mask, counts = inputs
    return *(part[:1] for part in question), answer_ids[: counts[0]], answer_mask[: counts[0]], counts[:1]


def single_answers(inputs: tuple[Tensor, ...]) -> Iterator[tuple[Tensor, ...]]:
    """Yields each question with its first answer from these inputs, without padding."""
    images, *texts, counts = inputs
    *question, answer_ids, answer_mask = texts
    firsts = counts.cumsum(dim=0) - counts
    rows = zip(images, *question, answer_ids[firsts], answer_mask[firsts], strict=True)
    for image, question_ids, question_mask, ids, mask in rows:
        asked, said = question_mask.bool(), mask.bool()
        text = question_ids[None, asked], question_mask[None, asked], ids[None, said], mask[None, said]
        yield image[None], *text, torch.ones_like(counts[:1])


def weighted_loss(losses: Tensor, weights: Tensor, questions: int) -> Tensor:
    """Returns the loss of a batch per question: its answers' losses (A,), weighted by the share of annotators who gave them."""
    return (weights * losses).sum() / questions


def next_token_losses(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Returns the next-token losses summed over each text, (A,), from logits (A, M, words) and targets (A, M - 1)."""
    return F.cross_entropy(
        logits[:, :-1].transpose(1, 2).float(),
        targets,
        ignore_index=IGNORED,
        label_smoothing=label_smoothing,
        reduction="none",
    ).sum(dim=1)
