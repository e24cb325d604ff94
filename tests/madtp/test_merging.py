"""ToMe against slow loops and the formulas of its paper, and the number of tokens that static methods remove."""

import math

import pytest
import torch
import torch.nn.functional as F

from engine.flop_table import fvcore_gflops
from madtp.attention.attend import attend
from madtp.blocks import Guidance, run_blocks
from madtp.flops import GIGA
from madtp.merging import merge_pairs, most_similar_pairs
from madtp.packing import Packed, pack
from madtp.pruning import TokenPruner
from madtp.rule import PruneSetting, PruningRule
from madtp.selection import static_removal
from models.vit import VisionTransformer
from tests.tiny import with_lively_weights

TOME = PruningRule(method="tome")
IMAGE, PATCH, WIDTH, DEPTH, HEADS = 40, 8, 12, 4, 3  # 25 patches


def tower(rule: PruningRule = TOME) -> VisionTransformer:
    def make_pruner(dim: int) -> TokenPruner:
        return TokenPruner(dim, 5, 8, rule)

    return with_lively_weights(VisionTransformer(IMAGE, PATCH, WIDTH, DEPTH, HEADS, 2.0, make_pruner=make_pruner)).eval()


def pictures(number: int = 2) -> torch.Tensor:
    return torch.randn(number, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))


def test_a_worked_example():
    """Five tokens; 1 and 3 look for partners among 0, 2 and 4. Token 1 is parallel to 4, token 3 nearly to 0."""
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [-1.0, 0.0], [2.0, 0.5], [0.0, 5.0]]])
    valid = torch.ones(1, 5, dtype=torch.bool)
    one, partners = most_similar_pairs(keys, torch.tensor([1]), valid)
    assert one.tolist() == [[False, True, False, False, False]] and partners.tolist() == [[0, 4, 2, 3, 4]]
    both, partners = most_similar_pairs(keys, torch.tensor([2]), valid)
    assert both.tolist() == [[False, True, False, True, False]] and partners.tolist() == [[0, 4, 2, 0, 4]]
    x = torch.tensor([[[10.0], [20.0], [30.0], [40.0], [50.0]]])
    means, sizes = merge_pairs(x, torch.tensor([[1.0, 3.0, 1.0, 1.0, 1.0]]), both, partners)
    assert sizes[0, [0, 2, 4]].tolist() == [2, 1, 4]
    assert means[0, [0, 2, 4], 0].tolist() == [(10 + 40) / 2, 30, (3 * 20 + 50) / 4]


