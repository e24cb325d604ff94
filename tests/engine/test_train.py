"""Learning rates, and one epoch of training."""

import math

import pytest
import torch
from torch import nn

from engine.compress import of_waiting
from engine.train import CosineSchedule, EpochSums, Precision, Trainer, parameter_groups, train_epoch
from madtp.rule import OFF, PruningRule
from tests import tiny
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
    return train_epoch(trainer, batches, losses, weights or {}, lambda step: OFF, Precision(CPU.device), CPU, "test")


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
    with pytest.raises(UserError, match="not finite at step 10, as in the 9 steps before; lower 'init_lr'"):
        run_epoch(trainer(), [{}] * 60, lambda model, batch, setting: {"task": model.weight.sum() * math.nan})


def test_learnable_tokens_and_their_maps_have_a_rate_of_their_own():
    model = tiny.nlvr(PruningRule(keep="instance"), layers=2)
    apart = {name for name, _ in model.named_parameters() if name == "space_dict" or "alignment" in name}
    whole, *none = parameter_groups(model, 1.0)
    assert len(whole["params"]) == len(list(model.parameters())) and not none
    rest, aligning = parameter_groups(model, 100.0)
    assert len(apart) > 1 and len(aligning["params"]) == len(apart)
    assert len(rest["params"]) + len(apart) == len(whole["params"])
    optimizer = torch.optim.SGD(parameter_groups(model, 100.0), lr=1.0)
    state = Trainer(model, optimizer, Precision(CPU.device).scaler(), CosineSchedule(0.1, 0.0, 2, 2))
    state.update(sum(parameter.sum() for parameter in model.parameters()))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 10.0])


def test_the_first_losses_of_an_epoch_are_shown_before_the_step():
    state, seen = trainer(), []

    def inspect(losses):
        seen.append((state.model.weight.item(), list(losses)))

    batches = [{"x": torch.ones(1, 1)}] * 3
    losses = lambda model, batch, setting: {"task": model(batch["x"]).sum()}  # noqa: E731
    train_epoch(state, batches, losses, {}, lambda step: OFF, Precision(CPU.device), CPU, "test", inspect)
    assert seen == [(1.0, ["task"])]


def test_the_seconds_in_which_no_batch_was_ready_are_counted(monkeypatch):
    """Of three batches, each 2 s late and then 3 s of work, by a clock of the test's own."""
    clock, sums = [100.0], EpochSums()
    monkeypatch.setattr("engine.train.time.time", lambda: clock[0])

    class Late(list):
        def __iter__(self):
            for batch in list.__iter__(self):
                clock[0] += 2.0
                yield batch

    def losses(model, batch, setting):
        clock[0] += 3.0
        return {"task": model.weight.sum()}

    train_epoch(trainer(), Late([{}] * 3), losses, {}, lambda step: OFF, Precision(CPU.device), CPU, "test", sums=sums)
    assert (sums.waited, sums.seconds) == (6.0, 15.0)
    assert of_waiting(sums) == "; 40% of the training waited for pictures: raise num_workers"
    assert of_waiting(EpochSums(seconds=10.0, waited=0.5)) == of_waiting(EpochSums()) == ""
