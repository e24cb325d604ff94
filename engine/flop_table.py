"""Counting a forward pass with fvcore: a check of the GFLOPs in closed form, and the table at the start of a run."""

import logging
import warnings

import torch
from torch import Tensor, nn

from madtp.blocks import UNPRUNED, Guidance
from madtp.flops import GIGA


class _Traced(nn.Module):
    """A wrapper that fvcore can trace: its forward takes tensors and returns one tensor."""

    def __init__(self, model: nn.Module, guidance: Guidance):
        super().__init__()
        self.model, self.guidance = model, guidance

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.model.traced(*inputs, guidance=self.guidance)


def _fused_attention(inputs: list, outputs: list) -> int:
    """Counts QK^T and AV of `scaled_dot_product_attention`, which fvcore ignores."""
    query, key = inputs[0].type().sizes(), inputs[1].type().sizes()
    return 2 * query[0] * query[1] * query[2] * key[2] * query[3]


def analyse(model: nn.Module, inputs: tuple[Tensor, ...], guidance: Guidance = UNPRUNED):
    """Returns fvcore's analysis of `model.traced(*inputs, guidance=guidance)`. With a batch of one, no padding is counted."""
    from fvcore.nn import FlopCountAnalysis  # imported only here: the import prints warnings about PyTorch

    analysis = FlopCountAnalysis(_Traced(model, guidance).eval(), inputs)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    return analysis.set_op_handle("aten::scaled_dot_product_attention", _fused_attention)


@torch.no_grad()
def fvcore_gflops(model: nn.Module, inputs: tuple[Tensor, ...], guidance: Guidance = UNPRUNED) -> dict[str, float]:
    """Counts the GFLOPs of the whole batch by top-level module, and outside of modules ("rest"). Their sum is the total."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        counted = analyse(model, inputs, guidance).by_module()
    by_module = {name: counted[f"model.{name}"] for name, _ in model.named_children() if counted[f"model.{name}"]}
    rest = counted[""] - sum(by_module.values())
    return {name: count / GIGA for name, count in {**by_module, **({"rest": rest} if rest else {})}.items()}


@torch.no_grad()
def flop_table(model: nn.Module, inputs: tuple[Tensor, ...], depth: int = 2) -> str:
    """Returns a table of parameters and multiply-adds by module, down to `depth`; without fvcore, the reason why not."""
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from fvcore.nn import flop_count_table
        except ImportError as error:  # fvcore imports internals of PyTorch, which may be gone; a missing table must not stop a run
            return f"no table: {error}"
        return flop_count_table(analyse(model, inputs), max_depth=depth, show_param_shapes=False)
