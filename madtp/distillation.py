"""Distillation from the frozen uncompressed model (MADTP++): class-token features of both branches, layer by layer, and logits."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.packing import class_tokens


class Distilled(Protocol):
    """The parts of a teacher or a student that distillation compares.

    Where a branch has no class token, `class_token(branch, tokens, layout)` returns what takes its place, (B, C).

    branches: "vision" and, where there is one, "language" -> its blocks, which return tokens and layout first
    answer_head: the module that outputs the logits (..., classes); None where `pair_logits` computes them
    """

    branches: Mapping[str, Iterable[nn.Module]]
    answer_head: nn.Module | None

    def pair_logits(self, vision: Tensor, language: Tensor) -> Tensor:
        """Returns the logits (B, B) of B images and B texts from the class tokens (B, C) behind their last blocks."""


class OutputRecorder:
    """Records one tensor per module in the next forward pass, and ignores passes after it until `take` is called."""

    def __init__(self, modules: Iterable[nn.Module], read: Callable[[Any], Tensor], training: bool):
        """
        Args:
            read: extracts the tensor from a module's output.
            training: record passes in training mode; False: those in evaluation mode.
        """
        self.modules, self.read, self.training = list(modules), read, training
        self._recorded: list[Tensor] = []
        for module in self.modules:
            module.register_forward_hook(self._record)

    def _record(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if module.training == self.training and len(self._recorded) < len(self.modules):
            self._recorded.append(self.read(output))

    def take(self) -> list[Tensor]:
        """Returns the recorded tensors and starts anew."""
        recorded, self._recorded = self._recorded, []
        return recorded


def first_tokens(model: Distilled, branch: str, output: tuple) -> Tensor:
    """Returns the class tokens (B, C) of a block's output, or what the model has in their place."""
    own = getattr(model, "class_token", None)
    return class_tokens(*output[:2]) if own is None else own(branch, *output[:2])


def logits(output: Any) -> Tensor:
    """Returns the logits of an answer head's output: the output itself, or its attribute."""
    return getattr(output, "logits", output)


class _Recorded:
    """A model with recorders on its branches and its answer head."""

    def __init__(self, model: Distilled, training: bool):
        self.model = model
        self.branches = {
            name: OutputRecorder(blocks, partial(first_tokens, model, name), training) for name, blocks in model.branches.items()
        }
        self.head = OutputRecorder([model.answer_head], logits, training) if model.answer_head is not None else None

    def take(self) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Returns the last pass's class tokens by branch, one tensor per block, and its logits, for pairs in both directions."""
        tokens = {name: branch.take() for name, branch in self.branches.items()}
        if self.head is not None:
            return tokens, self.head.take()
        pairs = self.model.pair_logits(tokens["vision"][-1], tokens["language"][-1])
        return tokens, [pairs, pairs.t()]


class Distillation:
    """The losses of a student against its teacher, which is frozen and in evaluation mode."""

    def __init__(self, teacher: nn.Module, student: nn.Module, distill_temperature: float):
        """
        Args:
            teacher, student: of the same architecture, see `Distilled`.
            distill_temperature: divides both logits (Hinton et al., 2015).
        """
        self.teacher, self.distill_temperature = teacher.eval().requires_grad_(False), distill_temperature
        self._teacher, self._student = _Recorded(cast(Distilled, teacher), False), _Recorded(cast(Distilled, student), True)

    def losses(self, run: Callable[[nn.Module], object], valid: Tensor | None = None) -> dict[str, Tensor]:
        """Returns the losses by name; call it after the student's forward pass of a training step.

        Args:
            run: runs the same pass on the teacher, without pruning.
            valid: marks the logits that count, (...) for logits (..., classes); None: all.
        """
        with torch.no_grad():
            run(self.teacher)
        (teacher_features, teacher_logits), (student_features, student_logits) = self._teacher.take(), self._student.take()
        named = {f"distill_{name}": feature_loss(student_features[name], teacher_features[name]) for name in teacher_features}
        pairs = zip(student_logits, teacher_logits, strict=True)
        divergences = [logit_loss(*pair, self.distill_temperature, valid) for pair in pairs]
        return {**named, "distill_logits": sum(divergences[1:], divergences[0]) / len(divergences)}


def feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Returns the mean squared difference of class tokens, (B, C) each, averaged over the layers."""
    return torch.stack([F.mse_loss(a.float(), b.float()) for a, b in zip(student, teacher, strict=True)]).mean()


def logit_loss(student: Tensor, teacher: Tensor, distill_temperature: float, valid: Tensor | None = None) -> Tensor:
    """Returns T^2 KL(teacher || student) of logits (..., classes), softened by T; the mean over those that are `valid` (...)."""
    learned, taught = (F.log_softmax(part.float() / distill_temperature, dim=-1) for part in (student, teacher))
    divergence = F.kl_div(learned, taught, reduction="none", log_target=True).sum(dim=-1)
    return distill_temperature**2 * (divergence.mean() if valid is None else divergence[valid].mean())
