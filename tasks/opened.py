"""A saved model, ready to predict."""

from typing import NamedTuple

from torch import nn

from madtp.rule import PruneSetting
from madtp.sparsity.masks import SparseWeights
from tasks.task import Task


class Opened(NamedTuple):
    """A model on its device, in evaluation mode, with its task and the setting that it prunes at.

    sparse: its sparse weights, masked as they were saved; None where all are dense
    """

    task: Task
    model: nn.Module
    setting: PruneSetting
    sparse: SparseWeights | None
