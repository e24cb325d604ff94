"""Trying a compressed checkpoint on given pictures and texts, at any reduce ratio: the answer, what is left, and what it costs."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from engine.threads import threads_for
from engine.train import Precision
from madtp.budget import UnreachableTarget, calibrate
from madtp.rule import OFF, PruneSetting
from tasks.opened import Opened
from tasks.prediction import Prediction, Predictor
from tasks.view import Sample
from tools.visualize import DPI, draw
from utils import UserError

ROUNDS = 3  # of a timing
PICTURES = {"nlvr": ("left image", "right image")}  # tasks with other pictures than one
PAIRS = "texts, one per line"
WORDS = {"nlvr": "sentence", "vqa": "question", "caption": "", "retrieval": PAIRS, "retrieval_clip": PAIRS}


@dataclass
class Outcome:
    """The answer of a model at a reduce ratio.

    answer: lines, the best first
    drawing: the patches and words that are left, (H, W, 3) uint8
    costs: GFLOPs and milliseconds, of the unpruned model and of the pruned one
    """

    answer: list[str]
    drawing: np.ndarray
    costs: dict[str, tuple[float, float]]

    def rows(self) -> list[list[str]]:
        """Returns a table with a heading."""
        (whole, slow), (left, fast) = self.costs["uncompressed"], self.costs["pruned"]
        return [
            ["", "uncompressed", "pruned", ""],
            ["GFLOPs", f"{whole:.4g}", f"{left:.4g}", f"{100 * (1 - left / whole):.1f} % fewer"],
            ["milliseconds", f"{slow:.1f}", f"{fast:.1f}", f"{slow / fast:.2f} times as fast"],
        ]


class Trial:
    """A checkpoint that answers at any reduce ratio, at a temperature that is searched on the very input."""

    def __init__(self, opened: Opened):
        self.opened = opened
        self.config = opened.task.config
        self.setting_at = cache(self._setting_at)

    @property
    def pictures(self) -> tuple[str, ...]:
        """The names of the pictures that the task takes."""
        return PICTURES.get(self.config.task, ("image",))

    @property
    def words(self) -> str:
        """The name of the text that the task takes; empty for none."""
        return WORDS[self.config.task]

    @torch.no_grad()
    def __call__(self, images: Sequence[str], text: str, p: float) -> Outcome:
        """Answers for the pictures at these paths.

        Raises:
            UserError: when a picture or the text is missing, or p is out of reach for this input.
        """
        if not all(images):
            raise UserError(f"choose {' and '.join(f'the {name}' for name in self.pictures)} first")
        texts = tuple(line.strip() for line in text.splitlines() if line.strip()) if self.words else ()
        if self.words and not texts:
            raise UserError(f"write the {self.words} first")
        whole = self._predictor(images, texts, OFF)
        with threads_for(whole.work(), self.opened.task.run.device), self._precision():
            setting = self.setting_at(tuple(images), texts, round(p, 3))
            pruned = self._predictor(images, texts, setting)
            prediction, _ = pruned.predict(), whole.predict()  # they also warm up
            seconds = self._seconds({"uncompressed": whole.predict, "pruned": pruned.predict})
            samples = pruned.samples(pruned.shown(), prediction)
        costs = {"uncompressed": float(prediction.uncompressed), "pruned": float(prediction.gflops)}
        return Outcome(prediction.lines, _pixels(samples), {name: (cost, 1000 * seconds[name]) for name, cost in costs.items()})

    def _setting_at(self, images: tuple[str, ...], texts: tuple[str, ...], p: float) -> PruneSetting:
        """Finds the setting at which these inputs cost a share 1 - p of their GFLOPs."""
        if p <= 0 or self.opened.setting == OFF:
            return OFF

        def measure(setting: PruneSetting) -> float:
            found: Prediction = self._predictor(images, texts, setting).predict()
            return float(found.gflops / found.uncompressed)

        try:
            return calibrate(measure, 1 - p, start=self.opened.setting, max_prune_from=self.opened.model.depth - 1).setting
        except UnreachableTarget as error:
            return error.nearest.setting  # a single input has few tokens: the nearest cost is shown with its GFLOPs

    def _predictor(self, images: Sequence[str], texts: Sequence[str], setting: PruneSetting) -> Predictor:
        return self.opened.task.predictor(self.opened._replace(setting=setting), list(images), list(texts))

    def _precision(self):
        return Precision(self.opened.task.run.device, self.config.amp).autocast()

    def _seconds(self, runs: dict[str, Callable[[], Prediction]]) -> dict[str, float]:
        """Returns the median seconds of each, run in turns."""
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(ROUNDS):
            for name, run in runs.items():
                started = time.perf_counter()
                run()
                if self.opened.task.run.device.type == "cuda":
                    torch.cuda.synchronize()
                taken[name].append(time.perf_counter() - started)
        return {name: statistics.median(values) for name, values in taken.items()}


def _pixels(samples: Sequence[Sample]) -> np.ndarray:
    """Draws samples, (H, W, 3) uint8."""
    figure = draw(samples)
    figure.set_dpi(DPI)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
