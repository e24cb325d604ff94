"""Closed-form counts of single layers against fvcore and by hand."""

import torch
from fvcore.nn import FlopCountAnalysis
from torch import nn

from madtp import flops


def counted(module: nn.Module, *inputs: torch.Tensor) -> int:
    return int(FlopCountAnalysis(module, inputs).unsupported_ops_warnings(False).total())


def test_linear_layers_and_norms_cost_what_fvcore_says():
    x = torch.randn(1, 7, 12)
    assert flops.linear(7, 12, 20) == counted(nn.Linear(12, 20), x)
    assert flops.layer_norm(7, 12) == counted(nn.LayerNorm(12), x)


def test_attention_is_two_products_of_queries_and_keys():
    class Attention(nn.Module):
        def forward(self, query, key, value):
            return (query @ key.transpose(-2, -1)).softmax(dim=-1) @ value

    query, key = torch.randn(3, 5, 4), torch.randn(3, 9, 4)  # 3 heads of 4 channels
    assert flops.attention(5, 9, 12) == counted(Attention(), query, key, key)
    assert flops.scores(5, 9, 12) * 2 == flops.attention(5, 9, 12)


def test_a_sparse_weight_costs_its_share_and_a_stand_in_that_of_the_weight():
    weight, tokens = nn.Parameter(torch.zeros(8, 16)), torch.tensor([3, 5])
    assert flops.products(tokens, weight).tolist() == [3 * 128, 5 * 128]
    flops.mark_sparse(weight, (2, 4))
    assert flops.products(tokens, weight, weight).tolist() == [3 * 128, 5 * 128]
    stand_in = nn.Parameter(torch.zeros(1))
    stand_in.stands_for = weight
    assert flops.multiplied(stand_in) == 64
    flops.mark_sparse(weight, None)
    assert flops.multiplied(weight) == 128
