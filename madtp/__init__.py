"""Multimodal alignment-guided dynamic token pruning (MADTP), on torch alone.

Read in this order: `alignment` (MAG, Eq. 1-3), `importance` (token importance score, Eq. 4-6), `pruning` (threshold, keep rule,
merge, Eq. 7-10), `budget` (the temperature that meets a GFLOPs target), `flops` (what a forward pass costs); for MADTP++
`sparsity` (N:M masks), `refit` (kept weights take over from dropped ones), `distillation`. For speed there are `packing` (batches
without padding), `columns` and `kernels` (scores without the attention map) and `semi_structured` (2:4 kernels); `released` is for
the authors' checkpoints.
"""
