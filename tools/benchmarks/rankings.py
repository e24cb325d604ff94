"""The ranking tasks of tools/benchmark.py: an uncompressed model scores the same candidates in different ways.

Images and questions are encoded beforehand. Weights and texts are random, with text lengths distributed as in public data sets.
`methods` of a ranking takes the inputs of one image or question, to measure the GFLOPs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.schema import RetrievalConfig, VqaConfig
from data.captions import Split
from madtp.blocks import Encoded, Guidance, TowerRecord
from madtp.flops import GIGA
from madtp.packing import Layout, count_tokens, select
from madtp.rule import PruneSetting
from models.blip_retrieval import BlipRetrieval
from models.blip_vqa import BlipVqa, Question, next_token_losses
from models.decoder import IGNORED, decoder_flops
from tasks.ranking import Ranking, rerank
from tasks.task import bert_vocabulary
from tools.benchmarks.workloads import Forward, Inputs, Method
from utils import Run

LISTED = 3128  # number of answers in BLIP's published list
LONGEST_QUESTION, LONGEST_ANSWER = 25, 10


@dataclass(frozen=True)
class Words:
    """The distribution of text lengths, in tokens including special tokens: log-normal around `median`, with this `spread`."""

    least: int
    median: int
    spread: float

    def draw(self, number: int, longest: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Draws random token ids and their attention mask, (number, L). 0 is padding."""
        lengths = (self.median * (self.spread * torch.randn(number)).exp()).round().clamp(self.least, longest)
        mask = (torch.arange(int(lengths.max())) < lengths.unsqueeze(1)).long()
        return torch.randint(5, vocabulary, mask.shape) * mask, mask


CAPTION, QUESTION, ANSWER = Words(5, 13, 0.3), Words(5, 9, 0.3), Words(3, 3, 0.4)


def spread(name: str, mask: Tensor) -> str:
    lengths = mask.sum(dim=1)
    return f"{name} of {lengths.min()}/{lengths.median()}/{lengths.max()} tokens (min/median/max)"


class Rerank:
    """Re-ranking by the matching head: images, each with its own candidate texts."""

    config, path = RetrievalConfig, Path("configs/shapes/retrieval.yaml")

    @staticmethod
    def inputs(config: RetrievalConfig, batch_size: int) -> Inputs:
        images = torch.randn(batch_size, 3, config.image_size, config.image_size)
        return images, *CAPTION.draw(batch_size * config.k_test, config.max_text_tokens, bert_vocabulary(config))

    @staticmethod
    def note(inputs: Inputs) -> str:
        return spread("captions", inputs[2])

    @staticmethod
    def methods(config: RetrievalConfig, model: BlipRetrieval, one: Inputs) -> list[Method]:
        """Builds the methods: keys and values of an image for each text; shared, with padded texts; shared, with packed texts."""
        separate, shared = matching_gflops(model, one)
        ways = (("separate", False, True, separate), ("padded", False, False, shared), ("shared", True, False, shared))
        return [Method(name, 0.0, matching(model, *way), cost, each=config.k_test) for name, *way, cost in ways]


class Matcher(nn.Module):
    """A wrapper of the model for a batch of images that are already `encoded`.

    With `separate`, the image is repeated for each of its texts, so that keys and values are computed for each.
    """

    def __init__(self, model: BlipRetrieval, encoded: Encoded, separate: bool):
        super().__init__()
        self.model, self.encoded, self.separate = model, encoded, separate

    def encode_image(self, images: Tensor, guidance: Guidance) -> Encoded:
        return self.encoded

    def match(
        self, input_ids: Tensor, attention_mask: Tensor, image: tuple[Tensor, Layout], setting: PruneSetting
    ) -> tuple[Tensor, TowerRecord]:
        if self.separate:
            image = select(*image, torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device))
        return self.model.match(input_ids, attention_mask, image, setting)


def matching(model: BlipRetrieval, packed: bool, separate: bool) -> Callable[[Inputs], Forward]:
    """Returns a function from inputs to a pass that re-ranks the texts of each image with `tasks.ranking.rerank`."""

    def prepare(inputs: Inputs) -> Forward:
        images, ids, mask = inputs
        split = Split([{"image": images}], [], [], [], [], [])
        tokens = [text[valid] for text, valid in zip(ids.cpu(), mask.bool().cpu(), strict=True)]
        candidates = torch.arange(len(ids)).unflatten(0, (len(images), -1))
        by_image = Ranking(candidates, torch.zeros(candidates.shape))
        by_text = Ranking(candidates.new_empty(len(ids), 0), torch.empty(len(ids), 0))
        guidance = Guidance(packed=packed)
        matcher, run = Matcher(model, model.encode_image(images, guidance), separate), Run(images.device)
        return lambda: rerank(matcher, split, tokens, by_image, by_text, guidance, run)[0]

    return prepare


