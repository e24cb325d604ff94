"""A task's model at one prune setting with its test samples, and which of their tokens it keeps: what pictures and reports show.

Shapes: B samples, P pictures each, L blocks of a tower, N text tokens of the longest text. Class tokens are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset

from clip.tokenizer import load_clip_tokenizer
from config import ClipRetrievalConfig, Config, NlvrConfig, RetrievalConfig
from data.captions import CaptionImages, CaptionTexts, FirstPairs, PairCollate, read_captioned
from data.loading import Loader, build_loader
from data.nlvr import NlvrCollate, build_datasets
from data.text import Tokenizer, enc_token_id, load_tokenizer
from engine.saved import saved_setting
from engine.train import Precision, move
from madtp.pruning import OFF, PruneSetting
from models.blip_nlvr import NlvrOutput
from models.build import clip_from_config, nlvr_from_config, retrieval_from_config
from models.pretrained import StateDict, load_nlvr_weights, load_retrieval_weights, read_checkpoint
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
    """

    id: str
    heading: str
    pictures: list[tuple[str, np.ndarray, np.ndarray]]
    texts: list[tuple[list[str], np.ndarray]]


class View:
    """What the tasks share. A task's class says what its model is, what a forward pass is and how to head a sample.

    labels: of a sample's pictures, in their order
    image_key: where a batch has its pictures, (B, 3, H, W) or (B, P, 3, H, W)
    timed: what `forward` computes, in words
    """

    labels: tuple[str, ...] = ("image",)
    image_key = "image"
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

    @classmethod
    def over(cls, *args: Any) -> "View":
        """Of a model that is open, over any samples: what `View` itself is made of."""
        view = cls.__new__(cls)
        View.__init__(view, *args)
        return view

    def compute(self, batch: dict) -> object:
        """The forward pass over a batch that is on the device."""
        raise NotImplementedError

    def records(self, output: object) -> dict[str, TowerRecord]:
        """Of "image", whose samples are all first pictures, then all second ones, and of "text" where texts are pruned."""
        raise NotImplementedError

    def headings(self, batch: dict, output: object) -> list[str]:
        """What the model says of each sample."""
        raise NotImplementedError

    def names(self, batch: dict) -> list[str]:
        """The samples' ids."""
        raise NotImplementedError

    def words(self, ids: list[int]) -> list[str]:
        """Of a text without padding: its tokens but for the class token, in the order of the text."""
        return self.tokenizer.convert_ids_to_tokens(ids)[1:]

    def inputs(self, batch: dict) -> tuple[Tensor, ...]:
        return batch[self.image_key], batch["input_ids"], batch["attention_mask"]

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
            headings = self.headings(batch, output)
            _, gflops = self.model.costs(*self.inputs(batch), setting=self.setting, packed=self.packed)
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
                f"{name}, {strength}: {headings[i]}; {left} tokens left, {cost:.4g} GFLOPs",
                [(label, displayable(images[i, place]), patches[place, i]) for place, label in enumerate(self.labels)],
                texts[i],
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
        mask = batch["attention_mask"].bool()
        alive = surviving(record, mask[:, 1:]).cpu().numpy()  # as many tokens are in memory behind the class token
        texts = []
        for ids, inside, layers in zip(batch["input_ids"], mask, alive, strict=True):
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
        dataset = build_datasets(config)["test"]
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
        said = [f"predicted {score > 0.5} ({score:.2f})" for score in scores]
        if "targets" not in batch:
            return said
        return [f"{start}, truth {truth}" for start, truth in zip(said, batch["targets"].bool().tolist(), strict=True)]

    def names(self, batch: dict) -> list[str]:
        return batch["ids"]


class PairView(View):
    """Retrieval: a picture and the first of its captions, each in its tower. A sample's id is its picture's path."""

    timed = "both towers once, of a picture and its first caption"

    def __init__(self, config: RetrievalConfig, run: Run, setting: PruneSetting, model: nn.Module, tokenizer: Tokenizer):
        entries = read_captioned(config.annotation_file(config.test_file))
        images = CaptionImages(entries, config.image_root, eval_transform(config.image_size))
        pairs, collate = FirstPairs(images, CaptionTexts(entries)), PairCollate(tokenizer, config.max_text_tokens)
        super().__init__(config, run, setting, model, tokenizer, pairs, images.names, collate)

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

    def names(self, batch: dict) -> list[str]:
        return [self.ids[number] for number in batch["image_ids"].tolist()]


class RetrievalView(PairView):
    timed = f"{PairView.timed}, without the matching"

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


class ClipView(PairView):
    def __init__(self, config: ClipRetrievalConfig, run: Run, setting: PruneSetting, weights: StateDict, source: str):
        """weights: of the model, read from the file `source`."""
        tokenizer = load_clip_tokenizer(config.tokenizer)
        model = clip_from_config(config, len(tokenizer))
        load_clip_weights(model, weights, source)
        super().__init__(config, run, setting, model, tokenizer)

    def words(self, ids: list[int]) -> list[str]:
        """The class token is the end-of-text token: it comes first in memory, and the others follow in their order."""
        return self.tokenizer.convert_ids_to_tokens(ids)[:-1]


VIEWS: dict[str, type[View]] = {"nlvr": NlvrView, "retrieval": RetrievalView, "retrieval_clip": ClipView}


def open_view(config: Config, checkpoint: Path | str, device: str | None = None, temperature: float | None = None) -> View:
    """The view of a model at the temperature that its checkpoint was saved with, or at `temperature`.

    Raises:
        UserError: when the model prunes and there is no temperature, or when its task has no view.
    """
    if config.task not in VIEWS:
        raise UserError(f"runs of task {config.task!r} cannot be shown yet; those of {', '.join(VIEWS)} can")
    run = init_run(device, config.seed)
    saved = read_checkpoint(checkpoint)
    setting = saved_setting(config, saved if temperature is None else {**saved, "temperature": temperature})
    if setting is None:
        raise UserError(f"{checkpoint}: holds no temperature; give one with --temperature, or a run's checkpoint")
    return VIEWS[config.task](config, run, setting, saved["model"], str(checkpoint))


def displayable(picture: Tensor) -> np.ndarray:
    """A normalised picture (3, H, W) as the eye wants it: (H, W, 3) in 0 ... 1."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (picture.float().cpu() * std + mean).clamp(0, 1).permute(1, 2, 0).numpy()


def spread(ids: Sequence[str], number: int) -> list[str]:
    """`number` of `ids` (all, when there are fewer), evenly spaced."""
    number = min(number, len(ids))
    return [ids[(2 * i + 1) * len(ids) // (2 * number)] for i in range(number)]
