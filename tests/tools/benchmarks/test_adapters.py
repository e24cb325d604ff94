"""Pruned models of other libraries against themselves."""

import sys

import pytest
import timm
import torch
from torch import nn

from tests.runs import refusal
from tools.benchmarks import adapters


def tiny() -> nn.Module:
    return timm.models.VisionTransformer(32, 4, embed_dim=32, depth=3, num_heads=2, num_classes=0)


@torch.inference_mode()
def test_a_model_is_timed_pruned_and_as_it_is(monkeypatch):
    """By a clock on which a pass takes as many seconds as its blocks see tokens."""
    seen = []

    def take_turns(forwards, rounds, device):
        taken = []
        for forward in forwards:
            seen.clear()
            forward()
            taken.append([float(sum(seen))] * rounds)
        return taken, None

    def run(model, batch):
        handles = [
            part.register_forward_pre_hook(lambda part, inputs: seen.append(inputs[0].numel()))
            for part in model.modules()
            if isinstance(part, nn.Linear) and part.out_features == 128
        ]
        model(batch)
        for handle in handles:
            handle.remove()

    monkeypatch.setattr(adapters, "time_in_turn", take_turns)
    contender = adapters.Contender("tiny", tiny, lambda number: torch.randn(number, 3, 32, 32), run)
    row = adapters.measure(contender, 0.3, 4, 2, torch.device("cpu"))
    assert row.p == pytest.approx(0.3, abs=0.05) and row.p == pytest.approx(1 - row.gflops_pruned / row.gflops_dense, abs=1e-4)
    assert row.dense == pytest.approx(4 / (4 * 65 * 32 * 3)) and row.pruned / row.dense == pytest.approx(row.speedup)
    assert row.speedup > 1.2


def test_a_name_that_no_model_has_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["adapters.py", "--models", "resnet", "--device", "cpu"])
    assert "--models resnet: in no name; choose from timm" in refusal(capsys, adapters.main)
