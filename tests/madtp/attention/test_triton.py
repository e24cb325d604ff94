"""The Triton kernel against the plain formula; without a GPU it runs in Triton's interpreter."""

import pytest
import torch

from madtp.packing import pack
from tests.madtp.attention.cases import Attention

kernels = pytest.importorskip("madtp.attention.triton", reason="Triton comes with PyTorch for NVIDIA GPUs")


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_kernel_computes_what_the_plain_formula_does(monkeypatch, prefix):
    monkeypatch.setattr(kernels, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(kernels, "BLOCK_KEYS", 16)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = Attention([40, 5, 17, 33], width=20, prefix=prefix)
    (query, layout), (key, _), (norm, _) = (
        pack(part.transpose(1, 2).to(device), case.valid.to(device)) for part in (case.query, case.key, case.log_norm)
    )
    found = kernels.packed_column_statistics(query, key, norm, layout, prefix).cpu()
    torch.testing.assert_close(found[case.inside], case.columns[case.inside], atol=1e-5, rtol=1e-4)
    assert not found[~case.inside].any()
