"""A task's model at one prune setting with its test samples, and which of their tokens it keeps: what pictures and reports show.

Shapes: B samples, P pictures each, L blocks of a tower, N text tokens of the longest text. Class tokens are left out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from clip.tokenizer import load_clip_tokenizer
from config import CaptionConfig, ClipRetrievalConfig, Config, NlvrConfig, RetrievalConfig, VqaConfig
from data.captions import CaptionImages, CaptionTexts, FirstPairs, PairCollate, read_captioned
from data.loading import Loader, build_loader
from data.nlvr import NlvrCollate
from data.nlvr import build_datasets as judged_statements
from data.text import Tokenizer, dec_token_id, enc_token_id, load_tokenizer
from data.vqa import QuestionCollate
from data.vqa import build_datasets as answered_questions
from engine.train import Precision, move
from engine.writing import Answerer, Captioner
from madtp.pruning import OFF, PruneSetting
from models.blip_nlvr import NlvrOutput
from models.blip_vqa import Question
from models.build import caption_from_config, clip_from_config, nlvr_from_config, retrieval_from_config, vqa_from_config
from models.pretrained import (
    StateDict,
    load_caption_weights,
    load_nlvr_weights,
    load_retrieval_weights,
    load_vqa_weights,
    read_checkpoint,
)
from models.pretrained_clip import load_clip_weights
from models.tower import Encoded, TowerRecord
from models.trace import surviving, tokens_by_block
from transform.images import MEAN, STD, eval_transform
from utils import Run, UserError, init_run


@dataclass(frozen=True)
class Sample:
    """What is drawn of one sample, whatever the task.

    pictures: label, picture (H, W, 3) in 0 ... 1, patches alive after each block (blocks, rows, columns) bool
    texts: words, words alive after each layer (layers, words) bool
    said: label, text: what the model says, and what is true
    """

    id: str
    heading: str
    pictures: list[tuple[str, np.ndarray, np.ndarray]]
    texts: list[tuple[list[str], np.ndarray]]
    said: list[tuple[str, str]] = field(default_factory=list)


class View:
    """What the tasks share. A task's class says what its model is, what a forward pass is and how to head a sample.

    labels: of a sample's pictures, in their order
    image_key: where a batch has its pictures, (B, 3, H, W) or (B, P, 3, H, W)
    text_keys: where it has its texts, token ids and attention mask (B, L)
    timed: what `forward` computes, in words
    """

    labels: tuple[str, ...] = ("image",)
    image_key = "image"
    text_keys = ("input_ids", "attention_mask")
    timed = ""

    def __init__(
        self,
        config: Config,
        run: Run,
        setting: PruneSetting,
        model: nn.Module,
        tokenizer: Tokenizer,
        dataset: Dataset,
        ids: Sequence[str],
        collate: Callable[[list], dict],
    ):
        """
        Args:
            dataset: the test samples, which are called `ids` and become batches by `collate`.
        """
        self.config, self.run, self.setting = config, run, setting
        self.model = model.to(run.device).eval()
        self.tokenizer, self.dataset, self.ids, self.collate = tokenizer, dataset, list(ids), collate
        self.precision = Precision(run.device, config.amp)
        self.packed = config.variant == "paper"

    def compute(self, batch: dict) -> object:
        """The forward pass over a batch that is on the device."""
        raise NotImplementedError

    def records(self, output: object) -> dict[str, TowerRecord]:
        """Of "image", whose samples are all first pictures, then all second ones, and of "text" where texts are pruned."""
        raise NotImplementedError

    def headings(self, batch: dict, output: object) -> list[str]:
        """What the model finds of each sample, in a few words."""
        return ["" for _ in self.names(batch)]

    def said(self, batch: dict, output: object) -> list[list[tuple[str, str]]]:
        """Of each sample label and text: what the model says, and what is true."""
        return [[] for _ in self.names(batch)]

    def gflops(self, batch: dict, output: object) -> Tensor:
        """What each sample costs in deployment, (B,)."""
        return self.model.costs(*self.inputs(batch), setting=self.setting, packed=self.packed)[1]

    def names(self, batch: dict) -> list[str]:
        """The samples' ids."""
        raise NotImplementedError

    def words(self, ids: list[int]) -> list[str]:
        """Of a text without padding: its tokens but for the class token, in the order of the text."""
        return self.tokenizer.convert_ids_to_tokens(ids)[1:]

    def inputs(self, batch: dict) -> tuple[Tensor, ...]:
        return batch[self.image_key], *(batch[key] for key in self.text_keys)

    def batches(self, ids: Sequence[str]) -> Loader:
        """The samples with these ids, in batches of the evaluation's size."""
        place = {sample: index for index, sample in enumerate(self.ids)}
        unknown = [sample for sample in ids if sample not in place]
        if unknown:
            raise UserError(f"{unknown[0]}: no such test sample; the ids run from {self.ids[0]} to {self.ids[-1]}")
        return build_loader(
            Subset(self.dataset, [place[sample] for sample in ids]),
            self.config.batch_size_test,
            train=False,
            run=Run(self.run.device),
            num_workers=0,
            seed=self.config.seed,
            collate=self.collate,
        )

    @torch.no_grad()
    def forward(self, batch: dict) -> object:
        batch = move(batch, self.run.device)
        with self.precision.autocast():
            return self.compute(batch)

    def tokens(self, output: object) -> dict[str, Tensor]:
        """Tokens by block, one row a picture or a text, by the name of the tower."""
        return {tower: tokens_by_block(record) for tower, record in self.records(output).items()}

    def tokens_left(self, output: object) -> Tensor:
        """Tokens of each sample after the last block of all towers, class and merged tokens included, (B,)."""
        left = [record.leaving[-1] for record in self.records(output).values()]
        samples = len(left[0]) // len(self.labels)
        return sum(tower.unflatten(0, (-1, samples)).sum(dim=0) for tower in left)

    @torch.no_grad()
    def samples(self, batch: dict) -> list[Sample]:
        """What is to be drawn of a batch. The GFLOPs in its headings are those of deployment."""
        if self.config.variant == "released":
            raise UserError("variant 'released' hands its tokens on out of order; tokens can be traced in variant 'paper' only")
        names, batch = self.names(batch), move(batch, self.run.device)
        with self.precision.autocast():
            output = self.compute(batch)
            headings, said, gflops = (part(batch, output) for part in (self.headings, self.said, self.gflops))
        records = self.records(output)
        patches = self._patches(records["image"])
        texts = self._texts(batch, records["text"]) if "text" in records else [[] for _ in names]
        images = batch[self.image_key]
        images = images.reshape(len(names), len(self.labels), *images.shape[-3:])
        strength = "uncompressed" if self.setting == OFF else f"p = {self.config.p:g} (T = {self.setting.temperature:.4g})"
        costs = zip(self.tokens_left(output).tolist(), gflops.tolist(), strict=True)
        return [
            Sample(
                name,
                f"{name}, {strength}: {headings[i]}{'; ' if headings[i] else ''}{left} tokens left, {cost:.4g} GFLOPs",
                [(label, displayable(images[i, place]), patches[place, i]) for place, label in enumerate(self.labels)],
                texts[i],
                said[i],
            )
            for i, (name, (left, cost)) in enumerate(zip(names, costs, strict=True))
        ]

    def _patches(self, record: TowerRecord) -> np.ndarray:
        """The patches alive, (P, B, L, rows, columns) bool."""
        pictures, side = len(record.leaving[-1]), self.config.image_size // self.config.patch_size
        whole = torch.ones(pictures, side * side, dtype=torch.bool, device=self.run.device)
        alive = surviving(record, whole).unflatten(-1, (side, side))
        return alive.unflatten(0, (len(self.labels), -1)).cpu().numpy()

    def _texts(self, batch: dict, record: TowerRecord) -> list[list[tuple[list[str], np.ndarray]]]:
        """Of each sample its words, and which are alive (L, words) bool."""
        all_ids, mask = batch[self.text_keys[0]], batch[self.text_keys[1]].bool()
        alive = surviving(record, mask[:, 1:]).cpu().numpy()  # as many tokens are in memory behind the class token
        texts = []
        for ids, inside, layers in zip(all_ids, mask, alive, strict=True):
            words = self.words(ids[inside].tolist())
            texts.append([(words, layers[:, : len(words)])])
        return texts


