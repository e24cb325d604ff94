"""A task as the loop sees it, and what evaluating it gives."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from configs.schema import Config
from engine.sparse_inference import sparse_kernels
from engine.train import Losses, Precision, move
from madtp.pruning import PruneSetting
from madtp.sparsity.layers import sparse_weights
from madtp.sparsity.refit import can_be_fitted, second_moments
from utils import Run, all_reduce_sum, broadcast, logger

Cost = Callable[[nn.Module, dict, PruneSetting], torch.Tensor]

MOMENTS = 2**28  # numbers held at a time while weights are fitted anew: 1 GiB


@dataclass
class Evaluation:
    """metrics in percent; gflops per sample; predictions: {sample id: {"prediction", "score", "tokens_kept", "gflops"}}.

    submission: the predictions of the test split in a format that others read, by the name of its file
    scoring: how the metrics were made, where there is more than one way
    """

    metrics: dict[str, float]
    gflops: float
    predictions: dict[str, dict]
    submission: dict[str, object] = field(default_factory=dict)
    scoring: dict[str, object] = field(default_factory=dict)


@dataclass
class Experiment:
    """A task, as the loop sees it.

    loaders: "train" (not for an evaluation), "calibration", "val", "test"
    losses: (model, batch, setting) -> named losses; `loss_weights` scales them by name
    evaluate: (model, loader, setting) -> Evaluation, over all processes; called in evaluation mode, without gradients
    gflops: (model, batch, setting) -> (S,) GFLOPs of each sample of a batch
    inputs: batch -> what the model's forward takes, of its first sample; for the table that a run prints first
    score: the name of the metric that selects
    reference: GFLOPs of the uncompressed model by the published convention
    deployment: as `gflops`, of a sample in use; None where that is the same
    forward: (model, batch, setting), a pass that runs every layer on no padding; None where `gflops` is one
    checkpoint: what the weights given by `pretrained` came with (a temperature, say)
    """

    config: Config
    run: Run
    model: nn.Module
    loaders: dict[str, object]
    losses: Losses
    evaluate: Callable[[nn.Module, object, PruneSetting], Evaluation]
    gflops: Cost
    score: str
    reference: float
    loss_weights: dict[str, float] = field(default_factory=dict)
    checkpoint: dict = field(default_factory=dict)
    inputs: Callable[[dict], tuple[torch.Tensor, ...]] | None = None
    deployment: Cost | None = None
    forward: Callable[[nn.Module, dict, PruneSetting], object] | None = None

    def __post_init__(self):
        pattern = self.config.pattern
        self.sparse = None if pattern is None else sparse_weights(self.model, pattern, self.config.sparse_layers)
        for name in self.sparse.left_dense if self.sparse else ():
            logger.info("%s stays dense: its input is no multiple of %d", name, self.sparse.pattern.group)

    @property
    def precision(self) -> Precision:
        return Precision(self.run.device, self.config.amp)

    def measure(self, setting: PruneSetting) -> float:
        """Mean GFLOPs per sample on the calibration slice, the same number on every process."""
        return self.mean(self.gflops, setting)

    @torch.no_grad()
    def mean(self, cost: Cost, setting: PruneSetting) -> float:
        """The mean of a cost on the calibration slice."""
        self.model.eval()
        with self.precision.autocast():
            return mean_cost(self.model, self.calibration_batches, cost, setting, self.run)

    @property
    def calibration_batches(self) -> list[dict]:
        """The slice is read once: it is small and never augmented."""
        if not hasattr(self, "_calibration_batches"):
            self._calibration_batches = list(self.loaders["calibration"])
        return self._calibration_batches

    @torch.no_grad()
    def evaluated(self, split: str, setting: PruneSetting) -> Evaluation:
        self.model.eval()
        with self.precision.autocast():
            return self.evaluate(self.model, self.loaders[split], setting)

    def mask(self, names: Iterable[str], setting: PruneSetting) -> None:
        """Mask sparse weights; what is kept takes over, fitted to the calibration slice as `setting` prunes it."""
        weights = {name: self.sparse.weights[name] for name in names}
        if not self.config.refits:
            self.sparse.select(weights)
            return
        for some in portions(weights, MOMENTS):
            moments = self._moments(some, setting)
            for name, moment in moments.items():
                if not can_be_fitted(moment):
                    logger.info("%s is masked and not fitted: the calibration slice gives it nothing, or no finite numbers", name)
            self.sparse.select(some, moments)
            for tensor in (tensor for name in some for tensor in self.sparse.tensors(name)):
                broadcast(tensor)  # what one process has rounded otherwise would stay so

    @torch.no_grad()
    def _moments(self, weights: Mapping[str, torch.Tensor], setting: PruneSetting) -> dict[str, torch.Tensor]:
        """Of what these weights are multiplied with on the calibration slice of all processes."""
        run_all = self.forward or self.gflops

        def forward() -> None:
            for batch in self.calibration_batches:
                run_all(self.model, move(batch, self.run.device), setting)

        self.model.eval()
        with self.precision.autocast():
            moments = second_moments(weights, forward)
        return {name: all_reduce_sum(moment) for name, moment in moments.items()}

    def sparse_kernels(self, setting: PruneSetting) -> AbstractContextManager[dict[str, int]]:
        """Inside, 2:4 weights run sparse kernels where that is faster on a batch of the calibration slice."""

        def forward() -> None:
            self.model.eval()
            with self.precision.autocast():
                batch = move(self.calibration_batches[0], self.run.device)
                (self.deployment or self.gflops)(self.model, batch, setting)

        return sparse_kernels(self.config.sparse_kernels, self.model, self.sparse, self.run.device, forward)


def portions(weights: Mapping[str, torch.Tensor], most: int) -> Iterator[dict[str, torch.Tensor]]:
    """Weights (O, I), in their order, as many together as have no more than `most` second moments, I x I each."""
    some, size = {}, 0
    for name, weight in weights.items():
        if some and size + weight.shape[1] ** 2 > most:
            yield some
            some, size = {}, 0
        some[name] = weight
        size += weight.shape[1] ** 2
    if some:
        yield some


def mean_cost(model: nn.Module, batches: Iterable[dict], cost: Cost, setting: PruneSetting, run: Run) -> float:
    """The mean per sample over the batches of all processes, the same number on every process."""
    total = torch.zeros(2, dtype=torch.float64)
    for batch in batches:
        per_sample = cost(model, move(batch, run.device), setting)
        total += torch.tensor([float(per_sample.sum()), len(per_sample)], dtype=torch.float64)
    total = all_reduce_sum(total.to(run.device))
    return float(total[0] / total[1])
