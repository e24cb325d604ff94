"""Batches side by side on a CPU: in order, in the caller's modes, and with the numbers of one after the other."""

import threading
import time

import pytest
import torch
from torch import nn

from engine.experiment import mean_cost
from engine.workers import side_by_side
from madtp.blocks import Guidance
from madtp.rule import PruneSetting, PruningRule
from tests import tiny
from utils import Run

CPU, MODEL = torch.device("cpu"), nn.Identity()


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_come_in_order_and_few_batches_are_held(three_threads):
    taken, seen = [], set()

    def batches():
        for number in range(12):
            taken.append(number)
            yield number

    def slow(number: int) -> int:
        seen.add(threading.get_ident())
        time.sleep(0.02 if number % 3 == 0 else 0.001)
        return 10 * number

    results = side_by_side(slow, batches(), CPU, MODEL)
    assert next(results) == 0 and len(taken) <= 5
    assert [*results] == [10 * number for number in range(1, 12)]
    assert 1 < len(seen) <= 3 and torch.get_num_threads() == 3


def test_each_batch_has_one_thread_and_the_modes_of_the_caller(three_threads):
    def modes(batch: int):
        return torch.get_num_threads(), torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert set(side_by_side(modes, range(4), CPU, MODEL)) == {(1, False, True)}
    assert set(side_by_side(modes, range(4), CPU, MODEL)) == {(1, True, False)}
    assert set(side_by_side(modes, range(4), torch.device("cuda"), MODEL)) == {(3, True, False)}
    assert set(side_by_side(modes, range(4), CPU, object())) == {(3, True, False)}  # an inference engine has its own threads


def test_an_error_comes_through_and_ends_the_others(three_threads):
    def failing(number: int) -> int:
        if number == 2:
            raise ValueError("batch 2")
        return number

    with pytest.raises(ValueError, match="batch 2"):
        list(side_by_side(failing, range(100), CPU, MODEL))
    assert torch.get_num_threads() == 3


def test_a_cost_is_measured_side_by_side_unless_it_must_be_in_turn(three_threads):
    def threads(model, batch: dict, setting: PruneSetting) -> torch.Tensor:
        return torch.full((2,), float(torch.get_num_threads()))

    batches = [{"x": torch.zeros(2)} for _ in range(4)]
    given = (MODEL, batches, threads, PruneSetting(), Run(CPU))
    assert mean_cost(*given) == 1 and mean_cost(*given, in_turn=True) == 3


@torch.no_grad()
@pytest.mark.parametrize("method", ["dtp", "random"])
def test_a_model_gives_the_numbers_that_it_gives_in_turn(three_threads, method):
    model = tiny.nlvr(PruningRule(method=method, keep="instance")).eval()
    batches = [(tiny.images(3, seed), *tiny.text([9, 4, 7], seed)) for seed in range(6)]

    def scores(batch):
        return model(*batch, Guidance(PruneSetting(3.0), packed=True)).logits

    torch.manual_seed(5)
    if method == "dtp":
        torch.set_num_threads(1)  # sums over several threads round otherwise
    expected = [scores(batch) for batch in batches]
    torch.manual_seed(5)
    torch.set_num_threads(3)
    found = list(side_by_side(scores, batches, CPU, model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
