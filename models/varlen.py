"""Attention over packed samples in one kernel, where PyTorch has it for the device."""

import torch
from torch import Tensor

from madtp.packing import Packed

try:
    from torch.nn.attention.varlen import AuxRequest, varlen_attn
except ImportError:  # before PyTorch 2.10
    varlen_attn = None


def usable(x: Tensor, num_heads: int) -> bool:
    """Of (T, C). The kernel wants a GPU of compute capability 8.0 on, half precision, and heads of a width that it was made for."""
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype
    if varlen_attn is None or x.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    width = x.shape[-1] // num_heads
    if width % 8 or width > 256:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def attention(query: Tensor, key: Tensor, value: Tensor, queries: Packed, keys: Packed) -> tuple[Tensor, Tensor]:
    """query (Tq, H, D), key and value (Tk, H, D) -> (Tq, H, D) and the log-sum-exp of each row of the map (Tq, H) float32."""
    out, log_norm = varlen_attn(
        query, key, value, queries.offsets, keys.offsets, queries.longest, keys.longest, return_aux=AuxRequest(lse=True)
    )
    return out, log_norm.transpose(0, 1)
