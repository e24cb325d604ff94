"""Image-text retrieval by BLIP and by CLIP or SigLIP: which caption belongs to an image, and which image to a caption?"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from clip.siglip_tokenizer import SiglipTokenizer, load_siglip_tokenizer
from clip.tokenizer import OPENAI, ClipTokenizer, load_clip_tokenizer
from configs.schema import ClipRetrievalConfig, RetrievalConfig
from data.captions import (
    CaptionImages,
    CaptionTexts,
    PairCollate,
    Split,
    TextCollate,
    annotated,
    build_loaders,
    collate_images,
    read_captioned,
)
from data.text import Tokenizer, enc_token_id
from engine.experiment import Evaluation, Experiment, mean_cost
from madtp.blocks import Encoded, TowerRecord
from madtp.flops import GIGA
from madtp.rule import PruneSetting
from metrics.retrieval import CUTS, recalls
from models.bert import BertSize, CrossAttention, TextEncoder
from models.blip_retrieval import BlipRetrieval
from models.build import checkpoint_blocks, learnable_tokens, pruner_factory, text_pruner_factory, vision_transformer
from models.clip_retrieval import FAMILIES, ClipRetrieval, clip_size
from models.momentum import MomentumModel, can_number
from models.weights.blip import load_retrieval_weights
from models.weights.clip import load_clip_weights
from tasks.pairs import SINGLES, PairView
from tasks.prediction import HERE, Prediction, Predictor
from tasks.ranking import predictions, rank
from tasks.task import Demo, Inputs, Task, bert_vocabulary
from utils import UserError, logger

TOP = 10  # candidates of a ranking by similarity alone: no recall looks further
CLIP_VOCABULARY = 49408

RECALL_NOTE = (
    "text R@k: of the pictures, the share with one of their five captions among the first k of all captions; image R@k: of the"
    " captions, the share with their picture among the first k of all pictures; mean recall: the mean of the six."
)
PAIR_NOTE = (
    "A sample is a pair of a picture and a caption in a training step: both encoders, both momentum encoders{}, and the products"
    " with the queues. In deployment both encoders run once{}. The parameters leave out the momentum encoders."
)


def retrieval_from_config(config: RetrievalConfig, vocab_size: int, enc_token: int) -> BlipRetrieval:
    """enc_token: id of [ENC]"""
    make_text_pruner = text_pruner_factory(config)
    vision = vision_transformer(config, pruner_factory(config))
    size = BertSize(vocab_size=vocab_size, **config.bert_sizes.model_dump())
    text = TextEncoder(size, lambda i: CrossAttention(size, vision.embed_dim), lambda dim: make_text_pruner(dim, mask_follows=True))
    return BlipRetrieval(
        vision,
        text,
        enc_token,
        config.embed_dim,
        config.queue_size,
        config.momentum,
        config.negative_all_rank,
        learnable_tokens(config),
        padded_to=config.max_text_tokens if config.variant == "released" and not config.uncompressed else 0,
    )


def clip_from_config(config: ClipRetrievalConfig, words: int) -> ClipRetrieval:
    """words: of the tokenizer"""
    size = clip_size(config, words)
    if words > size.vocab_size:
        raise UserError(f"{config.tokenizer}: has {words} words, more than clip.vocab_size; give the weights' own tokenizer")
    return FAMILIES[config.clip.family](
        size,
        config.queue_size,
        config.momentum,
        pruner_factory(config),
        learnable_tokens(config),
        checkpoint_blocks=checkpoint_blocks(config),
        make_text_pruner=text_pruner_factory(config),
    )


class TowersView(PairView):
    """A picture and its caption, each in its tower."""

    timed = "both towers once, of a picture and its first caption"

    def compute(self, batch: dict) -> tuple[Encoded, Encoded]:
        return self.model.encode_pairs(*self.inputs(batch), self.guidance)

    def records(self, output: tuple[Encoded, Encoded]) -> dict[str, TowerRecord]:
        image, text = output
        return {"image": image.record, "text": text.record}

    def headings(self, batch: dict, output: tuple[Encoded, Encoded]) -> list[str]:
        image, text = output
        return [f"similarity {value:.2f}" for value in (image.feature * text.feature).sum(dim=1).tolist()]


class MatchingView(TowersView):
    timed = f"{TowersView.timed}, without the matching"

    def headings(self, batch: dict, output: tuple[Encoded, Encoded]) -> list[str]:
        _, *text = self.inputs(batch)
        logits, _ = self.model.match(*text, (output[0].tokens, output[0].layout), self.setting)
        matches = logits.float().softmax(dim=-1)[:, 1].tolist()
        return [f"{start}, match {match:.2f}" for start, match in zip(super().headings(batch, output), matches, strict=True)]


class ClipView(TowersView):
    def words(self, ids: list[int]) -> list[str]:
        """The class token is the last of a text: it comes first in memory, and the others follow in their order."""
        return self.tokenizer.convert_ids_to_tokens(ids)[:-1]


class PairPredictor(Predictor):
    """Scores all pictures with all texts by similarity; all inputs of one kind are one batch."""

    wants = "--image once and --text once or more, or --text once and --image once or more"

    def fits(self) -> bool:
        return min(len(self.images), len(self.texts)) == 1

    def shown(self) -> dict:
        items = [
            {"image": image["image"], "caption": text["caption"], "image_id": number}
            for number, image in enumerate(self._pictures())
            for text in self._captions()
        ]
        return self.on_device(PairCollate(self.task.tokenizer, self.config.max_text_tokens)(items))

    def _pictures(self) -> list[dict]:
        return items_of(CaptionImages([{"image": path} for path in self.images], HERE, self.transform))

    def _captions(self) -> list[dict]:
        return items_of(CaptionTexts([{"caption": self.texts}]))

    def predict(self) -> Prediction:
        images = self.on_device(collate_images(self._pictures()))["image"]
        batch = self.on_device(TextCollate(self.task.tokenizer, self.config.max_text_tokens)(self._captions()))
        words = batch["input_ids"], batch["attention_mask"]
        image, text = self.model.encode_pairs(images, *words, self.guidance)
        with torch.autocast(images.device.type, enabled=False):  # as when a split is ranked
            scores = (image.feature @ text.feature.t()).flatten()
        pairs = [{"image": path, "text": said} for path in self.images for said in self.texts]
        rows = [{**pair, "similarity": value} for pair, value in zip(pairs, scores.tolist(), strict=True)]
        records = {"image": image.record, "text": text.record}
        costs = self.costs(self._encoding_gflops, (image, text), (unpruned(image), unpruned(text)))
        if self.task.matching:
            logits, records["matching"], more = self._matched(words, image)
            costs = tuple(cost + matching for cost, matching in zip(costs, more, strict=True))
            scores = scores + logits[:, 1]
            rows = [{**row, "match": match} for row, match in zip(rows, logits.softmax(dim=-1)[:, 1].tolist(), strict=True)]
        order = scores.argsort(descending=True, stable=True).tolist()
        ranking = [{**rows[place], "score": float(scores[place])} for place in order]
        return Prediction([self._line(row) for row in ranking], {"ranking": ranking}, *costs, records, order)

    def _matched(self, words: tuple[Tensor, ...], image: Encoded) -> tuple[Tensor, TowerRecord, tuple[Tensor, Tensor]]:
        """Matches every picture with every text: logits (I * T, 2), the record, GFLOPs, and GFLOPs with nothing pruned."""
        texts = (part.repeat(len(self.images), 1) for part in words)
        logits, record = self.model.match(*texts, (image.tokens, image.layout), self.opened.setting)
        left, whole = (tokens.repeat_interleave(len(self.texts)) for tokens in (image.record.leaving[-1], image.record.entering[0]))
        costs = self.costs(lambda matched: self.model.matching_gflops(*matched), (record, left), (record.unpruned(), whole))
        return logits.float(), record, costs

    def _encoding_gflops(self, pairs: tuple[Encoded, Encoded]) -> Tensor:
        """Returns the GFLOPs of all pictures and all texts."""
        return sum(flops.double().sum() for flops in self.model.tower_flops(*pairs)) / GIGA

    def _line(self, row: dict) -> str:
        numbers = ", ".join(f"{name} {row[name]:.4f}" for name in ("similarity", "match") if name in row)
        return f"{row['image'] if len(self.images) > 1 else row['text']} ({numbers})"


class PairTask(Task[RetrievalConfig]):
    """The part that BLIP's and CLIP's retrieval share.

    matching: the model has a head that matches an image and a text, which ranks the best candidates again
    """

    score = "r_mean"
    columns = {
        "mean recall, %": ("r_mean",),
        "text R@1 / 5 / 10": ("txt_r1", "txt_r5", "txt_r10"),
        "image R@1 / 5 / 10": ("img_r1", "img_r5", "img_r10"),
    }
    predictor = PairPredictor
    matching = False

    def reference_gflops(self, model: MomentumModel) -> float:
        return model.reference_gflops(self.config.max_text_tokens)

    def loaders(self) -> dict[str, Any]:
        return build_loaders(self.config, self.run, self.tokenizer)

    def inputs(self, batch: dict) -> Inputs:
        return batch["image"], batch["input_ids"], batch["attention_mask"]

    def experiment(self, model: MomentumModel, loaders: dict[str, Any], checkpoint: dict, **functions: Callable) -> Experiment:
        if "train" in loaders:
            self._judge_queue_ids(model, loaders["train"].dataset.dataset.number_of_images, checkpoint)
        return super().experiment(model, loaders, checkpoint, **functions)

    def _judge_queue_ids(self, model: MomentumModel, images: int, checkpoint: dict) -> None:
        """Keeps or forgets the image ids that `pretrained` brought: they may number the images of other data."""
        keeps, largest = self.config.queue_ids == "keep", int(model.idx_queue.max())
        if self.config.queue_ids == "auto":
            published = "variant" not in checkpoint  # a run of this project may have used any data
            keeps = published and can_number(model.idx_queue, images)
        if largest >= 0:
            done = "kept" if keeps else "forgotten"
            logger.info("image ids of the pretrained queue, up to %d, are %s: the training images are %d", largest, done, images)
        if not keeps:
            model.forget_queue_ids()

    def losses(self, model: nn.Module, batch: dict, setting: PruneSetting) -> dict[str, Tensor]:
        alpha = self.config.alpha * min(1.0, batch["epoch"])  # momentum encoders are of little use at first
        named = model(*self.inputs(batch), batch["image_ids"], alpha, self.training_guidance(setting, batch["epoch"]))
        if self.teacher is not None:
            named |= self.teacher.losses(lambda teacher: teacher.encode_pairs(*self.inputs(batch), self.guidance()))
        return named

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"similarity_momentum": self.config.sim_weight, **super().loss_weights}

    def deployment(self, model: nn.Module, batch: dict, setting: PruneSetting) -> Tensor:
        return model.costs(*self.inputs(batch), guidance=self.guidance(setting))[1]

    def evaluate(self, model: nn.Module, split: Split, setting: PruneSetting) -> Evaluation:
        number = self.config.k_test if self.matching else TOP
        by_image, by_text = rank(model, split, self.guidance(setting), self.run, number, self.matching)
        metrics = recalls(by_image.candidates, by_text.candidates, torch.tensor(split.image_of_text))
        cost = mean_cost(model, split.pairs, self.gflops, setting, self.run)
        return Evaluation(metrics, cost, predictions(by_image, by_text, split.names))

    @classmethod
    def sample_scores(cls, config: RetrievalConfig, predictions: dict[str, Any]) -> dict[str, float]:
        """A query's score is the mean of its hits among the first 1, 5 and 10."""
        entries = read_captioned(config.annotation_file(config.test_file))
        image_of_text = [entry["image"] for entry in entries for _ in entry["caption"]]
        hits = {f"image {name}": [image_of_text[text] == name for text in found] for name, found in predictions["captions"].items()}
        for text, found in predictions["pictures"].items():
            hits[f"text {text}"] = [image_of_text[int(text)] == name for name in found]
        return {query: sum(any(found[:cut]) for cut in CUTS) / len(CUTS) for query, found in hits.items()}


