"""The base class of a task: the parts that entry scripts, the engine and the tools use, and the code that tasks share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor, nn

from configs.schema import Config
from data.loading import Annotated
from data.text import Tokenizer, load_tokenizer
from engine.experiment import Evaluation, Experiment
from madtp.blocks import Guidance
from madtp.distillation import Distillation
from madtp.rule import OFF, PruneSetting
from utils import Run, UserError

ConfigT = TypeVar("ConfigT", bound=Config)
Inputs = tuple[Tensor, ...]

BERT_VOCABULARY = 30524  # bert-base-uncased with [DEC] and [ENC]


@dataclass(frozen=True)
class Demo:
    """The settings of a task's demo and tables on the Shapes data.

    title: heading of the report
    reductions: values of p, beside the uncompressed model
    shapes, options: the task's name in tools/make_shapes.py, and further options of that program
    demo_size, study_size: training pairs (NLVR2) or pictures; the tables' runs take the config's epochs, the demo's fewer
    notes: explanations below the report's table
    """

    title: str
    reductions: tuple[float, ...]
    shapes: str
    options: str
    demo_size: int
    study_size: int
    notes: tuple[str, ...] = ()


class Task(Generic[ConfigT]):
    """A task with its config: data, model, losses and evaluation. Subclasses are listed in tasks/registry.py.

    config_class: its keys
    score: the metric that selects the checkpoint
    columns: of reports: heading -> names of metrics; the first column is the main one
    view, predictor: its `View`, for drawings, and its `Predictor`, for predictions on given pictures and texts
    demo: its demo and study; None where there is none
    """

    config_class: ClassVar[type[Config]]
    score: ClassVar[str] = "acc"
    columns: ClassVar[dict[str, tuple[str, ...]]] = {}
    view: ClassVar[type]
    predictor: ClassVar[type]
    demo: ClassVar[Demo | None] = None

    def __init__(self, config: ConfigT, run: Run):
        self.config, self.run = config, run
        self.tokenizer = self.load_tokenizer(config)
        self.teacher: Distillation | None = None

    @property
    def writes_texts(self) -> bool:
        """Tells whether a prediction is written word by word."""
        return False

    @classmethod
    def name(cls) -> str:
        """The value of the key `task`."""
        return cls.config_class.model_fields["task"].default

    # The model

    @staticmethod
    def load_tokenizer(config: Any) -> Tokenizer:
        """Returns BERT's tokenizer; tasks with another one override this."""
        return load_tokenizer(config.tokenizer)

    def build(self, config: ConfigT) -> nn.Module:
        """Builds the model of a config, this one's or the teacher's, with random weights."""
        raise NotImplementedError

    @staticmethod
    def load(model: nn.Module, weights: dict[str, Tensor], source: str) -> list[str]:
        """Loads weights from the file `source` and returns the names of those that it lacks."""
        raise NotImplementedError

    def reference_gflops(self, model: nn.Module) -> float:
        """Returns the GFLOPs of the uncompressed model by the published convention."""
        return model.reference_gflops()

    # The data

    @staticmethod
    def annotated(config: Any, split: str, name: str) -> Annotated:
        """Reads the annotation file `name` of the split "train", "val" or "test"."""
        raise NotImplementedError

    def loaders(self) -> dict[str, Any]:
        """Returns the loaders "train" (not for an evaluation), "calibration", "val" and "test"."""
        raise NotImplementedError

    def inputs(self, batch: dict) -> Inputs:
        """Returns the tensors of a batch that the model's `costs` and `traced` take."""
        raise NotImplementedError

    def first_sample(self, batch: dict) -> Inputs:
        """Returns `inputs` for the first sample of a batch alone."""
        return tuple(part[:1] for part in self.inputs(batch))

    # Training and evaluation

    def guidance(self, setting: PruneSetting = OFF) -> Guidance:
        """Returns the guidance of a forward pass for inference."""
        return Guidance(setting, packed=self.config.packed)

    def training_guidance(self, setting: PruneSetting, epoch: float = 0.0) -> Guidance:
        """Returns the guidance of a training step. On a CPU packed training was measured to be faster; on a GPU it is padded.

        epoch: epochs done so far, a fraction
        """
        config = self.config
        packed = config.packed and (self.run.device.type == "cpu" or config.method == "tome")  # which knows no padding
        last = config.relaxation if config.relaxation_end is None else config.relaxation_end
        relaxation = config.relaxation * (last / config.relaxation) ** (epoch / config.max_epoch)
        return Guidance(
            setting, align=config.aligns, negatives=config.sim_negatives, packed=packed, relaxation=relaxation
        )

    def losses(self, model: nn.Module, batch: dict, setting: PruneSetting) -> dict[str, Tensor]:
        """Returns the losses of a training step by name."""
        raise NotImplementedError

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"similarity": self.config.sim_weight, **self.config.distill_weights}

    def gflops(self, model: nn.Module, batch: dict, setting: PruneSetting) -> Tensor:
        """Returns the GFLOPs of each sample of a batch, of which p is a share."""
        return sum(model.costs(*self.inputs(batch), guidance=self.guidance(setting))[0].values())

    # GFLOPs of each sample in use, and a pass through every layer without padding; None where they equal `gflops`.
    deployment: Callable[[nn.Module, dict, PruneSetting], Tensor] | None = None
    forward: Callable[[nn.Module, dict, PruneSetting], object] | None = None

    def pairs(self, vision: Tensor, language: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Matches the alignment features of images and texts for diagnostics.

        Args:
            vision, language: (V, K, D) and (L, K, D), in the order in which the model's branches run them.
        Returns:
            those of each pair, (B, K, D) twice, and the group (B,) of each pair, equal for pairs of one image
        """
        return vision, language, torch.arange(len(vision), device=vision.device)

    def evaluate(self, model: nn.Module, loader: Any, setting: PruneSetting) -> Evaluation:
        """Evaluates a split on all processes."""
        raise NotImplementedError

    @classmethod
    def sample_scores(cls, config: Any, predictions: dict[str, Any]) -> dict[str, float]:
        """Returns the score of each test sample, from 0 to 1, for comparing two models sample by sample.

        Empty for a task whose samples have no score of their own.

        Args:
            config: names the annotations.
            predictions: the content of predictions_test.json.
        """
        return {}

    def experiment(
        self, model: nn.Module, loaders: dict[str, Any], checkpoint: dict, losses: Callable, evaluate: Callable
    ) -> Experiment:
        """Assembles the experiment that the engine runs.

        Args:
            checkpoint: the contents of the `pretrained` file beside its weights.
            losses, evaluate: with the signatures of this class's methods.
        """
        return Experiment(
            config=self.config,
            run=self.run,
            model=model,
            loaders=loaders,
            losses=losses,
            evaluate=evaluate,
            gflops=self.gflops,
            score=self.score,
            reference=self.reference_gflops(model),
            loss_weights=self.loss_weights,
            checkpoint=checkpoint,
            inputs=self.first_sample,
            deployment=self.deployment,
            forward=self.forward,
            pairs=self.pairs,
        )

    # The tools

    @classmethod
    def reference_case(cls, config: Any) -> tuple[nn.Module, Inputs]:
        """Returns a model with random weights and the inputs of the paper's reference case; needs no files."""
        raise NotImplementedError

    @staticmethod
    def reference_deployment(config: Any, model: nn.Module, inputs: Inputs, guidance: Guidance) -> Tensor:
        """Returns the GFLOPs (1,) of the reference case in deployment."""
        return model.costs(*inputs, guidance=guidance)[1]


def bert_vocabulary(config: Config) -> int:
    """Returns the tokenizer's size, or BERT's without a tokenizer file: embeddings cost parameters, not GFLOPs."""
    try:
        return len(load_tokenizer(config.tokenizer))
    except UserError:
        return BERT_VOCABULARY
