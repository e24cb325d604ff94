"""The parts that tasks share."""

import pytest
import torch

from configs.schema import NlvrConfig
from madtp.rule import OFF
from tasks.task import Task
from utils import Run


class Plain(Task):
    config_class = NlvrConfig

    @staticmethod
    def load_tokenizer(config) -> None:
        return None


def guidance(epoch: float = 0.0, **keys):
    return Plain(NlvrConfig(max_epoch=4, **keys), Run(torch.device("cpu"))).training_guidance(OFF, epoch)


def test_training_aligns_unless_nothing_is_pruned():
    assert guidance().align and guidance().packed and not guidance().negatives
    assert not guidance(p=0.0).align and not guidance(variant="released").packed
    assert guidance(sim_negatives=True).negatives


def test_the_soft_decisions_narrow_over_the_epochs():
    assert guidance(3.0, relaxation=2.0).relaxation == 2.0
    widths = [guidance(epoch, relaxation=4.0, relaxation_end=0.25).relaxation for epoch in range(5)]
    assert widths == pytest.approx([4.0, 2.0, 1.0, 0.5, 0.25])


def test_images_and_texts_are_pairs_in_their_order_by_default():
    vision, language = torch.rand(3, 2, 4), torch.rand(3, 2, 4)
    images, texts, groups = Plain(NlvrConfig(), Run(torch.device("cpu"))).pairs(vision, language)
    assert images is vision and texts is language and groups.tolist() == [0, 1, 2]
