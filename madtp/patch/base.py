"""The handle of a pruned model of another library."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from madtp.blocks import Guidance, PrunedBlock, TowerRecord
from madtp.flops import GIGA
from madtp.pruning import OFF, PruneSetting

ATTRIBUTE = "madtp"  # of the model, where the handle is registered, so that its parameters train and are saved


class Pruning(nn.Module):
    """The pruning of a model: its learnable tokens, the pruners of its blocks, and how hard they prune.

    setting: how hard to prune; with madtp.OFF the model runs its original forward pass
    packed: run batches without padding
    align: collect the alignment features that the similarity loss compares
    record: of the last pruned forward pass; None before
    dense_gflops: mean GFLOPs of a calibration image without pruning
    """

    def __init__(self, blocks: Sequence[PrunedBlock], learnable_tokens: Tensor, packed: bool):
        """
        Args:
            blocks: run the layers of the model's blocks, in order.
            learnable_tokens: (K, D).
        """
        super().__init__()
        self.blocks = list(blocks)  # not registered: their layers are the model's
        self.pruners = nn.ModuleList(block.pruner for block in blocks if block.pruner is not None)
        self.learnable_tokens = nn.Parameter(learnable_tokens)
        self.setting, self.packed, self.align = OFF, packed, False
        self.record: TowerRecord | None = None
        self.dense_gflops = float("nan")

    @property
    def depth(self) -> int:
        return len(self.blocks)

    def guidance(self) -> Guidance:
        """Returns the guidance of a forward pass."""
        return Guidance(self.setting, self.align, packed=self.packed, learnable_tokens=self.learnable_tokens)

    def run(self, images: Tensor) -> TowerRecord:
        """Runs the blocks on images (B, 3, H, W), pruned or not, and returns the record."""
        raise NotImplementedError

    def flops(self, record: TowerRecord) -> Tensor:
        """Counts the multiply-adds of a forward pass per image, (B,)."""
        raise NotImplementedError

    def detach(self) -> None:
        """Gives the model its original forward pass back."""
        raise NotImplementedError

    @torch.no_grad()
    def gflops(self, images: Tensor, setting: PruneSetting | None = None) -> Tensor:
        """Returns the GFLOPs of each image at a setting, by default the current one, (B,) float64.

        images: (B, 3, H, W)
        """
        before, self.setting = self.setting, self.setting if setting is None else setting
        try:
            return self.flops(self.run(images)).double() / GIGA
        finally:
            self.setting = before

    def mean_gflops(self, batches: Iterable[Tensor], setting: PruneSetting = OFF) -> float:
        """Returns the mean GFLOPs per image at a setting."""
        return float(torch.cat([self.gflops(images, setting) for images in batches]).mean())

    def extra_repr(self) -> str:
        return f"{self.setting}, packed={self.packed}"
