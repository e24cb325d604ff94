"""Attention on every path against PyTorch's own, and the statistics that a rule asks for against the map."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from madtp.attention.attend import attend, causal_mask, merge_heads, similar
from madtp.attention.statistics import map_statistics
from madtp.packing import pack
from madtp.rule import PruningRule
from tests.madtp.attention.cases import Attention


def flat(case: Attention) -> list[torch.Tensor]:
    """Queries, keys and values (B, N, H * D)."""
    return [merge_heads(part) for part in (case.query, case.key, case.value)]


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("prefix", [0, 1, 3])
@torch.no_grad()
def test_outputs_and_statistics_are_those_of_the_map(prefix, packed, training):
    case, rule = Attention([9, 5, 7], prefix=prefix), PruningRule(keep="instance", num_prefix_tokens=prefix)
    heads, layout = flat(case), case.valid
    if packed:
        heads = [pack(part, case.valid) for part in heads]
        layout, heads = heads[0][1], [part for part, _ in heads]
    out, found = attend(*heads, 3, layout, layout, rule=rule, training=training)
    out = layout.pad(out) if packed else out
    expected = F.scaled_dot_product_attention(case.query, case.key, case.value, attn_mask=case.valid[:, None, None])
    torch.testing.assert_close(out[case.valid], merge_heads(expected)[case.valid], atol=1e-5, rtol=1e-5)
    wanted = map_statistics(case.map, expected, case.valid, rule)
    torch.testing.assert_close(found.columns[case.inside], wanted.columns[case.inside], atol=1e-6, rtol=1e-5)
    if prefix:
        torch.testing.assert_close(found.class_attention[case.inside], wanted.class_attention[case.inside], atol=1e-6, rtol=1e-5)
    else:
        assert wanted.class_attention is None


def test_a_recomputed_pass_takes_the_path_of_the_first():
    """Training without gradients, as checkpointing runs it at first, is the same to the bit as with them."""
    case, rule = Attention([9, 9]), PruningRule(keep="instance")
    with torch.no_grad():
        first, one = attend(*flat(case), 3, None, None, rule=rule, training=True)
    again, other = attend(*(part.requires_grad_() for part in flat(case)), 3, None, None, rule=rule, training=True)
    assert torch.equal(first, again) and torch.equal(one.columns, other.columns)


def test_a_random_rule_needs_no_statistics():
    assert attend(*flat(Attention([4])), 3, None, None, rule=PruningRule(method="random"))[1] is None


@pytest.mark.parametrize("order", ["class_first", "class_last"])
def test_a_causal_text_sees_itself_and_what_comes_before(order):
    """The class token is first in memory; in the order "class_last" it sees all tokens, and no other token sees it."""
    mask = causal_mask(4, order, torch.device("cpu"))
    if order == "class_first":
        assert torch.equal(mask, torch.ones(4, 4).tril().bool())
    else:
        assert mask[0].all() and not mask[1:, 0].any() and torch.equal(mask[1:, 1:], torch.ones(3, 3).tril().bool())
    case = Attention([4, 4])
    out, _ = attend(*flat(case), 3, None, None, causal=order)
    expected = F.scaled_dot_product_attention(case.query, case.key, case.value, attn_mask=mask)
    torch.testing.assert_close(out, merge_heads(expected), atol=1e-5, rtol=1e-5)


@given(
    st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=20),
    st.sampled_from([8, 128, 768]),
    st.sampled_from([2**20, 2**24]),
)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_groups_hold_every_sample_once_and_pad_no_more_than_a_group_costs(lengths, width, cost):
    queries, keys = zip(*lengths, strict=True)
    groups = list(similar(queries, keys, width, cost))
    assert sorted(sample for group in groups for sample in group) == list(range(len(lengths)))
    for group in groups:
        area = len(group) * max(queries[i] for i in group) * max(keys[i] for i in group)
        assert 2 * width * (area - sum(queries[i] * keys[i] for i in group)) <= cost
    largest = [max(keys[i] for i in group) for group in groups]
    assert largest == sorted(largest, reverse=True)
