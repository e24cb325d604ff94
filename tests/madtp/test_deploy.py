"""The deployment form: the same number of tokens of every sample, by a slow loop, exported, and solved for a budget."""

import pytest
import torch
from torch import nn

from madtp.blocks import Guidance
from madtp.deploy import KeptTokens, fix_counts, fixed_record, recording, solve_counts
from madtp.importance import token_importance
from madtp.pruning import WHOLE, TokenPruner
from madtp.rule import PruneSetting, PruningRule
from madtp.selection import fixed_gather_and_merge
from models.vit import VisionTransformer
from tests import tiny
from tests.tiny import with_lively_weights

IMAGE, PATCH, WIDTH, DEPTH, HEADS, DIM = 40, 8, 12, 3, 3, 8  # 25 patches
ON = PruneSetting(0.0)


class Tower(nn.Module):
    """An image encoder with its learnable tokens, images (B, 3, H, W) -> class tokens (B, C)."""

    def __init__(self, merge: bool = True):
        super().__init__()
        rule = PruningRule(keep="instance", merge=merge)
        vision = VisionTransformer(IMAGE, PATCH, WIDTH, DEPTH, HEADS, 2.0, make_pruner=lambda dim: TokenPruner(dim, 5, DIM, rule))
        self.vision = with_lively_weights(vision)
        self.learnable = nn.Parameter(torch.randn(5, DIM, generator=torch.Generator().manual_seed(2)))
        self.eval()

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vision(images, Guidance(ON, learnable_tokens=self.learnable))[0][:, 0]

    @property
    def branches(self) -> dict[str, nn.ModuleList]:
        return {"vision": self.vision.blocks}