class NlvrView(View):
    """NLVR2: two images and a sentence."""

    labels = ("left", "right")
    image_key = "images"
    timed = "the whole forward pass"

    def __init__(self, config: NlvrConfig, run: Run, setting: PruneSetting, weights: StateDict, source: str):
        """weights: of the model, read from the file `source`."""
        tokenizer = load_tokenizer(config.tokenizer)
        dataset = judged_statements(config)["test"]
        ids = [entry["id"] for entry in dataset.entries]
        collate = NlvrCollate(tokenizer, config.bert_sizes.max_position_embeddings)
        model = nlvr_from_config(config, len(tokenizer))
        load_nlvr_weights(model, weights, source)
        super().__init__(config, run, setting, model, tokenizer, dataset, ids, collate)

    def compute(self, batch: dict) -> NlvrOutput:
        return self.model(*self.inputs(batch), self.setting, packed=self.packed)

    def records(self, output: NlvrOutput) -> dict[str, TowerRecord]:
        return {"image": output.vision, "text": output.language}

    def headings(self, batch: dict, output: NlvrOutput) -> list[str]:
        scores = output.logits.float().softmax(dim=-1)[:, 1].tolist()
        truths = batch["targets"].bool().tolist()
        return [f"predicted {score > 0.5} ({score:.2f}), truth {truth}" for score, truth in zip(scores, truths, strict=True)]

    def names(self, batch: dict) -> list[str]:
        return batch["ids"]


