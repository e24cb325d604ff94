"""Losses and gradients that are not finite: skipped, counted, and too many in a row end the run."""

import math

import pytest
import torch
from torch import nn

from engine.bad_steps import BadSteps
from engine.train import Control, CosineSchedule, EpochSums, Precision, Trainer, train_epoch
from madtp.rule import OFF
from utils import Run, UserError

CPU = Run(torch.device("cpu"))
GOOD = [1.0, 0.5, 0.25, 2.0]


def trainer(fused: bool = True, limit: int = 10, scaled: bool = False, **settings) -> Trainer:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, fused=fused)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=8.0)
    return Trainer(model, optimizer, scaler, CosineSchedule(0.1, 0.0, 2, 8), bad=BadSteps(limit), **settings)


def batches(*values: float) -> list[dict]:
    return [{"x": torch.tensor([[value]]), "ids": [f"sample-{number}"]} for number, value in enumerate(values)]


def losses(model, batch, setting):
    return {"task": model(batch["x"]).pow(2).sum()}


def run(state: Trainer, given: list[dict], losses=losses, sums: EpochSums | None = None, control: Control | None = None) -> dict:
    return train_epoch(state, given, losses, {}, lambda step: OFF, Precision(CPU.device), CPU, "test", None, sums, control)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30], ids=str)  # the square of the last overflows in the gradient
@pytest.mark.parametrize("form", ["fused", "plain", "clipped", "scaled"])
def test_a_bad_step_changes_nothing_but_the_count(form, bad):
    """The weights, moments and mean losses are those of a run without that batch; the schedule counts it."""
    settings = {"fused": {}, "plain": {"fused": False}, "clipped": {"clip_grad": 1.0}, "scaled": {"scaled": True}}[form]
    state, other = trainer(**settings), trainer(**settings)
    means = run(state, batches(*GOOD[:2], bad, *GOOD[2:]))
    for value in GOOD[:2]:
        run(other, batches(value))
    other.step += 1
    run(other, batches(*GOOD[2:]))
    assert torch.equal(state.model.weight, other.model.weight) and state.step == other.step == 5
    ours, theirs = (each.optimizer.state_dict()["state"][0] for each in (state, other))
    assert all(torch.equal(ours[name], theirs[name]) for name in ("exp_avg", "exp_avg_sq", "step"))
    assert int(state.bad.total) == 1 and int(state.bad.in_a_row) == 0 and all(map(math.isfinite, means.values()))


def test_a_gradient_alone_may_be_bad():
    """The derivative of the root at 0 is infinite, the root is not."""
    state = trainer()
    means = run(state, batches(0.0, 1.0), lambda model, batch, setting: {"task": model(batch["x"]).sqrt().sum()})
    assert int(state.bad.total) == 1 and means["task"] == pytest.approx(1.0)


def test_too_many_in_a_row_end_the_run_with_the_samples_of_the_last():
    state = trainer(limit=3)
    with pytest.raises(UserError, match=r"at step 6, as in the 2 steps before; .*; samples of the last batch: sample-5$"):
        run(state, batches(math.nan, math.nan, 1.0, *[math.nan] * 5))
    assert math.isfinite(float(state.model.weight.detach()))


def test_the_last_steps_of_an_epoch_count_too():
    with pytest.raises(UserError, match="sample-3$"):
        run(trainer(limit=3), batches(1.0, *[math.nan] * 3))


def test_an_overflow_of_scaled_gradients_does_not_end_the_run():
    state = trainer(limit=2, scaled=True)
    state.scaler = torch.amp.GradScaler("cpu", enabled=True, init_scale=2.0**127)
    run(state, batches(*[8.0] * 9))
    assert int(state.bad.total) > 2 and int(state.bad.in_a_row) == 0


def test_an_accumulated_step_is_that_of_the_whole_batch():
    whole, parts = trainer(), trainer(accumulate=2)
    mean = lambda model, batch, setting: {"task": model(batch["x"]).pow(2).mean()}  # noqa: E731
    values = torch.tensor(GOOD)[:, None]
    expected = run(whole, [{"x": values}, {"x": values.flip(0)}], mean)
    given = [{"x": values[:2]}, {"x": values[2:]}, {"x": values.flip(0)[:2]}, {"x": values.flip(0)[2:]}, {"x": values}]
    seen = []

    def watched(model, batch, setting):
        seen.append(batch["epoch"])
        return mean(model, batch, setting)

    assert run(parts, given, watched) == pytest.approx(expected)  # the fifth batch fills no step
    torch.testing.assert_close(parts.model.weight, whole.model.weight, rtol=1e-6, atol=0)
    assert parts.step == whole.step == 2 and seen == [0, 0, 0.5, 0.5]


class Wishing(Control):
    def __init__(self):
        self.asked, self.told = 0, []

    def wishes(self):
        self.asked += 1
        return self.asked == 2, self.asked == 3

    def after_step(self, save, stop):
        self.told.append((save, stop))


def test_wishes_are_told_a_step_later():
    control = Wishing()
    run(trainer(), batches(*GOOD), control=control)
    assert control.told == [(False, False), (False, False), (True, False), (False, True)]
