"""Attention over packed samples in one kernel, where PyTorch provides it for the device."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from madtp.packing import Packed


@cache
def kernel() -> Callable[..., Any] | None:
    """Returns the kernel; None before PyTorch 2.10. Its import takes a second, which programs without a GPU do not spend."""
    try:
        from torch.nn.attention.varlen import AuxRequest, varlen_attn
    except ImportError:
        return None
    return partial(varlen_attn, return_aux=AuxRequest(lse=True))


def missing_requirement(device: torch.device, dtype: torch.dtype) -> str:
    """Names the first requirement of the kernel that is not met; empty where it runs."""
    if device.type != "cuda":
        return "a GPU"
    if kernel() is None:
        return "PyTorch 2.10 or later"
    if dtype not in (torch.float16, torch.bfloat16):
        return "amp: true"
    return "" if torch.cuda.get_device_capability(device) >= (8, 0) else "a GPU of compute capability 8.0 or more"


def usable(x: Tensor, num_heads: int) -> bool:
    """Tells whether the kernel runs for x (T, C) and supports its heads' width."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    width = x.shape[-1] // num_heads
    return width % 8 == 0 and width <= 256 and not missing_requirement(x.device, dtype)


def attention(query: Tensor, key: Tensor, value: Tensor, queries: Packed, keys: Packed) -> tuple[Tensor, Tensor]:
    """Returns attention (Tq, H, D) and the log-sum-exp of each row of the map (Tq, H), float32.

    query: (Tq, H, D); key, value: (Tk, H, D)
    """
    run = kernel()
    if run is None:
        raise RuntimeError("attention over packed samples in one kernel needs PyTorch 2.10 or later")
    out, log_norm = run(query, key, value, queries.offsets, keys.offsets, queries.longest, keys.longest)
    return out, log_norm.transpose(0, 1)