class PairView(View):
    """A picture and the first of its captions. A sample's id is its picture's path."""

    def __init__(
        self,
        config: RetrievalConfig | CaptionConfig,
        run: Run,
        setting: PruneSetting,
        model: nn.Module,
        tokenizer: Tokenizer,
        prompt: str = "",
        first_token_id: int | None = None,
    ):
        """`prompt` and `first_token_id` as of data.captions.build_loaders."""
        entries = read_captioned(config.annotation_file(config.test_file))
        images = CaptionImages(entries, config.image_root, eval_transform(config.image_size, config.text_only))
        pairs = FirstPairs(images, CaptionTexts(entries), prompt)
        collate = PairCollate(tokenizer, config.max_text_tokens, first_token_id)
        super().__init__(config, run, setting, model, tokenizer, pairs, images.names, collate)

    def names(self, batch: dict) -> list[str]:
        return [self.ids[number] for number in batch["image_ids"].tolist()]


class TowersView(PairView):
    """Retrieval: picture and caption, each in its tower."""

    timed = "both towers once, of a picture and its first caption"

    def compute(self, batch: dict) -> tuple[Encoded, Encoded]:
        images, *text = self.inputs(batch)
        shared = {"setting": self.setting, "packed": self.packed}
        return self.model.encode_image(images, **shared), self.model.encode_text(*text, **shared)

    def records(self, output: tuple[Encoded, Encoded]) -> dict[str, TowerRecord]:
        image, text = output
        return {"image": image.record, "text": text.record}

    def headings(self, batch: dict, output: tuple[Encoded, Encoded]) -> list[str]:
        image, text = output
        return [f"similarity {value:.2f}" for value in (image.feature * text.feature).sum(dim=1).tolist()]


class RetrievalView(TowersView):
    timed = f"{TowersView.timed}, without the matching"

    def __init__(self, config: RetrievalConfig, run: Run, setting: PruneSetting, weights: StateDict, source: str):
        """weights: of the model, read from the file `source`."""
        tokenizer = load_tokenizer(config.tokenizer)
        model = retrieval_from_config(config, len(tokenizer), enc_token_id(tokenizer))
        load_retrieval_weights(model, weights, source)
        super().__init__(config, run, setting, model, tokenizer)

    def headings(self, batch: dict, output: tuple[Encoded, Encoded]) -> list[str]:
        _, *text = self.inputs(batch)
        logits, _ = self.model.match(*text, (output[0].tokens, output[0].layout), self.setting)
        matches = logits.float().softmax(dim=-1)[:, 1].tolist()
        return [f"{start}, match {match:.2f}" for start, match in zip(super().headings(batch, output), matches, strict=True)]


class ClipView(TowersView):
    def __init__(self, config: ClipRetrievalConfig, run: Run, setting: PruneSetting, weights: StateDict, source: str):
        """weights: of the model, read from the file `source`."""
        tokenizer = load_clip_tokenizer(config.tokenizer)
        model = clip_from_config(config, len(tokenizer))
        load_clip_weights(model, weights, source)
        super().__init__(config, run, setting, model, tokenizer)

    def words(self, ids: list[int]) -> list[str]:
        """The class token is the end-of-text token: it comes first in memory, and the others follow in their order."""
        return self.tokenizer.convert_ids_to_tokens(ids)[:-1]


