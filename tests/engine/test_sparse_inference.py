"""When an evaluation runs sparse kernels, and what it says of them. The GPU is a word here: times and kernels are injected."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from engine import sparse_inference as module
from engine.sparse_inference import sparse_kernels
from madtp.sparsity.kernels import PATTERN, Milliseconds, on_sparse_kernels
from madtp.sparsity.masks import Pattern, SparseWeights

GPU, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def run(monkeypatch, caplog) -> Callable:
    """(arguments) -> what is yielded, the types of the two weights inside, and the log. Sparse products of 8 outputs are faster."""
    monkeypatch.setattr(module, "Stopwatch", lambda device: lambda product: Milliseconds(1.0, 0.5 if product.outputs == 8 else 1.5))
    monkeypatch.setattr(module, "on_sparse_kernels", lambda model, dtypes: on_sparse_kernels(model, dtypes, torch.clone))
    caplog.set_level("INFO")

    def run(wanted: bool = True, device=GPU, pattern: Pattern = PATTERN, amp: bool = True, masked: bool = True):
        model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4))
        sparse = SparseWeights({name: weight for name, weight in model.named_parameters() if weight.dim() == 2}, pattern)
        sparse.select(sparse.weights if masked else ())
        with (
            torch.autocast("cpu", enabled=amp),
            sparse_kernels(wanted, model, sparse, device, lambda: model(torch.ones(3, 16))) as used,
        ):
            types = [layer.weight.dtype for layer in model]
        return used, types, caplog.text

    return run


def test_the_faster_ones_are_replaced_and_counted_by_shape(run):
    used, types, said = run()
    assert used == {"used": 1, "of": 2} and types == [torch.bfloat16, torch.float32]
    assert "sparse kernels: 1 of 2 layers, 1 of 8 x 16" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": CPU}, "this is no GPU"),
        ({"amp": False}, "no 2:4 layer runs in 16 bits; set amp: true"),
        ({"pattern": Pattern(1, 4)}, "no weights are 2:4"),
        ({"wanted": False}, "sparse_kernels is false"),
    ],
)
def test_elsewhere_dense_ones_run_and_one_line_says_why(run, given, said):
    used, types, log = run(**given)
    assert used == {"used": 0, "of": 2} and set(types) == {torch.float32}
    assert said in log and len(log.splitlines()) == 1


def test_nothing_is_said_of_weights_that_are_not_masked(run):
    assert run(masked=False) == ({"used": 0, "of": 0}, [torch.float32] * 2, "")


def test_a_model_without_sparse_weights_runs_as_it_is():
    with sparse_kernels(False, nn.Linear(4, 4), None, CPU, lambda: None) as used:
        assert used == {"used": 0, "of": 0}
