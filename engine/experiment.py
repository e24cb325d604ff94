"""The interface between a task and the training loop: Experiment, and the Evaluation of a split."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import nn

from configs.schema import Config
from engine.sparse_inference import sparse_kernels
from engine.train import Losses, Precision, move
from engine.workers import side_by_side
from madtp.rule import PruneSetting
from madtp.sparsity.layers import sparse_weights
from madtp.sparsity.refit import can_be_fitted, second_moments
from utils import Run, all_reduce_sum, broadcast, logger

Cost = Callable[[nn.Module, dict, PruneSetting], torch.Tensor]
# Alignment features of the images and of the texts -> those of each pair, and the pairs' groups; see Experiment.
Pairs = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]

MOMENTS = 2**28  # float32 numbers held at a time while weights are refitted: 1 GiB


@dataclass
class Evaluation:
    """The results of evaluating a split.

    metrics: in percent, by name
    gflops: mean per sample
    predictions: {sample id: {"prediction", "score", "tokens_kept", "gflops"}}
    submission: file name -> predictions of the test split in a public format, such as that of an evaluation server
    scoring: details of how the metrics were computed, if there is more than one way
    """

    metrics: dict[str, float]
    gflops: float
    predictions: dict[str, dict]
    submission: dict[str, object] = field(default_factory=dict)
    scoring: dict[str, object] = field(default_factory=dict)


@dataclass
class Experiment:
    """A task with its model, as the training loop needs it.

    loaders: "train" (unless `config.evaluate`), "calibration", "val", "test"
    losses: (model, batch, setting) -> losses by name; `loss_weights` scales them
    evaluate: (model, loader, setting) -> Evaluation over all processes; called in evaluation mode, without gradients
    gflops: (model, batch, setting) -> (S,) GFLOPs of each sample of a batch
    inputs: batch -> arguments of the model's forward for its first sample; for the table at the start of a run
    score: name of the metric that selects the checkpoint
    reference: GFLOPs of the uncompressed model by the published convention
    deployment: like `gflops`, but for a sample in deployment; None if that is the same
    forward: (model, batch, setting) -> a pass through every layer without padding; None if `gflops` makes one
    pairs: alignment features (V, K, D) of the images and (L, K, D) of the texts -> those of each pair, (B, K, D) twice, and the
        group (B,) of each pair, equal for pairs of one image
    checkpoint: the entries of the `pretrained` file besides the weights, such as a temperature
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
    pairs: Pairs | None = None

    def __post_init__(self):
        pattern = self.config.pattern
        self.sparse = None if pattern is None else sparse_weights(self.model, pattern, self.config.sparse_layers)
        for name in self.sparse.left_dense if self.sparse else ():
            logger.info("%s stays dense: its input is no multiple of %d", name, self.sparse.pattern.group)

    @property
    def precision(self) -> Precision:
        return Precision(self.run.device, self.config.amp)

    def measure(self, setting: PruneSetting) -> float:
        """Returns the mean GFLOPs per sample on the calibration subset, the same number on every process."""
        return self.mean(self.gflops, setting)

    @torch.no_grad()
    def mean(self, cost: Cost, setting: PruneSetting, in_turn: bool = False) -> float:
        """Returns the mean of a cost on the calibration subset; in_turn: see `side_by_side`."""
        self.model.eval()
        with self.precision.autocast():
            return mean_cost(self.model, self.calibration_batches, cost, setting, self.run, in_turn)

    @property
    def calibration_batches(self) -> list[dict]:
        """The batches of the calibration subset. They are read once and cached: the subset is small and never augmented."""
        if not hasattr(self, "_calibration_batches"):
            self._calibration_batches = list(self.loaders["calibration"])
        return self._calibration_batches

    @torch.no_grad()
    def evaluated(self, split: str, setting: PruneSetting) -> Evaluation:
        self.model.eval()
        with self.precision.autocast():
            return self.evaluate(self.model, self.loaders[split], setting)

    def mask(self, names: Iterable[str], setting: PruneSetting) -> None:
        """Masks the weights `names`. If the config asks for it, refits the kept weights to make up for the masked ones.

        The refit uses the inputs of the layers on the calibration subset, with tokens pruned by `setting`.
        """
        weights = {name: self.sparse.weights[name] for name in names}
        if not self.config.refits:
            self.sparse.select(weights)
            return
        for some in portions(weights, MOMENTS):
            moments = self._moments(some, setting)
            for name, moment in moments.items():
                if not can_be_fitted(moment):
                    logger.info("%s is masked and not fitted: its inputs on the calibration subset are missing or not finite", name)
            self.sparse.select(some, moments)
            for tensor in (tensor for name in some for tensor in self.sparse.tensors(name)):
                broadcast(tensor)  # rounding may differ between processes, and weights must not

    @torch.no_grad()
    def _moments(self, weights: Mapping[str, torch.Tensor], setting: PruneSetting) -> dict[str, torch.Tensor]:
        """Returns the second moments of the inputs of these weights, over the calibration subset of all processes."""
        run_all = self.forward or self.gflops

        def forward() -> None:
            for batch in self.calibration_batches:
                run_all(self.model, move(batch, self.run.device), setting)

        self.model.eval()
        with self.precision.autocast():
            moments = second_moments(weights, forward)
        return {name: all_reduce_sum(moment) for name, moment in moments.items()}

    def sparse_kernels(self, setting: PruneSetting) -> AbstractContextManager[dict[str, int]]:
        """Returns a context manager in which 2:4 weights run sparse kernels if these are faster on a calibration batch."""

        def forward() -> None:
            self.model.eval()
            with self.precision.autocast():
                batch = move(self.calibration_batches[0], self.run.device)
                (self.deployment or self.gflops)(self.model, batch, setting)

        return sparse_kernels(self.config.sparse_kernels, self.model, self.sparse, self.run.device, forward)


def portions(weights: Mapping[str, torch.Tensor], most: int) -> Iterator[dict[str, torch.Tensor]]:
    """Splits weights (O, I), in order, into portions with at most `most` second moments in total (I x I for each weight)."""
    some, size = {}, 0
    for name, weight in weights.items():
        if some and size + weight.shape[1] ** 2 > most:
            yield some
            some, size = {}, 0
        some[name] = weight
        size += weight.shape[1] ** 2
    if some:
        yield some


def mean_cost(
    model: nn.Module, batches: Iterable[dict], cost: Cost, setting: PruneSetting, run: Run, in_turn: bool = False
) -> float:
    """Returns the mean cost per sample over the batches of all processes, the same number on every process.

    in_turn: see `side_by_side`
    """
    total = torch.zeros(2, dtype=torch.float64)

    def of_batch(batch: dict) -> torch.Tensor:
        return cost(model, move(batch, run.device), setting)

    for per_sample in side_by_side(of_batch, batches, run.device, model, in_turn):
        total += torch.tensor([float(per_sample.sum()), len(per_sample)], dtype=torch.float64)
    total = all_reduce_sum(total.to(run.device))
    return float(total[0] / total[1])