class CaptionView(PairView):
    """Captioning: a picture, whose caption the model writes."""

    timed = "captions written, of the config's way to write them"

    def __init__(self, config: CaptionConfig, run: Run, setting: PruneSetting, weights: StateDict, source: str):
        """weights: of the model, read from the file `source`."""
        tokenizer = load_tokenizer(config.tokenizer)
        self.write = Captioner(config, tokenizer)
        model = caption_from_config(config, len(tokenizer), self.write.prompt, tokenizer.sep_token_id, tokenizer.pad_token_id)
        load_caption_weights(model, weights, source)
        super().__init__(config, run, setting, model, tokenizer, config.prompt, dec_token_id(tokenizer))

    def compute(self, batch: dict) -> tuple[list[str], TowerRecord, Tensor]:
        return self.write(self.model, batch["image"], self.setting)

    def records(self, output: tuple[list[str], TowerRecord, Tensor]) -> dict[str, TowerRecord]:
        return {"image": output[1]}

    def said(self, batch: dict, output: tuple[list[str], TowerRecord, Tensor]) -> list[list[tuple[str, str]]]:
        truths = self.tokenizer.batch_decode(batch["input_ids"][:, len(self.write.prompt) :], skip_special_tokens=True)
        return [[("written", text), ("truth", truth)] for text, truth in zip(output[0], truths, strict=True)]

    def gflops(self, batch: dict, output: tuple[list[str], TowerRecord, Tensor]) -> Tensor:
        return output[2]


class VqaView(View):
    """VQA: a picture and a question. A sample's id is that of its question."""

    image_key = "images"
    text_keys = ("question_ids", "question_mask")
    timed = "questions answered, their pictures read anew for each"

    def __init__(self, config: VqaConfig, run: Run, setting: PruneSetting, weights: StateDict, source: str):
        """weights: of the model, read from the file `source`."""
        tokenizer = load_tokenizer(config.tokenizer)
        self.answer = Answerer(config, tokenizer, run.device)
        model = vqa_from_config(config, len(tokenizer), dec_token_id(tokenizer), tokenizer.sep_token_id, tokenizer.pad_token_id)
        load_vqa_weights(model, weights, source)
        dataset = answered_questions(config)["test"]
        ids = [str(entry["question_id"]) for entry in dataset.entries]
        super().__init__(config, run, setting, model, tokenizer, dataset, ids, QuestionCollate(tokenizer))

    def compute(self, batch: dict) -> tuple[list[str], Question, Tensor]:
        return self.answer(self.model, batch, self.setting)

    def records(self, output: tuple[list[str], Question, Tensor]) -> dict[str, TowerRecord]:
        return {"image": output[1].vision, "text": output[1].language}

    def names(self, batch: dict) -> list[str]:
        return [str(question) for question in batch["ids"]]

    def said(self, batch: dict, output: tuple[list[str], Question, Tensor]) -> list[list[tuple[str, str]]]:
        """The truth is what most annotators said, where that is known."""
        given = [[("truth", Counter(answers).most_common(1)[0][0])] if answers else [] for answers in batch["answers"]]
        return [[("answer", text), *truth] for text, truth in zip(output[0], given, strict=True)]

    def gflops(self, batch: dict, output: tuple[list[str], Question, Tensor]) -> Tensor:
        return output[2]


VIEWS: dict[str, type[View]] = {
    "nlvr": NlvrView,
    "retrieval": RetrievalView,
    "retrieval_clip": ClipView,
    "caption": CaptionView,
    "vqa": VqaView,
}


def open_view(config: Config, checkpoint: Path | str, device: str | None = None, temperature: float | None = None) -> View:
    """The view of a model at the temperature that its checkpoint was saved with, or at `temperature`.

    Raises:
        UserError: when the model prunes and there is no temperature, or when its task has no view.
    """
    if config.task not in VIEWS:
        raise UserError(f"runs of task {config.task!r} cannot be shown yet; those of {', '.join(VIEWS)} can")
    run = init_run(device, config.seed)
    saved = read_checkpoint(checkpoint)
    setting = OFF
    if not config.uncompressed:
        strength = saved.get("temperature") if temperature is None else temperature
        if strength is None:
            raise UserError(f"{checkpoint}: holds no temperature; give one with --temperature, or a run's checkpoint")
        setting = PruneSetting(strength, saved.get("prune_from", config.prune_from))
    return VIEWS[config.task](config, run, setting, saved["model"], str(checkpoint))


def displayable(picture: Tensor) -> np.ndarray:
    """A normalised picture (3, H, W) as the eye wants it: (H, W, 3) in 0 ... 1."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (picture.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def spread(ids: Sequence[str], number: int) -> list[str]:
    """`number` of `ids` (all, when there are fewer), evenly spaced."""
    number = min(number, len(ids))
    return [ids[(2 * i + 1) * len(ids) // (2 * number)] for i in range(number)]