def by_loops(model: VisionTransformer, image: torch.Tensor, removals: list[int]) -> tuple[torch.Tensor, list[int]]:
    """Runs one image (3, H, W) through the tower with ToMe, token by token. Returns its tokens and their number by block."""
    x = model.patch_embed(image[None])[0]
    x = [row for row in torch.cat([model.cls_token[0], x]) + model.pos_embed[0]]
    sizes, counts = [1.0] * len(x), []
    for block, removal in zip(model.blocks, removals, strict=True):
        normed = block.norm1(torch.stack(x))
        query, key, value = (part.unflatten(-1, (HEADS, -1)) for part in block.attn.qkv(normed).chunk(3, dim=-1))
        out = torch.zeros(len(x), HEADS, WIDTH // HEADS)
        for head in range(HEADS):
            for i in range(len(x)):
                products = [float(query[i, head] @ key[j, head]) / math.sqrt(WIDTH // HEADS) for j in range(len(x))]
                powers = [size * math.exp(product) for size, product in zip(sizes, products, strict=True)]
                for j, power in enumerate(powers):
                    out[i, head] += power / sum(powers) * value[j, head]
        x = [row + more for row, more in zip(x, block.attn.proj(out.flatten(1)), strict=True)]
        mean = key.mean(dim=1)
        firsts, seconds = range(2, len(x), 2), range(1, len(x), 2)  # the class token is 0
        edges = [max((float(F.cosine_similarity(mean[i], mean[j], dim=0)), -j) for j in seconds) for i in firsts]
        chosen = sorted(zip(edges, firsts, strict=True), key=lambda edge: -edge[0][0])[: min(removal, len(firsts))]
        totals = {j: x[j] * sizes[j] for j in seconds}
        grown = {j: sizes[j] for j in seconds}
        for (_, partner), token in chosen:
            totals[-partner] = totals[-partner] + x[token] * sizes[token]
            grown[-partner] += sizes[token]
        gone = {token for _, token in chosen}
        x = [totals[i] / grown[i] if i in totals else x[i] for i in range(len(x)) if i not in gone]
        sizes = [grown.get(i, sizes[i]) for i in range(len(sizes)) if i not in gone]
        x = [row + more for row, more in zip(x, block.mlp(block.norm2(torch.stack(x))), strict=True)]
        counts.append(len(x))
    return model.norm(torch.stack(x)), counts


@pytest.mark.parametrize("temperature", [1.5, 4.0, 9.0])
@torch.no_grad()
def test_tome_is_a_slow_loop_over_tokens(temperature):
    model, images = tower(), pictures()
    x, layout, record = model(images, Guidance(PruneSetting(temperature), packed=True))
    rate = 25 / (1 + temperature)
    removals = [int(rate * (i + 1)) - int(rate * i) for i in range(DEPTH)]
    for index, image in enumerate(images):
        expected, counts = by_loops(model, image, removals)
        assert [int(leaving[index]) for leaving in record.leaving] == counts
        torch.testing.assert_close(layout.pad(x)[index, : counts[-1]], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_proportional_attention_is_attention_to_as_many_equal_tokens():
    query, key, value = (torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))
    sizes, copies = torch.tensor([1.0, 3.0, 2.0]), torch.tensor([0, 1, 1, 1, 2, 2])
    packed, layout = pack(query, None)
    merged = Packed((3,), packed.device, sizes=sizes)
    once, _ = attend(packed, key[0], value[0], 2, layout, merged)
    many = Packed((6,), packed.device)
    each, _ = attend(packed, key[0, copies], value[0, copies], 2, layout, many)
    torch.testing.assert_close(once, each)


@torch.no_grad()
def test_each_sample_of_an_uneven_batch_is_merged_as_alone():
    model = tower()
    x, layout = pack(torch.randn(3, 20, WIDTH), torch.arange(20) < torch.tensor([[20], [9], [14]]))
    guidance = Guidance(PruneSetting(4.0), packed=True)
    together, after, _ = run_blocks(model.blocks, x, layout, guidance)
    for i, length in enumerate((20, 9, 14)):
        alone = Packed((length,), x.device)
        tokens, left, _ = run_blocks(model.blocks, layout.pad(x)[i, :length], alone, guidance)
        assert after.lengths[i] == left.total
        torch.testing.assert_close(after.pad(together)[i, : left.total], tokens, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", [TOME, PruningRule(method="stp"), PruningRule(method="stp", mag=False), PruningRule(mag=False)])
@torch.no_grad()
def test_the_closed_form_is_what_fvcore_counts(rule):
    model, images = tower(rule), pictures(1)
    learnable = torch.randn(5, 8)
    packed = Guidance(PruneSetting(4.0), packed=True, learnable_tokens=learnable)
    record = model(images, packed)[2]
    assert int(record.leaving[-1]) < 26
    model.traced = lambda images, guidance: model(images, guidance)[0]
    counted = sum(fvcore_gflops(model, (images,), packed).values())
    assert float(model.flops(record)) / GIGA == pytest.approx(counted, rel=1e-9)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 3.0, 8.0, 1e6])
def test_a_static_method_removes_the_same_number_on_average(temperature):
    entered = torch.tensor([25, 144, 7])
    removals = torch.stack([static_removal(entered, temperature, step) for step in range(12)])
    rates = entered / (1 + temperature)
    assert ((removals - rates).abs() < 1).all()
    assert ((removals.sum(dim=0) - 12 * rates).abs() < 1).all()


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_stp_keeps_the_most_important_tokens_and_each_block_loses_its_number(merge):
    model, images = tower(PruningRule(method="stp", merge=merge)), pictures(3)
    guidance = Guidance(PruneSetting(9.0), learnable_tokens=torch.randn(5, 8))
    _, _, record = model(images, guidance)
    lost = [int((before - after)[0]) for before, after in zip(record.entering, record.leaving, strict=True)]
    assert lost == [2, 3, 2, 3]  # 2.5 on average
    dynamic = tower(PruningRule(merge=merge))
    block, x = dynamic.blocks[0], torch.cat([model.cls_token.expand(3, -1, -1), model.patch_embed(images)], 1) + model.pos_embed
    scores, _ = block.pruner.align(x, None, guidance.learnable_tokens, False)
    _, statistics = block.attend(x, None, block.pruner.rule)
    importance = block.pruner.choose(scores, statistics, torch.ones(3, 25, dtype=torch.bool), 1.0).importance
    for kept, scored in zip(record.kept[0], importance, strict=True):
        assert scored[kept].min() >= scored[~kept].max() and int((~kept).sum()) == 2 + merge


@torch.no_grad()
def test_padded_stp_is_packed_stp():
    model, images = tower(PruningRule(method="stp")), pictures(3)
    learnable = torch.randn(5, 8)
    packed, padded = (
        model(images, Guidance(PruneSetting(5.0), packed=each, learnable_tokens=learnable))[2] for each in (True, False)
    )
    for one, other in zip(packed.kept, padded.kept, strict=True):
        assert torch.equal(one, other)


@torch.no_grad()
def test_without_learnable_tokens_the_threshold_is_a_sparse_average_that_leans_to_the_least_important():
    rule = PruningRule(mag=False, keep="instance")
    model, images = tower(rule), pictures(1)
    block = model.blocks[0]
    x = torch.cat([model.cls_token.expand(1, -1, -1), model.patch_embed(images)], dim=1) + model.pos_embed
    _, statistics = block.attend(x, None, rule)
    choice = block.pruner.choose(None, statistics, torch.ones(1, 25, dtype=torch.bool), 30.0)
    rows = [statistics.class_attention[0], statistics.columns[0]]
    importance = [(a + b) / 2 for a, b in zip(*((row / row.sum()).tolist() for row in rows), strict=True)]
    least_first = sorted(-30.0 * value for value in importance)[::-1]
    support = max(k for k in range(1, 26) if 1 + k * least_first[k - 1] > sum(least_first[:k]))
    tau = (sum(least_first[:support]) - 1) / support
    theta = sum(max(-30.0 * value - tau, 0) * value for value in importance)
    assert min(importance) < theta < 1 / 25
    assert choice.kept[0].tolist() == [value > theta for value in importance]
    assert 2 <= int(choice.kept.sum()) <= 23
