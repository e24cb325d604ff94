"""The kernel for samples of different lengths: its requirements and, on a GPU, its outputs."""

import subprocess
import sys

import pytest
import torch

from madtp.attention import varlen
from madtp.packing import Packed


@pytest.mark.parametrize(
    ("device", "kernel", "dtype", "capability", "missing"),
    [
        ("cpu", object(), torch.bfloat16, (9, 0), "a GPU"),
        ("cuda", None, torch.bfloat16, (9, 0), "PyTorch 2.10 or later"),
        ("cuda", object(), torch.float32, (9, 0), "amp: true"),
        ("cuda", object(), torch.bfloat16, (7, 5), "a GPU of compute capability 8.0 or more"),
        ("cuda", object(), torch.float16, (8, 0), ""),
    ],
)
def test_the_first_missing_requirement_is_named(monkeypatch, device, kernel, dtype, capability, missing):
    monkeypatch.setattr(varlen, "kernel", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert varlen.missing_requirement(torch.device(device), dtype) == missing


def test_the_kernel_is_found_where_pytorch_has_it():
    assert (varlen.kernel() is not None) == (tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10))


def test_the_library_alone_does_not_load_it():
    code = "import madtp, sys; sys.exit('torch.nn.attention.varlen' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_cpu_takes_another_path():
    assert not varlen.usable(torch.zeros(4, 64), 2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for samples of different lengths is a GPU's")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_one_kernel_gives_each_sample_what_it_gets_alone(dtype):
    from madtp.attention.triton import packed_column_statistics

    torch.manual_seed(0)
    lengths, heads, width = [577, 1, 40, 300], 4, 64
    layout = Packed.of(lengths, torch.device("cuda"))
    projected = torch.randn(layout.total, 3 * heads * width, device=layout.device, dtype=dtype).chunk(3, dim=-1)
    assert varlen.usable(projected[0], heads) and not varlen.usable(projected[0], 3)
    query, key, value = (part.unflatten(-1, (heads, width)) for part in projected)
    out, log_norm = varlen.attention(query, key, value, layout, layout)
    columns = packed_column_statistics(query, key, log_norm, layout)
    for number, (first, length) in enumerate(zip(layout.starts, lengths, strict=False)):
        rows = slice(first, first + length)
        q, k, v = (part[rows].float().transpose(0, 1) for part in (query, key, value))
        scores = q @ k.transpose(1, 2) * width**-0.5
        attention = scores.softmax(dim=-1)
        torch.testing.assert_close(out[rows].float().transpose(0, 1), attention @ v, atol=1e-2, rtol=1e-2)
        torch.testing.assert_close(log_norm[rows].t(), scores.logsumexp(dim=-1), atol=1e-2, rtol=1e-2)
        if length > 1:
            torch.testing.assert_close(columns[number, : length - 1], attention[:, 1:, 1:].amax(dim=(0, 1)), atol=1e-2, rtol=5e-2)
