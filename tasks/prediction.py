"""Predictions on given pictures and texts, along the path that evaluation takes from files to an answer.

I pictures, T texts. A single sample is a batch of one: under `keep: max` or `mean` it is pruned by its own count.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from torch import Tensor

from engine.train import move
from madtp.blocks import TowerRecord
from madtp.flops import GIGA
from madtp.sparsity.masks import counted_dense
from tasks.opened import Opened
from tasks.view import Sample, Samples
from transform.images import eval_transform
from utils import UserError

T = TypeVar("T")
HERE = Path()  # the root of paths that the user gives


@dataclass
class Prediction:
    """An answer and its cost.

    lines: for a reader, the answer first
    values: for a program; as in predictions_test.json where that has them
    gflops, uncompressed: of the whole answer in deployment, and of the same answer without pruning
    records: of the towers, by name
    order: of the drawings, as indices into the batch of `Predictor.shown`
    """

    lines: list[str]
    values: dict
    gflops: Tensor
    uncompressed: Tensor
    records: dict[str, TowerRecord]
    order: Sequence[int] = (0,)

    def tokens(self) -> dict[str, dict[str, list[int]]]:
        """Returns, by tower, the tokens of each picture or text after the last block and before the first."""
        return {
            tower: {"kept": record.leaving[-1].tolist(), "of": record.entering[0].tolist()}
            for tower, record in self.records.items()
        }

    def cost_line(self) -> str:
        fewer = 100 * (1 - float(self.gflops / self.uncompressed))
        return f"{float(self.gflops):.4g} GFLOPs, uncompressed {float(self.uncompressed):.4g} ({fewer:.1f} % fewer)"

    def report(self) -> str:
        """Formats the prediction for a reader."""
        tokens = (f"{tower} {sum(n['kept'])} of {sum(n['of'])}" for tower, n in self.tokens().items())
        return "\n".join([*self.lines, self.cost_line(), f"tokens kept: {', '.join(tokens)}"])

    def content(self) -> dict:
        """Returns the prediction for a program."""
        gflops = {"gflops": float(self.gflops), "gflops_uncompressed": float(self.uncompressed)}
        return {**self.values, **gflops, "tokens": self.tokens()}


class Predictor:
    """The prediction of a task on given files. Subclasses define the inputs that fit, the prediction, and its drawing.

    wants: the pictures and texts that it needs, in words
    """

    wants = ""

    def __init__(self, opened: Opened, images: Sequence[str], texts: Sequence[str]):
        self.opened, self.images, self.texts = opened, images, texts
        self.task, self.config, self.model = opened.task, opened.task.config, opened.model
        self.guidance = self.task.guidance(opened.setting)
        self.transform = eval_transform(self.config.image_size, self.config.text_only, self.config.pictures)
        if not self.fits():
            raise UserError(f"task {self.config.task!r} wants {self.wants}; got {len(images)} --image and {len(texts)} --text")

    def fits(self) -> bool:
        """Tells whether the number of pictures and texts fits the task."""
        raise NotImplementedError

    def predict(self) -> Prediction:
        raise NotImplementedError

    def work(self) -> float:
        """Estimates the GFLOPs of encoding the pictures without pruning: each weight is used once per patch."""
        patches = (self.config.image_size // self.config.patch_size) ** 2
        weights = sum(parameter.numel() for parameter in self.model.branches["vision"].parameters())
        return len(self.images) * patches * weights / GIGA

    def shown(self) -> dict:
        """Returns the batch to draw, in the form of the task's view, without known answers."""
        raise NotImplementedError

    def costs(self, cost: Callable[[T], Tensor], pruned: T, whole: T) -> tuple[Tensor, Tensor]:
        """Returns the total `cost` of a pruned computation, and of the same with nothing pruned and dense weights."""
        with counted_dense(self.opened.sparse):
            uncompressed = cost(whole).sum()
        return cost(pruned).sum(), uncompressed

    def on_device(self, batch: dict) -> dict:
        return move(batch, self.task.run.device)

    def samples(self, batch: dict, prediction: Prediction) -> list[Sample]:
        """Returns the drawings of the batch from `shown`, the best first."""
        names = [Path(path).name for path in self.images]
        drawn = self.task.view(self.opened, Samples((), names, None)).samples(batch)
        return [drawn[place] for place in prediction.order]
