"""The time of a pass by the parts of its blocks."""

import pytest
import torch

from madtp.blocks import Guidance
from madtp.rule import PruneSetting, PruningRule
from tests import tiny
from tools.benchmarks import profile as profiles


def ticking(monkeypatch) -> None:
    """Makes every look at the clock a second later than the one before."""
    clock = iter(range(10**6))
    monkeypatch.setattr(profiles.time, "perf_counter", lambda: float(next(clock)))


@torch.no_grad()
def test_each_part_of_each_block_is_timed_once_in_a_pass(monkeypatch):
    model = tiny.nlvr(PruningRule(keep="instance"), layers=2)
    blocks = [*model.visual_encoder.blocks, *model.text_encoder.encoder.layer]
    inputs, waits = (tiny.images(2), *tiny.text([5, 9])), []
    ticking(monkeypatch)
    found = profiles.profile(lambda: model(*inputs, Guidance(PruneSetting(3.0))), blocks, 2, lambda: waits.append(1))
    assert found.pop(profiles.WHOLE) == 1000.0 * (1 + 2 * 4 * len(blocks))  # the clock is looked at before and after each part
    assert found == dict.fromkeys((*profiles.PARTS.values(), *profiles.PRUNING.values()), 1000.0 * len(blocks))
    assert len(waits) >= 2 * 3 * 4 * len(blocks)  # the device is waited for before the clock is looked at


@torch.no_grad()
def test_blocks_are_as_before_afterwards():
    model = tiny.nlvr(PruningRule(keep="instance"), layers=2)
    block = model.visual_encoder.blocks[0]
    before = dict(vars(block)), dict(vars(block.pruner))
    with pytest.raises(RuntimeError), profiles.timed(model.visual_encoder.blocks, lambda: None):
        assert vars(block) != before[0]
        raise RuntimeError
    assert (vars(block), vars(block.pruner)) == before


def test_the_rest_lies_outside_of_the_blocks():
    found = {"attention": 30.0, "alignment": 10.0, profiles.WHOLE: 50.0}
    assert profiles.described(found) == "attention 60.0%, alignment 20.0%, outside of blocks 20.0% of 50.0 ms"
