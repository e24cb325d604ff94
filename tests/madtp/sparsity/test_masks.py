"""N:M masks: what they keep, and that nothing moves what they dropped."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from madtp.flops import multiplied, products
from madtp.sparsity.masks import Pattern, SparseWeights, magnitude_mask, most_in_a_group, pack_weight, unpack_weight

PATTERNS = [Pattern(2, 4), Pattern(1, 4), Pattern(4, 8)]


@given(st.integers(1, 5), st.integers(1, 6), st.sampled_from(PATTERNS), st.integers(0, 99))
@settings(max_examples=40, deadline=None, derandomize=True, database=None)
def test_each_group_keeps_its_largest(rows, groups, pattern, seed):
    weight = torch.randn(rows, groups * pattern.group, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    mask = magnitude_mask(weight, pattern)
    for row, kept in zip(weight.abs().tolist(), mask.tolist(), strict=True):
        for start in range(0, len(row), pattern.group):
            values = range(start, start + pattern.group)
            best = sorted(values, key=lambda i: (-row[i], i))[: pattern.kept]
            assert [i for i in values if kept[i]] == sorted(best)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 40)), min_size=1, max_size=4), st.sampled_from(PATTERNS))
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
def test_training_leaves_at_most_n_of_m_and_whole_what_does_not_divide(shapes, pattern):
    torch.manual_seed(0)
    layers = {str(i): nn.Linear(inputs, outputs) for i, (outputs, inputs) in enumerate(shapes)}
    sparse = SparseWeights({name: layer.weight for name, layer in layers.items()}, pattern)
    assert sparse.left_dense == [name for name, layer in layers.items() if layer.in_features % pattern.group]
    sparse.select(sparse.weights)
    train(list(layers.values()), sparse)
    for name, layer in layers.items():
        filled = layer.weight.count_nonzero(dim=1)
        if name in sparse.left_dense:
            assert (filled == layer.in_features).all() and multiplied(layer.weight) == layer.weight.numel()
            continue
        assert (layer.weight.unflatten(1, (-1, pattern.group)).count_nonzero(dim=-1) <= pattern.kept).all()
        assert products(3, layer.weight) == 3 * layer.weight.numel() * pattern.kept // pattern.group
        assert int(filled.sum()) == multiplied(layer.weight)
    nonzero, total = sparse.nonzero
    assert nonzero * pattern.group == total * pattern.kept


@given(st.integers(1, 4), st.integers(1, 5), st.sampled_from([*PATTERNS, Pattern(3, 5), Pattern(16, 32)]), st.integers(0, 99))
@settings(max_examples=30, deadline=None, derandomize=True, database=None)
def test_a_packed_weight_is_unpacked_to_the_bit(rows, groups, pattern, seed):
    weight = torch.randn(rows, groups * pattern.group, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    weight = weight * magnitude_mask(weight, pattern)
    values, positions = pack_weight(weight, pattern)
    assert values.numel() == weight.numel() * pattern.kept // pattern.group and positions.dtype == torch.uint8
    assert torch.equal(unpack_weight(values, positions, pattern), weight)
    assert most_in_a_group(weight, pattern.group) <= pattern.kept


def test_a_byte_of_2_of_4_holds_two_places_of_two_bits():
    weight = torch.tensor([[0, 5, 0, 7, 1, 2, 0, 0], [0, 0, 3, 4, 0, 6, 0, 0]], dtype=torch.float16)
    values, positions = pack_weight(weight, Pattern(2, 4))
    assert values.tolist() == [[5, 7, 1, 2], [3, 4, 0, 6]]
    assert positions.tolist() == [[1 + 4 * 3, 0 + 4 * 1], [2 + 4 * 3, 0 + 4 * 1]]
    assert most_in_a_group(torch.ones(3, 8), 4) == 4


def train(layers: list[nn.Linear], sparse: SparseWeights, steps: int = 3) -> None:
    """Trains with momentum, weight decay and a gradient limit, which reads all gradients."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(layer(torch.randn(5, layer.in_features)).square().sum() for layer in layers).backward()
        nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        sparse.apply()


