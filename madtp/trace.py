"""Tracing tokens through a tower: the input tokens that survive each block, from the record of a pass.

B samples, N tokens that enter the first block, L blocks. Prefix tokens are left out.
"""

import torch
from torch import Tensor

from madtp.blocks import TowerRecord

NOT_ORIGINAL = -1  # origin of a merged token, and of the padding behind it


def surviving(record: TowerRecord, valid: Tensor, num_prefix_tokens: int = 1) -> Tensor:
    """Marks the tokens that no block has pruned yet, (B, L, N) bool. A token that was merged counts as pruned.

    Between two blocks a sample holds its kept tokens in their order, then a merged token where there is one, then padding.
    `variant: released` reorders its tokens, so it cannot be traced.

    valid: (B, N) bool, False is padding
    """
    origin = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)  # (B, n) of the tokens that enter a block
    alive, blocks = valid, []
    for kept, leaving in zip(record.kept, record.leaving, strict=True):
        if kept is not None:
            origin = _hand_on(origin, kept, int(leaving.max()) - num_prefix_tokens)
            alive = _mark(origin, valid.shape[1])
        blocks.append(alive)
    return torch.stack(blocks, dim=1)


def _hand_on(origin: Tensor, kept: Tensor, width: int) -> Tensor:
    """Returns the origins of the `width` tokens that leave a block. origin and kept (B, n) -> (B, width)."""
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    is_kept = torch.arange(width, device=kept.device) < kept.sum(dim=1, keepdim=True)
    return torch.where(is_kept, origin.gather(1, order), NOT_ORIGINAL)


def _mark(origin: Tensor, places: int) -> Tensor:
    """Marks the positions that occur in `origin` (B, n), (B, places) bool."""
    beyond = torch.where(origin == NOT_ORIGINAL, places, origin)
    alive = torch.zeros(len(origin), places + 1, dtype=torch.bool, device=origin.device)
    return alive.scatter(1, beyond, True)[:, :places]


def tokens_by_block(record: TowerRecord) -> Tensor:
    """Counts the tokens that enter the first block and that leave each, prefix and merged tokens included, (B, 1 + L)."""
    return torch.stack([record.entering[0], *record.leaving], dim=1)
