"""The warning about slow attention on a GPU. The other warnings are tested with whole runs in test_compress.py."""

import pytest
import torch

from configs.schema import NlvrConfig
from engine.results import warn_of_slower_attention
from madtp.attention import varlen

GPU = torch.device("cuda")


@pytest.mark.parametrize(
    ("kernel", "dtype", "capability", "wanted"),
    [
        (None, torch.bfloat16, (9, 0), "PyTorch 2.10 or later"),
        (object(), torch.float32, (9, 0), "amp: true"),
        (object(), torch.bfloat16, (7, 5), "a GPU of compute capability 8.0 or more"),
        (object(), torch.bfloat16, (9, 0), None),
    ],
)
def test_a_gpu_without_the_kernel_for_packed_samples_is_told_what_it_needs(monkeypatch, caplog, kernel, dtype, capability, wanted):
    monkeypatch.setattr(varlen, "kernel", lambda: kernel)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with caplog.at_level("INFO"):
        warn_of_slower_attention(NlvrConfig(), GPU, dtype)
        warn_of_slower_attention(NlvrConfig(), torch.device("cpu"), dtype)
    assert [text.split("needs ")[1] for text in caplog.messages] == ([wanted] if wanted else [])
