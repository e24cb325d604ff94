"""Distillation from the frozen uncompressed model (MADTP++): class-token features of both branches layer by layer, and logits.

Teacher and student tell by `branches` the blocks of their branches, and by `answer_head` or `pair_logits` their logits.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from madtp.packing import class_tokens


class Distilled(Protocol):
    """branches: "vision" and, where there is one, "language" -> its blocks, which return tokens and layout first.

    answer_head: the module whose output are the logits (..., classes); None where `pair_logits` gives them.
    """

    branches: Mapping[str, Iterable[nn.Module]]
    answer_head: nn.Module | None

    def pair_logits(self, vision: Tensor, language: Tensor) -> Tensor:
        """Of B images and B texts from the class tokens (B, C) that their branches end with, (B, B)."""


class Listener:
    """What modules put out in their next pass, one tensor a module; passes after it are not listened to."""

    def __init__(self, modules: Iterable[nn.Module], read: Callable[[object], Tensor], training: bool):
        """training: whether passes in training mode are those to listen to, or the others."""
        self.modules, self.read, self.training = list(modules), read, training
        self._heard: list[Tensor] = []
        for module in self.modules:
            module.register_forward_hook(self._listen)

    def _listen(self, module: nn.Module, inputs: tuple, output: object) -> None:
        if module.training == self.training and len(self._heard) < len(self.modules):
            self._heard.append(self.read(output))

    def take(self) -> list[Tensor]:
        """What was heard; the next pass is listened to again."""
        heard, self._heard = self._heard, []
        return heard


def first_tokens(output: tuple) -> Tensor:
    """(B, C), the class tokens of what a block returns."""
    return class_tokens(*output[:2])


def logits(output: object) -> Tensor:
    """Of what an answer head returns: the logits themselves, or an output that has them."""
    return getattr(output, "logits", output)


class _Heard:
    """A model with listeners on its branches and its answer head."""

    def __init__(self, model: Distilled, training: bool):
        self.model = model
        self.branches = {name: Listener(blocks, first_tokens, training) for name, blocks in model.branches.items()}
        self.head = Listener([model.answer_head], logits, training) if model.answer_head is not None else None

    def take(self) -> tuple[dict[str, list[Tensor]], list[Tensor]]:
        """Of the pass just done: the class tokens of each branch, a tensor a block; the logits, of pairs either way."""
        tokens = {name: branch.take() for name, branch in self.branches.items()}
        if self.head is not None:
            return tokens, self.head.take()
        pairs = self.model.pair_logits(tokens["vision"][-1], tokens["language"][-1])
        return tokens, [pairs, pairs.t()]


class Distillation:
    """The losses of a student beside its teacher, which does not learn and is in evaluation mode."""

    def __init__(self, teacher: nn.Module, student: nn.Module, temperature: float):
        """
        Args:
            teacher, student: see `Distilled`; of one architecture.
            temperature: by which both logits are divided (Hinton et al., 2015).
        """
        self.teacher, self.temperature = teacher.eval().requires_grad_(False), temperature
        self._teacher, self._student = _Heard(teacher, training=False), _Heard(student, training=True)

    def losses(self, run: Callable[[nn.Module], object], valid: Tensor | None = None) -> dict[str, Tensor]:
        """To be called after the student's pass of a step.

        Args:
            run: the same pass for the teacher, without pruning.
            valid: which of the logits, (...) of (..., classes), count; all by default.
        """
        with torch.no_grad():
            run(self.teacher)
        (teacher_features, teacher_logits), (student_features, student_logits) = self._teacher.take(), self._student.take()
        named = {f"distill_{name}": feature_loss(student_features[name], teacher_features[name]) for name in teacher_features}
        pairs = zip(student_logits, teacher_logits, strict=True)
        return {**named, "distill_logits": sum(logit_loss(*pair, self.temperature, valid) for pair in pairs) / len(student_logits)}


def feature_loss(student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    """Mean over the layers of the mean squared difference of class tokens, (B, C) each."""
    return torch.stack([F.mse_loss(a.float(), b.float()) for a, b in zip(student, teacher, strict=True)]).mean()


def logit_loss(student: Tensor, teacher: Tensor, temperature: float, valid: Tensor | None = None) -> Tensor:
    """T^2 KL(teacher || student) of logits (..., classes), softened by T; mean over those that are `valid` (...)."""
    soft = [F.log_softmax(part.float() / temperature, dim=-1) for part in (student, teacher)]
    divergence = F.kl_div(*soft, reduction="none", log_target=True).sum(dim=-1)
    return temperature**2 * (divergence.mean() if valid is None else divergence[valid].mean())
