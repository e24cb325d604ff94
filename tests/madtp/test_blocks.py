"""The order of a block's parts, the record of a pass, and stochastic depth."""

import pytest
import torch
from torch import nn

from madtp.blocks import DropPath, Guidance, PrunedBlock, TowerRecord, block_flops, dense_record, run_blocks
from madtp.importance import AttentionStatistics
from madtp.packing import Packed, pack
from madtp.pruning import TokenPruner
from madtp.rule import PruneSetting, PruningRule

WIDTH = 6


class Spy(PrunedBlock):
    """A block that writes down the order and the inputs of its parts."""

    def __init__(self, seen: list):
        super().__init__()
        self.pruner, self.seen = TokenPruner(WIDTH, 3, WIDTH, PruningRule(keep="instance")), seen

    def attend(self, x, layout, rule):
        self.seen.append(("attend", x.shape[1], rule is not None))
        statistics = AttentionStatistics(x[:, 1:].sum(dim=2).exp(), x[:, 1:].sum(dim=2).exp())
        return x + 1, statistics

    def transform(self, x, layout, *context):
        self.seen.append(("transform", x.shape[1], context))
        return 2 * x

    def attend_flops(self, tokens):
        return tokens

    def transform_flops(self, tokens, *context):
        return 10 * tokens


def run(setting: PruneSetting, align: bool = False) -> tuple[torch.Tensor, TowerRecord, list]:
    torch.manual_seed(0)
    seen, x = [], torch.randn(2, 9, WIDTH)
    blocks = nn.ModuleList(Spy(seen) for _ in range(3))
    guidance = Guidance(setting, align, learnable_tokens=torch.randn(3, WIDTH))
    x, _, record = run_blocks(blocks, x, None, guidance, "image")
    return x, record, seen


def test_attention_sees_all_tokens_and_the_layers_behind_it_those_that_are_left():
    _, record, seen = run(PruneSetting(1.0, prune_from=1))
    lengths = [int(n.max()) for n in record.leaving]
    assert lengths[0] == 9 and lengths[2] < lengths[1] < 9
    assert [kind for kind, *_ in seen] == ["attend", "transform"] * 3
    assert [length for kind, length, _ in seen if kind == "attend"] == [9, *lengths[:2]]
    assert [length for kind, length, _ in seen if kind == "transform"] == lengths
    assert [wanted for kind, _, wanted in seen if kind == "attend"] == [False, True, True]
    assert all(context == ("image",) for kind, _, context in seen if kind == "transform")


def test_the_record_knows_what_each_block_ran():
    _, record, _ = run(PruneSetting(1.0, prune_from=2), align=True)
    assert [kept is None for kept in record.kept] == [True, True, False]
    assert [record.execution(i).active for i in range(3)] == [False, False, True]
    assert record.execution(0).aligned and record.features.shape == (2, 3, WIDTH)
    whole = record.unpruned()
    assert whole.features is None and [n.tolist() for n in whole.leaving] == [[9, 9]] * 3
    _, plain, _ = run(PruneSetting())
    assert plain.features is None and not plain.execution(0).aligned


def test_costs_follow_from_the_record_alone():
    blocks = nn.ModuleList(Spy([]) for _ in range(3))
    assert block_flops(blocks, dense_record(3, 9, samples=2)).tolist() == [3 * 9 * 11] * 2
    _, record, _ = run(PruneSetting(1.0))
    pruned = block_flops(blocks, record)
    alone = sum(a + 10 * b for a, b in zip(record.entering, record.leaving, strict=True))
    extra = sum(block.pruner.flops(record.entering[i], record.execution(i)) for i, block in enumerate(blocks))
    assert torch.equal(pruned, alone + extra) and (extra > 0).all()


def test_a_block_without_a_pruner_ignores_the_guidance():
    block = Spy([])
    block.pruner = None
    x = torch.randn(1, 4, WIDTH)
    out, layout, kept, features = block(x, None, Guidance(PruneSetting(0.0), align=True))
    assert torch.equal(out, 2 * (x + 1)) and layout is kept is features is None


@pytest.mark.parametrize("packed", [False, True])
def test_stochastic_depth_drops_whole_samples(packed):
    layout, drop = Packed.of([3, 1, 5, 2] * 20, torch.device("cpu")), DropPath(0.5).train()
    torch.manual_seed(0)
    x = torch.ones(layout.total, 2) if packed else torch.ones(80, 4, 2)
    out = drop(x, layout if packed else None)
    samples = [part.unique().tolist() for part in (out.split(layout.lengths) if packed else out)]
    assert {tuple(values) for values in samples} == {(0.0,), (2.0,)}
    assert torch.equal(drop.eval()(out, layout), out)


def test_packed_and_padded_passes_leave_the_same_record():
    torch.manual_seed(0)
    x = torch.randn(2, 9, WIDTH)
    guidance = Guidance(PruneSetting(1.0), learnable_tokens=torch.randn(3, WIDTH))

    class Packable(Spy):
        def attend(self, x, layout, rule):
            padded = layout.pad(x) if isinstance(layout, Packed) else x
            statistics = super().attend(padded, layout, rule)[1]
            return x + 1, statistics

        def transform(self, x, layout, *context):
            return 2 * x

    blocks = nn.ModuleList([Packable([])])
    _, _, padded = run_blocks(blocks, x, None, guidance)
    _, _, packed = run_blocks(blocks, *pack(x, None), guidance)
    assert [n.tolist() for n in padded.leaving] == [n.tolist() for n in packed.leaving] and packed.packed and not padded.packed
