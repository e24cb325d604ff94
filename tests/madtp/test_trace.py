"""Tracing surviving tokens through the record of a tower."""

import pytest
import torch

from madtp.blocks import Guidance, TowerRecord
from madtp.rule import PruneSetting, PruningRule
from madtp.selection import gather_and_merge
from madtp.trace import surviving, tokens_by_block
from tests import tiny


def record_of(*blocks: tuple[list[list[int]] | None, list[int]]) -> TowerRecord:
    """A record from (kept, tokens leaving with the class token) of each block."""
    record = TowerRecord()
    for kept, leaving in blocks:
        before = record.leaving[-1] if record.leaving else torch.tensor(leaving)
        record.add(before, torch.tensor(leaving), None if kept is None else torch.tensor(kept).bool(), None)
    return record


def test_two_samples_by_hand() -> None:
    """Five tokens; the second sample has three and padding. M is a merged token, _ padding."""
    record = record_of(
        (None, [6, 4]),  # 0 1 2 3 4   0 1 2 _ _   not pruned here
        ([[1, 0, 1, 0, 1], [1, 1, 1, 0, 0]], [5, 4]),  # 0 2 4 M     0 1 2 _
        ([[0, 1, 0, 1], [1, 0, 0, 0]], [4, 3]),  # 2 M N       0 M _   the merged token is kept, another follows it
        ([[1, 0, 0], [0, 1, 0]], [3, 3]),  # 2 M         M N     the second sample has no original left
    )
    valid = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    expected = [
        [[1, 1, 1, 1, 1], [1, 0, 1, 0, 1], [0, 0, 1, 0, 0], [0, 0, 1, 0, 0]],
        [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
    ]
    assert surviving(record, valid).long().tolist() == expected


@pytest.mark.parametrize("merge", [True, False])
def test_the_trace_follows_the_tokens_themselves(merge: bool) -> None:
    """Tokens that carry their place as a one-hot vector: what is a single one-hot afterwards has survived."""
    generator = torch.Generator().manual_seed(0)
    samples, places = 16, 12
    valid = torch.arange(places) < torch.randint(4, places + 1, (samples, 1), generator=generator)
    x, inside = torch.eye(places).expand(samples, -1, -1) * valid.unsqueeze(-1), valid
    record, expected = TowerRecord(), []
    for _ in range(4):
        # As pruning does, none or at least two of a sample's tokens go, so a merged token is never a one-hot.
        goes = (torch.rand(inside.shape, generator=generator) < 0.35) & inside
        kept = torch.where(goes.sum(dim=1, keepdim=True) < 2, inside, inside & ~goes)
        before = 1 + inside.sum(dim=1)
        x, inside = gather_and_merge(x, inside, torch.ones(kept.shape), kept, merge)
        record.add(before, 1 + inside.sum(dim=1), kept, None)
        alone = ((x > 0.999).sum(dim=-1) == 1) & inside
        expected.append((x * alone.unsqueeze(-1)).amax(dim=1) > 0.999)
    assert torch.equal(surviving(record, valid), torch.stack(expected, dim=1))


@pytest.mark.parametrize("keep", ["instance", "max"])
@torch.no_grad()
def test_survivors_and_merged_tokens_are_what_a_model_hands_on(keep: str) -> None:
    model = tiny.nlvr(PruningRule(keep=keep))
    ids, mask = tiny.text([5, 9, 12])
    output = model(tiny.images(3), ids, mask, Guidance(PruneSetting(3.0, prune_from=1)))
    for record, valid in (
        (output.vision, torch.ones(6, (tiny.IMAGE // tiny.PATCH) ** 2).bool()),
        (output.language, mask[:, 1:].bool()),
    ):
        alive = surviving(record, valid)
        tokens = tokens_by_block(record)
        assert torch.equal(alive[:, 0], valid)  # the first block is left alone
        assert (alive[:, 1:] <= alive[:, :-1]).all()  # nothing comes back
        assert torch.equal(tokens[:, 0], 1 + valid.sum(dim=1))
        merged = tokens[:, 1:] - 1 - alive.sum(dim=-1)
        assert ((0 <= merged) & (merged <= torch.arange(alive.shape[1]))).all()  # at most one a pruning block
        assert merged.any()
