"""Kept weights that take over from masked ones: the least squares of a layer's outputs, from what its inputs are."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from madtp.sparsity.masks import Pattern, magnitude_mask
from madtp.sparsity.refit import damping, refit, second_moments


def case(seed: int, outputs: int, inputs: int, rows: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A weight, its mask, and inputs that are alike, as those of a trained network are."""
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs)
    return weight, magnitude_mask(weight, Pattern(2, 4)), torch.randn(rows, inputs) @ torch.randn(inputs, inputs)


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6), st.integers(1, 60))
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_each_row_is_the_least_squares_solution_on_what_is_kept(seed, outputs, groups, rows):
    weight, mask, x = case(seed, outputs, 4 * groups, rows)
    fitted = refit(weight, mask, x.t() @ x)
    own = damping(x.t() @ x).sqrt().diag()  # as inputs of their own, one a channel
    for row, kept, result in zip(weight.double(), mask, fitted, strict=True):
        damped = torch.cat([x, own]).double()
        solution = torch.linalg.lstsq(damped[:, kept], damped @ row).solution
        torch.testing.assert_close(result[kept].double(), solution, rtol=1e-2, atol=1e-3)
        assert not result[~kept].any()


def test_outputs_come_much_nearer_where_inputs_are_alike():
    weight, mask, _ = case(0, 8, 32, 1)
    x = torch.randn(200, 12) @ torch.randn(12, 32)
    wanted = F.linear(x, weight)
    missed = [
        float((F.linear(x, part) - wanted).norm() / wanted.norm()) for part in (weight * mask, refit(weight, mask, x.t() @ x))
    ]
    assert missed[1] < 0.1 * missed[0]


@pytest.mark.parametrize("moment", [torch.zeros(32, 32), torch.full((32, 32), torch.inf), torch.full((32, 32), torch.nan)])
def test_a_weight_that_was_given_nothing_or_no_numbers_is_only_masked(moment):
    weight, mask, _ = case(0, 8, 32, 1)
    assert torch.equal(refit(weight, mask, moment), weight * mask)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e4])
def test_channels_of_very_different_size_are_fitted_alike(scale):
    """Behind a GELU some channels are hundreds of times as large as most: these count no less."""
    weight, mask, _ = case(0, 8, 32, 1)
    x = torch.randn(200, 12) @ torch.randn(12, 32)
    plain = refit(weight, mask, x.t() @ x)
    sizes = torch.where(torch.arange(32) == 5, 100.0, 1.0) * scale
    x = x * sizes
    scaled = refit(weight / sizes, mask, x.t() @ x) * sizes
    assert (scaled - plain).norm() < 0.05 * plain.norm()


def test_nothing_changes_where_nothing_is_masked():
    weight, _, x = case(0, 8, 32, 50)
    assert torch.equal(refit(weight, torch.ones_like(weight, dtype=torch.bool), x.t() @ x), weight)


def test_moments_are_those_of_all_that_a_weight_is_multiplied_with():
    torch.manual_seed(0)
    shared, other = nn.Linear(8, 8), nn.Linear(8, 3)
    x = torch.randn(2, 5, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = second_moments({"shared": shared.weight}, lambda: other(shared(shared(x))))
        inner = shared(x)
    rows = torch.cat([x.flatten(0, 1), inner.flatten(0, 1).float()]).double()
    assert set(moments) == {"shared"}
    torch.testing.assert_close(moments["shared"].double(), rows.t() @ rows, rtol=1e-4, atol=1e-4)
