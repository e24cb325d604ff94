"""A model at one prune setting with its test samples, and the tokens that survive: the contents of drawings and reports.

B samples, P pictures each, L blocks of a tower, N text tokens of the longest text. Class tokens are left out.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from configs.schema import Config
from configs.sizes import Pictures
from data.loading import Loader, build_loader
from data.text import Tokenizer
from engine.train import Precision, move
from engine.workers import side_by_side
from madtp.blocks import TowerRecord
from madtp.rule import OFF
from madtp.trace import surviving, tokens_by_block
from tasks.opened import Opened
from transform.images import Preparation
from utils import Run, UserError


@dataclass(frozen=True)
class Sample:
    """The contents of a drawing of one sample, whatever the task.

    pictures: label, picture (H, W, 3) in 0 ... 1, patches alive after each block (blocks, rows, columns) bool
    texts: words, words alive after each layer (layers, words) bool
    said: label, text: the model's answer, and the truth
    """

    id: str
    heading: str
    pictures: list[tuple[str, np.ndarray, np.ndarray]]
    texts: list[tuple[list[str], np.ndarray]]
    said: list[tuple[str, str]] = field(default_factory=list)


class Samples(NamedTuple):
    """A data set with the ids of its samples, and the function that collates them."""

    dataset: Dataset
    ids: list[str]
    collate: Callable[[list], dict]


class View:
    """The part of views that tasks share. Subclasses define their test samples, the forward pass and the headings.

    labels: names of a sample's pictures, in their order
    image_key: key of a batch's pictures, (B, 3, H, W) or (B, P, 3, H, W)
    text_keys: keys of its texts, token ids and attention mask (B, L)
    timed: description of `forward`
    """

    labels: tuple[str, ...] = ("image",)
    image_key = "image"
    text_keys = ("input_ids", "attention_mask")
    timed = ""

    def __init__(self, opened: Opened, samples: Samples):
        self.task, self.model, self.setting, _ = opened
        self.config, self.tokenizer, self.run = self.task.config, self.task.tokenizer, self.task.run
        self.dataset, self.ids, self.collate = samples
        self.precision = Precision(self.run.device, self.config.amp)
        self.guidance = self.task.guidance(self.setting)

    @staticmethod
    def test_samples(config: Config, tokenizer: Tokenizer) -> Samples:
        """Returns the samples of the test split."""
        raise NotImplementedError

    def compute(self, batch: dict) -> object:
        """Runs the forward pass over a batch that is on the device."""
        raise NotImplementedError

    def records(self, output: object) -> dict[str, TowerRecord]:
        """Returns the record of "image", all first pictures before all second ones, and of "text" where texts are pruned."""
        raise NotImplementedError

    def headings(self, batch: dict, output: object) -> list[str]:
        """Returns a few words on each sample, such as the prediction."""
        return ["" for _ in self.names(batch)]

    def said(self, batch: dict, output: object) -> list[list[tuple[str, str]]]:
        """Returns label and text of each sample's answer and truth."""
        return [[] for _ in self.names(batch)]

    def gflops(self, batch: dict, output: object) -> Tensor:
        """Returns the GFLOPs of each sample in deployment, (B,)."""
        return self.model.costs(*self.inputs(batch), guidance=self.guidance)[1]

    def names(self, batch: dict) -> list[str]:
        """Returns the samples' ids."""
        raise NotImplementedError

    def words(self, ids: list[int]) -> list[str]:
        """Returns the tokens of an unpadded text without its class token, in the order of the text."""
        return self.tokenizer.convert_ids_to_tokens(ids)[1:]

    def inputs(self, batch: dict) -> tuple[Tensor, ...]:
        return batch[self.image_key], *(batch[key] for key in self.text_keys)

    def batches(self, ids: Sequence[str]) -> Loader:
        """Returns the samples with these ids in batches of the evaluation's size."""
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

    def forwards(self, batches: Sequence[dict]) -> Iterator[object]:
        """Yields the forward passes of batches, side by side where evaluation runs them so."""
        return side_by_side(self.forward, batches, self.run.device, self.model, self.task.writes_texts)

    def tokens(self, output: object) -> dict[str, Tensor]:
        """Returns the tokens by block, one row per picture or text, by the name of the tower."""
        return {tower: tokens_by_block(record) for tower, record in self.records(output).items()}

    def tokens_left(self, output: object) -> Tensor:
        """Counts the tokens of each sample after the last block of all towers, class and merged tokens included, (B,)."""
        left = [record.leaving[-1] for record in self.records(output).values()]
        samples = len(left[0]) // len(self.labels)
        return sum(tower.unflatten(0, (-1, samples)).sum(dim=0) for tower in left)

    @torch.no_grad()
    def samples(self, batch: dict) -> list[Sample]:
        """Returns the drawings of a batch. The GFLOPs in their headings are those of deployment."""
        if self.config.variant == "released":
            raise UserError("variant 'released' hands its tokens on out of order; tokens can be traced in variant 'paper' only")
        names, batch = self.names(batch), move(batch, self.run.device)
        with self.precision.autocast():
            output = self.compute(batch)
            headings, said, gflops = (part(batch, output) for part in (self.headings, self.said, self.gflops))
        records = self.records(output)
        patches = self._patches(records["image"])
        texts = self._texts(batch, records["text"]) if "text" in records else [[] for _ in names]
        edge = self.config.image_size // self.config.patch_size * self.config.patch_size
        images = batch[self.image_key][..., :edge, :edge]
        images = displayable(images.reshape(len(names), len(self.labels), *images.shape[-3:]), self.config.pictures)
        strength = "uncompressed" if self.config.p == 0 else f"p = {self.config.p:g}"
        strength += "" if self.setting == OFF else f" (T = {self.setting.temperature:.4g})"
        costs = zip(self.tokens_left(output).tolist(), gflops.tolist(), strict=True)
        return [
            Sample(
                name,
                f"{name}, {strength}: {headings[i]}{'; ' if headings[i] else ''}{left} tokens left, {cost:.4g} GFLOPs",
                [(label, images[i, place], patches[place, i]) for place, label in enumerate(self.labels)],
                texts[i],
                said[i],
            )
            for i, (name, (left, cost)) in enumerate(zip(names, costs, strict=True))
        ]

    def _patches(self, record: TowerRecord) -> np.ndarray:
        """Marks the surviving patches, (P, B, L, rows, columns) bool."""
        pictures, side = len(record.leaving[-1]), self.config.image_size // self.config.patch_size
        whole = torch.ones(pictures, side * side, dtype=torch.bool, device=self.run.device)
        prefix = int(record.entering[0][0]) - side * side  # the class token, which SigLIP has not
        alive = surviving(record, whole, prefix).unflatten(-1, (side, side))
        return alive.unflatten(0, (len(self.labels), -1)).cpu().numpy()

    def _texts(self, batch: dict, record: TowerRecord) -> list[list[tuple[list[str], np.ndarray]]]:
        """Returns each sample's words, and marks the surviving ones (L, words) bool."""
        all_ids, mask = batch[self.text_keys[0]], batch[self.text_keys[1]].bool()
        alive = surviving(record, mask[:, 1:]).cpu().numpy()  # as many tokens are in memory behind the class token
        texts = []
        for ids, inside, layers in zip(all_ids, mask, alive, strict=True):
            words = self.words(ids[inside].tolist())
            texts.append([(words, layers[:, : len(words)])])
        return texts


def displayable(images: Tensor, pictures: Pictures) -> np.ndarray:
    """Undoes the normalisation of pictures: (..., 3, H, W) -> (..., H, W, 3) in 0 ... 1."""
    preparation = Preparation.of(pictures)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preparation.mean, preparation.std))
    return (images.float().cpu() * std + mean).clamp(0, 1).movedim(-3, -1).numpy()


def spread(ids: Sequence[str], number: int) -> list[str]:
    """Returns `number` of `ids` (all, when there are fewer), evenly spaced."""
    number = min(number, len(ids))
    return [ids[(2 * i + 1) * len(ids) // (2 * number)] for i in range(number)]
