"""Learning rates, and one epoch of training."""

import math

import pytest
import torch
from torch import nn

from engine.train import CosineSchedule, Precision, Trainer, train_epoch
from madtp.pruning import OFF
from utils import Run, UserError

CPU = Run(torch.device("cpu"))


def test_the_published_schedule_moves_once_an_epoch():
    """lr = (init - min) / 2 * (1 + cos(pi * epoch / epochs)) + min."""
    schedule = CosineSchedule(3e-6, 1e-7, epochs=4, steps_per_epoch=5)
    expected = [3e-6, 2.5753e-6, 1.55e-6, 5.2470e-7]  # by hand: cos(0), cos(45), cos(90), cos(135 degrees)
    assert [schedule.rate(5 * epoch) for epoch in range(4)] == pytest.approx(expected, rel=1e-4)
    for epoch in range(4):
        assert len({schedule.rate(5 * epoch + step) for step in range(5)}) == 1
    assert schedule.rate(20) == pytest.approx(1e-7)


def test_a_schedule_by_step_falls_at_every_step():
    schedule = CosineSchedule(1.0, 0.0, epochs=2, steps_per_epoch=3, per_step=True)
    rates = [schedule.rate(step) for step in range(7)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(7)])
    assert rates == sorted(rates, reverse=True) and rates[3] == pytest.approx(0.5) and rates[6] == pytest.approx(0)


def test_the_rate_rises_linearly_while_warming_up():
    schedule = CosineSchedule(1.0, 0.0, epochs=1, steps_per_epoch=100, warmup_steps=4, per_step=True)
    assert [schedule.rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert 0.9 < schedule.rate(4) < 1.0


def trainer(lr: float = 0.1) -> Trainer:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=123.0)  # the schedule's rate must replace it
    return Trainer(model, optimizer, Precision(CPU.device).scaler(), CosineSchedule(lr, 0.0, 2, 2))


def run_epoch(trainer: Trainer, batches: list, losses, weights=None) -> dict[str, float]:
    return train_epoch(trainer, batches, losses, weights or {}, OFF, Precision(CPU.device), CPU, "test")


def test_an_epoch_is_gradient_descent_on_the_weighted_losses():
    """w <- w - lr * (2 w x^2 + 0.5 * 3), by hand for two steps."""
    state, seen = trainer(), []

    def losses(model, batch, setting):
        seen.append((model.training, setting))
        return {"task": model(batch["x"]).pow(2).sum(), "similarity": 3 * model.weight.sum()}

    batches = [{"x": torch.tensor([[x]]), "ids": ["a"]} for x in (1.0, 0.5)]
    means = run_epoch(state, batches, losses, {"similarity": 0.5})
    w, sums = 1.0, [0.0, 0.0]
    for x in (1.0, 0.5):
        sums = [sums[0] + (w * x) ** 2, sums[1] + 3 * w]
        w -= 0.1 * (2 * w * x**2 + 0.5 * 3)
    assert float(state.model.weight.detach()) == pytest.approx(w) and state.step == 2
    assert means == pytest.approx({"task": sums[0] / 2, "similarity": sums[1] / 2, "total": sums[0] / 2 + sums[1] / 4})
    assert seen == [(True, OFF)] * 2


def test_the_second_epoch_has_the_second_rate():
    state = trainer()
    for _ in range(2):
        run_epoch(state, [{}, {}], lambda model, batch, setting: {"task": model.weight.sum()})
    assert float(state.model.weight.detach()) == pytest.approx(1 - 2 * 0.1 - 2 * 0.05)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(UserError, match="the loss is nan at step 50; lower 'init_lr'"):
        run_epoch(trainer(), [{}] * 60, lambda model, batch, setting: {"task": model.weight.sum() * math.nan})