def test_gradients_of_masked_weights_reach_nothing_not_even_the_limit_of_the_gradient():
    layer = nn.Linear(8, 3, bias=False)
    sparse = SparseWeights({"w": layer.weight}, Pattern(2, 4))
    sparse.select(["w"])
    x = torch.randn(5, 8)
    layer(x).square().sum().backward()
    full = torch.autograd.grad((x @ layer.weight.t()).square().sum(), layer.weight)[0]  # the hook is on the weight itself
    assert torch.equal(layer.weight.grad != 0, sparse.masks["w"])
    torch.testing.assert_close(layer.weight.grad, full * sparse.masks["w"])


def test_a_masked_weight_gets_no_gradient_that_has_overflowed():
    weight = nn.Parameter(torch.randn(3, 8))
    sparse = SparseWeights({"w": weight}, Pattern(2, 4))
    sparse.select(["w"])
    (weight * torch.where(sparse.masks["w"], 1.0, torch.inf)).sum().backward()
    assert weight.grad.isfinite().all()


def test_what_was_dropped_competes_with_what_it_last_was_until_the_masks_are_fixed():
    weight = nn.Parameter(torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    sparse = SparseWeights({"w": weight}, Pattern(2, 4))
    sparse.select(["w"])
    assert weight.tolist() == [[4, 3, 0, 0]] and sparse.changing
    weight.data[0, 1] = 0.5
    sparse.select(["w"])
    assert weight.tolist() == [[4, 0, 2, 0]]
    sparse.fix()
    weight.data[0, 0] = 0.1
    sparse.select(["w"])
    assert weight[0].count_nonzero() == 2 and weight[0, 1] == weight[0, 3] == 0


def test_masks_that_are_tried_leave_nothing_behind():
    weights = [nn.Parameter(torch.randn(3, 8)) for _ in range(2)]
    before = [weight.detach().clone() for weight in weights]
    sparse = SparseWeights({"w": weights[0]}, Pattern(2, 4), {"w": weights[1]})
    inputs = torch.randn(20, 8) @ torch.randn(8, 8)
    with sparse.tried(["w"]):
        sparse.select(["w"], {"w": inputs.t() @ inputs})
        assert multiplied(weights[0]) == 12 and not torch.equal(weights[1], before[1])
    assert (
        not sparse.changing
        and all(map(torch.equal, weights, before))
        and not sparse.masks
        and multiplied(weights[0]) == weights[0].numel()
    )


def test_followers_share_the_masks():
    weight, follower = (nn.Parameter(torch.randn(3, 8)) for _ in range(2))
    sparse = SparseWeights({"w": weight}, Pattern(2, 4), {"w": follower})
    sparse.select(["w"])
    assert torch.equal(follower != 0, weight != 0) and multiplied(follower) == 12


def test_a_saved_state_gives_the_same_masks_even_where_a_kept_weight_has_become_zero():
    weight = nn.Parameter(torch.randn(2, 8))
    sparse = SparseWeights({"w": weight}, Pattern(2, 4))
    sparse.select(["w"])
    weight.data.zero_()
    other = SparseWeights({"w": weight}, Pattern(2, 4))
    other.load_state_dict(sparse.state_dict())
    assert torch.equal(other.masks["w"], sparse.masks["w"]) and multiplied(weight) == 8


def test_the_meter_can_count_what_is_not_masked_yet():
    weight = nn.Parameter(torch.randn(2, 8))
    sparse = SparseWeights({"w": weight}, Pattern(2, 4))
    with sparse.counted(["w"]):
        assert multiplied(weight) == 8
    assert multiplied(weight) == 16


def test_a_mask_chosen_anew_forgets_what_refitting_did_but_not_what_training_did():
    weights = [nn.Parameter(torch.randn(3, 8)) for _ in range(2)]
    before = [weight.detach().clone() for weight in weights]
    sparse = SparseWeights({"w": weights[0]}, Pattern(2, 4), {"w": weights[1]})
    inputs = torch.randn(20, 8) @ torch.randn(8, 8)
    sparse.select(["w"], {"w": inputs.t() @ inputs})
    assert all((weight - old)[sparse.masks["w"]].abs().max() > 0.01 for weight, old in zip(weights, before, strict=True))
    weights[0].data[sparse.masks["w"]] += 1
    expected = [before[0] + sparse.masks["w"].float(), before[1]]
    sparse.select(["w"])
    for weight, whole in zip(weights, expected, strict=True):
        torch.testing.assert_close(weight.detach(), whole * magnitude_mask(expected[0], Pattern(2, 4)))
