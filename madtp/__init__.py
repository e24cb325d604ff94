"""Multimodal alignment-guided dynamic token pruning (MADTP) for transformers, on PyTorch alone.

`prune` compresses a model of another library in one call. Models of your own are built from `PreNormBlock` or `PrunedBlock`,
`attend`, `TokenPruner` and `run_blocks`.

The method, in reading order: `alignment` (MAG, Eq. 1-3 of the paper), `importance` (token importance score, Eq. 4-6), `selection`
(threshold, keep rule, gather and merge, Eq. 7-10), `rule` (how tokens are chosen), `pruning` (the pruner of a block), `blocks`
(the order of a block's parts), `budget` (the temperature for a GFLOPs target), `flops` (the cost of a pass). For speed: `packing`
(batches without padding) and `attention` (scores without the attention map). For MADTP++: `sparsity` (N:M weights) and
`distillation`. `released` reproduces the authors' published code.
"""

from madtp.alignment import similarity_loss
from madtp.attention.attend import attend
from madtp.blocks import (
    AlignedModel,
    Guidance,
    PreNormBlock,
    PrunedBlock,
    TowerRecord,
    block_flops,
    run_blocks,
)
from madtp.budget import Calibration, UnreachableTarget, calibrate
from madtp.distillation import Distillation
from madtp.packing import Packed, class_tokens, pack, padded
from madtp.patch import prune, restore
from madtp.patch.base import Pruning
from madtp.patch.folders import load
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from madtp.sparsity.layers import sparse_weights
from madtp.sparsity.masks import Pattern, SparseWeights

__version__ = "0.2.0"

__all__ = [
    "OFF",
    "AlignedModel",
    "Calibration",
    "Distillation",
    "Guidance",
    "Packed",
    "Pattern",
    "PreNormBlock",
    "PruneSetting",
    "PrunedBlock",
    "Pruning",
    "PruningRule",
    "SparseWeights",
    "TokenPruner",
    "TowerRecord",
    "UnreachableTarget",
    "attend",
    "block_flops",
    "calibrate",
    "class_tokens",
    "load",
    "pack",
    "padded",
    "prune",
    "restore",
    "run_blocks",
    "similarity_loss",
    "sparse_weights",
]