class RetrievalTask(PairTask):
    """Retrieval by BLIP."""

    config_class = RetrievalConfig
    view = MatchingView
    matching = True
    demo = Demo(
        title="Retrieval on Shapes: which caption belongs to a picture, and which picture to a caption?",
        reductions=(0.5, 0.75),
        shapes="retrieval",
        options=SINGLES,
        demo_size=10_000,  # a run draws 9,600 pairs, the study's 16,000: no picture needs to come twice
        study_size=16_000,
        notes=(RECALL_NOTE, PAIR_NOTE.format(", three passes of the matching head's encoder", ", and that encoder once")),
    )
    load = staticmethod(load_retrieval_weights)
    annotated = staticmethod(annotated)

    def build(self, config: RetrievalConfig) -> BlipRetrieval:
        return retrieval_from_config(config, len(self.tokenizer), enc_token_id(self.tokenizer))

    @classmethod
    def reference_case(cls, config: RetrievalConfig) -> tuple[BlipRetrieval, Inputs]:
        """One image and a text of the longest length."""
        vocabulary = bert_vocabulary(config)
        text = torch.randint(5, 30, (1, config.max_text_tokens))
        inputs = torch.randn(1, 3, config.image_size, config.image_size), text, torch.ones_like(text)
        return retrieval_from_config(config, vocabulary, vocabulary - 1), inputs


