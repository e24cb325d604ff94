"""Which of the tokens that entered a tower are still there after each block, from what the tower left on record.

Shapes: B samples, N tokens that entered the first block, L blocks. Class tokens are left out.
"""

import torch
from torch import Tensor

from madtp.blocks import TowerRecord

NOT_ORIGINAL = -1  # the origin of a merged token, and of padding after it


def surviving(record: TowerRecord, valid: Tensor) -> Tensor:
    """The tokens that no block has pruned yet, (B, L, N) bool. A token that lives on in a merged one counts as pruned.

    Between two blocks a sample holds its kept tokens in their order, then a merged token where there is one, then padding.
    `variant: released` hands its tokens on in another order, so it cannot be traced.

    valid: (B, N) bool, False is padding
    """
    origin = torch.arange(valid.shape[1], device=valid.device).expand(valid.shape)  # (B, n) of the tokens that enter a block
    alive, blocks = valid, []
    for kept, leaving in zip(record.kept, record.leaving, strict=True):
        if kept is not None:
            origin = _hand_on(origin, kept, int(leaving.max()) - 1)
            alive = _mark(origin, valid.shape[1])
        blocks.append(alive)
    return torch.stack(blocks, dim=1)


def _hand_on(origin: Tensor, kept: Tensor, width: int) -> Tensor:
    """The origins of the `width` tokens that leave a block. origin and kept (B, n) -> (B, width)."""
    order = (~kept).to(torch.uint8).argsort(dim=1, stable=True)[:, :width]
    is_kept = torch.arange(width, device=kept.device) < kept.sum(dim=1, keepdim=True)
    return torch.where(is_kept, origin.gather(1, order), NOT_ORIGINAL)


def _mark(origin: Tensor, places: int) -> Tensor:
    """The places that occur in `origin` (B, n), (B, places) bool."""
    beyond = torch.where(origin == NOT_ORIGINAL, places, origin)
    alive = torch.zeros(len(origin), places + 1, dtype=torch.bool, device=origin.device)
    return alive.scatter(1, beyond, True)[:, :places]


def tokens_by_block(record: TowerRecord) -> Tensor:
    """Tokens that enter the first block and that leave each, class and merged token included, (B, 1 + L)."""
    return torch.stack([record.entering[0], *record.leaving], dim=1)