def pictures(number: int = 3) -> torch.Tensor:
    return torch.randn(number, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_the_best_tokens_stay_in_their_order_and_the_others_are_merged(merge):
    x, importance = torch.randn(2, 6, 4), torch.tensor([[0.1, 0.3, 0.05, 0.2, 0.25, 0.1], [0.4, 0.3, 0.2, 0.1, 0.0, 0.0]])
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    out, stay, kept = fixed_gather_and_merge(x, valid, importance, 3, merge)
    assert kept.tolist() == [[False, True, False, True, True, False], [True, True, True, False, False, False]]
    for sample, rest in ((0, [0, 2, 5]), (1, [3])):
        torch.testing.assert_close(out[sample, :3], x[sample, kept[sample]])
        weights = importance[sample, rest]
        if merge:
            torch.testing.assert_close(out[sample, 3], (weights[:, None] * x[sample, rest]).sum(0) / weights.sum())
    assert stay.all() and out.shape == (2, 3 + merge, 4)


@torch.no_grad()
def test_samples_with_fewer_tokens_keep_them_all():
    x, importance = torch.randn(2, 5, 4), torch.tensor([[0.2] * 5, [0.5, 0.5, 0.0, 0.0, 0.0]])
    valid = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    out, stay, kept = fixed_gather_and_merge(x, valid, importance, 3, True)
    assert kept[1].tolist() == [True, True, False, False, False] and stay[1].tolist() == [True, True, False, False]
    torch.testing.assert_close(out[1, :2], x[1, :2])


@torch.no_grad()
def test_a_tower_with_fixed_numbers_is_a_loop_over_its_blocks():
    model, images = Tower(), pictures()
    fix_counts(model.branches, {"vision": [14, WHOLE, 6]})
    expected = []
    for image in images.split(1):
        x = torch.cat([model.vision.cls_token, model.vision.patch_embed(image)], dim=1) + model.vision.pos_embed
        for block, count in zip(model.vision.blocks, (14, None, 6), strict=True):
            aligned, _ = block.pruner.align(x, None, model.learnable, False)
            x, statistics = block.attend(x, None, block.pruner.rule)
            if count is not None:
                importance = token_importance(statistics, aligned, block.pruner.rule.scores)[0]
                best = sorted(sorted(range(len(importance)), key=lambda i, of=importance: -of[i])[:count])
                rest = [i for i in range(len(importance)) if i not in best]
                merged = (importance[rest, None] * x[0, 1:][rest]).sum(0) / importance[rest].sum()
                x = torch.cat([x[:, :1], x[:, 1:][:, best], merged[None, None]], dim=1)
            x = block.transform(x, None)
        expected.append(model.vision.norm(x)[:, 0])
    torch.testing.assert_close(model(images), torch.cat(expected), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_block_that_keeps_all_is_the_dense_one():
    """Nothing scores its tokens, so that its attention can be fused, and it costs no more than without a pruner."""
    model = Tower()
    fix_counts(model.branches, {"vision": [WHOLE, 14, WHOLE]})
    rules = []
    for block in model.vision.blocks:
        plain = block.attend
        block.attend = lambda x, layout, rule, plain=plain: (rules.append(rule), plain(x, layout, rule))[1]
    model(pictures())
    assert [rule is None for rule in rules] == [True, False, True]
    record = fixed_record([WHOLE, 14, WHOLE], torch.tensor([17]), PruningRule(), PruneSetting(1.0), 3)
    assert [kept is None for kept in record.kept] == [True, False, True]


@torch.no_grad()
def test_it_is_exported_with_a_batch_of_any_size():
    model = Tower()
    fix_counts(model.branches, {"vision": [14, WHOLE, 6]})
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (pictures(3),), dynamic_shapes=({0: batch},), strict=False)
    for number in (1, 2, 7):
        torch.testing.assert_close(program.module()(pictures(number)), model(pictures(number)), atol=1e-5, rtol=1e-5)
    names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any(word in name for name in names for word in ("scatter", "nonzero", "_local_scalar")), names


@torch.no_grad()
def test_the_numbers_are_a_quantile_of_what_samples_keep_and_meet_the_budget():
    model, images = Tower(), pictures(12)
    setting = PruneSetting(8.0)
    guidance = Guidance(setting, learnable_tokens=model.learnable)
    with recording(model.branches) as kept:
        record = model.vision(images, guidance)[2]
    target = float(model.vision.flops(record).double().mean())
    by_block = [each.sum(dim=1) for each in record.kept]
    assert kept["vision"].quantile(1.0) == [int(each.max()) for each in by_block]
    assert kept["vision"].quantile(0.0) == [int(each.min()) for each in by_block]

    def measure(counts) -> float:
        fix_counts(model.branches, counts)
        return float(model.vision.flops(model.vision(images, Guidance(ON, learnable_tokens=model.learnable))[2]).double().mean())

    counts, cost = solve_counts(kept, measure, target)
    assert cost == pytest.approx(target, rel=0.05)  # with so few tokens a step is large
    assert measure(counts) == cost and all(low <= n <= high for low, n, high in zip(
        kept["vision"].quantile(0.0), counts["vision"], kept["vision"].quantile(1.0), strict=True))  # fmt: skip


def test_blocks_that_never_prune_keep_all():
    kept = KeptTokens(2)
    whole, fewer = torch.ones(3, 5, dtype=torch.bool), torch.tensor([[True] * 2 + [False] * 3] * 3)
    kept.add(0, whole, torch.tensor([6] * 3), torch.tensor([6] * 3))
    kept.add(1, fewer, torch.tensor([6] * 3), torch.tensor([4] * 3))
    assert kept.quantile(0.5) == [WHOLE, 2]


def test_the_numbers_of_several_processes_are_those_of_all_samples():
    whole, halves = KeptTokens(2), (KeptTokens(2), KeptTokens(2))
    entering, leaving = torch.tensor([6, 6]), torch.tensor([[6, 6], [5, 4]])
    for half, kept in zip(halves, (torch.ones(2, 5, dtype=torch.bool), torch.eye(2, 5, dtype=torch.bool)), strict=True):
        for part in (whole, half):
            for block in (0, 1):
                part.add(block, kept, entering, leaving[block])
    joined = KeptTokens.joined(halves)
    for share in (0.0, 0.3, 1.0):
        assert joined.quantile(share) == whole.quantile(share)


def test_packed_batches_have_no_fixed_numbers():
    model = Tower()
    fix_counts(model.branches, {"vision": [14, 9, 6]})
    with pytest.raises(ValueError, match="a fixed number of tokens needs a padded batch"):
        model.vision(pictures(), Guidance(ON, packed=True, learnable_tokens=model.learnable))


@pytest.mark.parametrize("merge", [True, False])
@torch.no_grad()
def test_the_record_of_fixed_numbers_is_known_without_a_pass(merge):
    rule, setting = PruningRule(keep="instance", merge=merge), PruneSetting(0.0, prune_from=1)
    model, (ids, mask) = tiny.nlvr(rule), tiny.text([3, 5, 9], width=12)
    counts = {"vision": [3, 12, WHOLE], "language": [2, 5]}
    fix_counts(model.branches, counts)
    output = model(tiny.images(3), ids, mask, Guidance(setting))
    for name, record, tokens in (
        ("vision", output.vision, torch.full((6,), 17)),
        ("language", output.language, mask.sum(dim=1)),
    ):
        said = fixed_record(counts[name], tokens, rule, setting, len(counts[name]))
        for ours, theirs in ((said.entering, record.entering), (said.leaving, record.leaving)):
            assert [each.tolist() for each in ours] == [each.tolist() for each in theirs]
        assert [kept is None for kept in said.kept] == [kept is None for kept in record.kept]
    dense = fixed_record(None, torch.tensor([17]), None, setting, 3)
    assert [int(left) for left in dense.leaving] == [17] * 3 and dense.kept == [None] * 3


@torch.no_grad()
def test_the_whole_nlvr_model_is_exported_with_a_batch_of_any_size():
    model, (ids, mask) = tiny.nlvr(PruningRule(keep="instance")), tiny.text([9, 12, 5, 7, 3], width=12)
    fix_counts(model.branches, {"vision": [12, 9, 6], "language": [8, 5]})

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
            return self.model(*inputs, Guidance(ON)).logits

    batch, images = torch.export.Dim("batch", min=1, max=64), tiny.images(5)
    some = images[:3], ids[:3], mask[:3]
    program = torch.export.export(Logits(), some, dynamic_shapes=(({0: batch},) * 3,), strict=False)
    for number in (1, 5):
        inputs = images[:number], ids[:number], mask[:number]
        torch.testing.assert_close(program.module()(*inputs), Logits()(*inputs), atol=1e-5, rtol=1e-5)
