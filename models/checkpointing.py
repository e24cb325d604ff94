"""Activation checkpointing by fairscale: blocks recompute their activations in the backward pass, which saves memory."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from fairscale.nn.checkpoint import checkpoint_wrapper
from torch import Tensor, nn

from madtp.blocks import Guidance
from madtp.packing import Layout


class _Recomputed(nn.Module):
    """A block as fairscale runs it twice: once without gradients, and again in the backward pass."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(
        self,
        autocast: tuple[str, torch.dtype, bool],
        x: Tensor,
        learnable_tokens: Tensor | None,
        layout: Layout,
        guidance: Guidance,
    ) -> tuple[Tensor, Layout, Tensor | None, Tensor | None]:
        # fairscale recomputes under the GPU's default autocast, whatever the forward pass ran under: enter that one again.
        device, dtype, enabled = autocast
        with torch.autocast(device, dtype, enabled):
            guidance = replace(guidance, learnable_tokens=learnable_tokens)
            return type(self.block).forward(self.block, x, layout, guidance)


def checkpoint_last(blocks: Sequence[nn.Module], number: int) -> None:
    """Makes the last `number` blocks recompute their activations in the backward pass.

    They recompute in the precision and along the path of the forward pass, so that the same tokens are pruned. Parameter names
    stay, and hooks on a block run in the forward pass only.
    """
    for block in list(blocks)[max(0, len(blocks) - number) :]:
        block.forward = partial(_forward, checkpoint_wrapper(_Recomputed(block)))


def _forward(
    recomputed: _Recomputed, x: Tensor, layout: Layout, guidance: Guidance
) -> tuple[Tensor, Layout, Tensor | None, Tensor | None]:
    if not recomputed.block.training:
        return type(recomputed.block).forward(recomputed.block, x, layout, guidance)
    kind = x.device.type
    autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
    # The learnable tokens are an argument of their own: gradients of tensors inside of other objects would bypass autograd, and
    # DDP would see a parameter that all blocks share become ready several times.
    shared = replace(guidance, learnable_tokens=None)
    return recomputed(autocast, x, guidance.learnable_tokens, layout, shared)