class ClipRetrievalTask(PairTask):
    """Retrieval by CLIP or SigLIP."""

    config_class = ClipRetrievalConfig
    view = ClipView
    demo = replace(
        RetrievalTask.demo, title=f"{RetrievalTask.demo.title} (CLIP)", notes=(RECALL_NOTE, PAIR_NOTE.format("", ""))
    )
    load = staticmethod(load_clip_weights)
    annotated = staticmethod(annotated)

    @staticmethod
    def load_tokenizer(config: ClipRetrievalConfig) -> Tokenizer:
        return clip_tokenizer(config)

    def build(self, config: ClipRetrievalConfig) -> ClipRetrieval:
        return clip_from_config(config, len(self.tokenizer))

    @classmethod
    def reference_case(cls, config: ClipRetrievalConfig) -> tuple[ClipRetrieval, Inputs]:
        """One image and a text that ends in the last place."""
        vocabulary = clip_vocabulary(config)
        text = torch.randint(1, vocabulary - 1, (1, config.max_text_tokens))
        text[:, -1] = vocabulary - 1
        inputs = torch.randn(1, 3, config.image_size, config.image_size), text, torch.ones_like(text)
        return clip_from_config(config, vocabulary), inputs


def clip_tokenizer(config: ClipRetrievalConfig) -> ClipTokenizer | SiglipTokenizer:
    return (load_siglip_tokenizer if config.clip.family == "siglip" else load_clip_tokenizer)(config.tokenizer)


def clip_vocabulary(config: ClipRetrievalConfig) -> int:
    """Returns the model's vocabulary: the tokenizer's, or CLIP's without a tokenizer file."""
    if config.clip.vocab_size or config.tokenizer == OPENAI:
        return config.clip.vocab_size or CLIP_VOCABULARY
    try:
        return len(clip_tokenizer(config))
    except UserError:
        return CLIP_VOCABULARY


def unpruned(encoded: Encoded) -> Encoded:
    """Returns the output with the record that is left when nothing is pruned."""
    return replace(encoded, record=encoded.record.unpruned())


def items_of(dataset: CaptionImages | CaptionTexts) -> list[dict]:
    return [dataset[index] for index in range(len(dataset))]