def matching_gflops(model: BlipRetrieval, inputs: Inputs) -> tuple[float, float]:
    """Returns the GFLOPs of a pair with separate keys and values of the image, and with shared ones. `inputs` hold one image."""
    images, *text = inputs
    image = model.encode_image(images)
    _, record = model.match(*text, (image.tokens, image.layout))
    read = count_tokens(image.tokens, image.layout)
    separate = float(model.text_encoder.flops(record, [read]).double().mean()) + model.itm_head.weight.numel()
    keys = sum(float(layer.crossattention.self.flops(0, read)) for layer in model.text_encoder.encoder.layer)
    return separate / GIGA, (separate - keys * (1 - 1 / len(text[0]))) / GIGA


class RankAnswers:
    """Ranking of the listed answers: questions, each with its own image."""

    config, path = VqaConfig, Path("configs/shapes/vqa.yaml")

    @staticmethod
    def inputs(config: VqaConfig, batch_size: int) -> Inputs:
        images = torch.randn(batch_size, 3, config.image_size, config.image_size)
        longest, words = config.bert_sizes.max_position_embeddings, bert_vocabulary(config)
        questions = QUESTION.draw(batch_size, min(LONGEST_QUESTION, longest), words)
        answer_ids, answer_mask = ANSWER.draw(LISTED, min(LONGEST_ANSWER, longest), words)
        answer_ids[:, 0] = answer_ids[0, 0]  # all answers begin with the same token, like [DEC]
        return images, *questions, answer_ids, answer_mask

    @staticmethod
    def note(inputs: Inputs) -> str:
        return f"{spread('questions', inputs[2])}, {spread('answers', inputs[4])}"

    @staticmethod
    def methods(config: VqaConfig, model: BlipVqa, one: Inputs) -> list[Method]:
        """Builds the methods: each question alone, with padded candidates and a copy of the question for each; and all batched."""
        source, lengths = one[2].sum(dim=1), one[4].sum(dim=1)

        def ranking(rank: Callable[..., list]) -> Callable[[Inputs], Forward]:
            def prepare(inputs: Inputs) -> Forward:
                *read, answer_ids, answer_mask = inputs
                question = model.encode(*read, Guidance(packed=True))
                return lambda: rank(model, question, answer_ids, answer_mask, config.k_test)

            return prepare

        def together(model: BlipVqa, *inputs) -> list[tuple[Tensor, Tensor]]:
            return [model.rank(*inputs)[:2]]

        ((likely, _),) = ranking(together)(one)()
        shared = float(model.ranking_gflops(source, lengths[likely]))
        first, *whole = decoder_flops(model.text_decoder, torch.cat([source.new_ones(1), lengths[likely[0]]]), source)
        plain = float(first + sum(whole)) / GIGA
        return [Method("one by one", 0.0, ranking(one_by_one), plain), Method("batched", 0.0, ranking(together), shared)]


def one_by_one(
    model: BlipVqa, question: Question, answer_ids: Tensor, answer_mask: Tensor, number: int
) -> list[tuple[Tensor, Tensor]]:
    """Computes the same as `model.rank`, in the plain way: question by question, nothing shared."""
    found = []
    for tokens, valid in zip(question.tokens, question.valid, strict=True):

        def decode(ids: Tensor, mask: Tensor, source: Tensor = tokens[valid]) -> Tensor:
            copies = source.expand(len(ids), -1, -1)
            return model.text_decoder(ids, attention_mask=mask, encoder_hidden_states=copies, use_cache=False).logits

        start = answer_ids[:1, :1]
        first = decode(start, torch.ones_like(start))[0, 0].float().softmax(dim=0)
        likely = first[answer_ids[:, 1]].argsort(descending=True, stable=True)[:number]
        mask = answer_mask[likely]
        longest = int(mask.sum(dim=1).max())
        ids, mask = answer_ids[likely, :longest], mask[:, :longest]
        targets = ids.masked_fill(mask == 0, IGNORED)[:, 1:]
        losses, order = next_token_losses(decode(ids, mask), targets, model.text_decoder.label_smoothing).sort(stable=True)
        found.append((likely[order].unsqueeze(0), losses.unsqueeze(0)))
    return found


RANKINGS = {"rerank": Rerank, "rank_answers": RankAnswers}
