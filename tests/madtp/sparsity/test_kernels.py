"""Choosing the 2:4 weights for sparse kernels: recording, timing, replacing and restoring. Timer and converter are injected."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from madtp.flops import mark_sparse, multiplied
from madtp.sparsity.kernels import Milliseconds, Product, Stopwatch, faster_sparse, on_sparse_kernels, products_of
from madtp.sparsity.masks import Pattern, magnitude_mask

HALF, ROWS = torch.bfloat16, 6


class Model(nn.Module):
    """A layer, one that is used twice, a bare parameter, one in 32 bits, and one that is fed with every other channel."""

    def __init__(self):
        super().__init__()
        self.first, self.twice = nn.Linear(16, 8), nn.Linear(8, 8, bias=False)
        self.bare = nn.Parameter(torch.randn(12, 8))
        self.whole, self.strided = nn.Linear(8, 4), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, N, 16) -> (B, N, 12)"""
        strided = self.strided(x[..., ::2])
        x = self.twice(self.twice(self.first(x))[:1])
        with torch.autocast("cpu", enabled=False):
            whole = self.whole(x.float())
        return F.linear(x, self.bare) + whole.sum() + strided.sum()


@pytest.fixture
def model() -> Model:
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def weights(model) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.dim() == 2}


def test_products_are_those_of_the_pass_in_16_bits(model, weights):
    x = torch.randn(2, 3, 16)
    with torch.autocast("cpu", dtype=HALF):
        found = products_of(weights, lambda: model(x))
    assert found == {
        "first.weight": Counter([Product(6, 8, 16, HALF)]),
        "twice.weight": Counter([Product(6, 8, 8, HALF), Product(3, 8, 8, HALF)]),
        "bare": Counter([Product(3, 12, 8, HALF)]),
    }
    assert products_of(weights, lambda: model(x)) == {}


def test_only_what_is_faster_by_more_than_noise_is_chosen():
    """All products of a weight count, as often as they are made."""
    many, few, other, refused = (Product(rows, outputs, 64, HALF) for rows, outputs in ((900, 32), (9, 32), (900, 64), (900, 7)))
    times = {
        many: Milliseconds(1.0, 0.6), few: Milliseconds(0.1, 0.2), other: Milliseconds(1.0, 0.98),
        refused: Milliseconds(1.0, float("inf")),
    }  # fmt: skip
    products = {
        "large": Counter([many]), "small": Counter([few]), "noise": Counter([other]), "refused": Counter([many, refused]),
        "mostly large": Counter({many: 1, few: 3}), "mostly small": Counter({many: 1, few: 4}),
    }  # fmt: skip
    assert faster_sparse(products, times.__getitem__) == ["large", "mostly large"]


def test_each_shape_is_measured_once_dense_and_sparse_in_turn_and_the_median_counts():
    timed, times = [], iter([9.0, 2.0, 1.0, 7.0, 1.0, 2.0, 3.0, 4.0, 3.0, 4.0, 8.0, 8.0])

    def clock(call) -> float:
        timed.append(tuple(call().shape))
        return next(times)

    stopwatch = Stopwatch(torch.device("cpu"), clock, lambda weight: weight.clone())
    small, large = Product(3, 4, 8, torch.float32), Product(5, 4, 8, torch.float32)
    assert [stopwatch(product) for product in (small, large, small)] == [(1.0, 2.0), (3.0, 4.0), (1.0, 2.0)]
    assert timed == [(3, 4)] * 6 + [(5, 4)] * 6


def test_what_is_measured_is_2_of_4_and_what_the_kernel_refuses_or_gets_wrong_never_wins():
    def refusing(weight: torch.Tensor) -> torch.Tensor:
        assert torch.equal(weight != 0, magnitude_mask(weight, Pattern(2, 4)))
        raise RuntimeError("no such shape")

    for convert in (refusing, lambda weight: 1.1 * weight):
        assert Stopwatch(torch.device("cpu"), lambda call: 1.0, convert)(Product(3, 4, 8, HALF)) == (1.0, float("inf"))


def test_weights_are_replaced_inside_only_and_cost_what_they_did(model):
    before = {name: (weight, weight.detach().clone()) for name, weight in model.named_parameters()}
    mark_sparse(model.bare, Pattern(2, 4))
    with (
        pytest.raises(ZeroDivisionError),
        on_sparse_kernels(model, {"first.weight": HALF, "bare": HALF}, lambda weight: weight.repeat(2, 1)),
    ):
        assert model.first.weight.shape == (16, 16) and model.first.weight.dtype == model.bare.dtype == HALF
        assert not model.first.weight.requires_grad and model.twice.weight is before["twice.weight"][0]
        assert multiplied(model.bare) == 12 * 8 // 2 and multiplied(model.first.weight) == 8 * 16
        raise ZeroDivisionError
    for name, weight in model.named_parameters():
        assert weight is before[name][0] and torch.equal(weight, before[name][1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="sparse kernels are a GPU's")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_sparse_product_is_the_dense_one(dtype):
    torch.manual_seed(0)
    layer = nn.Linear(128, 256, device="cuda")
    with torch.no_grad():
        layer.weight *= magnitude_mask(layer.weight, Pattern(2, 4))
    model = nn.Sequential(layer)
    x = torch.randn(3, 37, 128, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", dtype=dtype):
        dense = model(x)
        with on_sparse_kernels(model, {"0.weight": dtype}):
            sparse = model(x)
    torch.testing.assert_close(sparse, dense, rtol=2e-2, atol=2e-2)
    assert Stopwatch(torch.device("cuda"))(Product(1000, 256, 128, dtype)).sparse < float("inf")
