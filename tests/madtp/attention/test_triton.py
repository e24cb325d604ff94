"""The Triton kernel against the plain formula; without a GPU it runs in Triton's interpreter."""

import pytest
import torch

from madtp.packing import pack
from tests.madtp.attention.cases import Attention

kernels = pytest.importorskip("madtp.attention.triton", reason="Triton comes with PyTorch for NVIDIA GPUs")

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _loop(numbers):
    for index in range(0, tl.load(numbers)):
        tl.store(numbers + 1, index)


@pytest.fixture
def triton_runs() -> None:
    """Skips where not even this loop runs: the interpreter of Triton 3.6, for one, fails with NumPy 2.4."""
    numbers = torch.tensor([3, 0], device=DEVICE)
    try:
        _loop[1,](numbers)
    except triton.runtime.errors.InterpreterError as error:
        pytest.skip(f"Triton {triton.__version__} cannot run a loop here: {error}")
    assert numbers.tolist() == [3, 2]


@pytest.mark.usefixtures("triton_runs")
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_kernel_computes_what_the_plain_formula_does(monkeypatch, prefix):
    monkeypatch.setattr(kernels, "BLOCK_QUERIES", 16)
    monkeypatch.setattr(kernels, "BLOCK_KEYS", 16)
    case = Attention([40, 5, 17, 33], width=20, prefix=prefix)
    (query, layout), (key, _), (norm, _) = (
        pack(part.transpose(1, 2).to(DEVICE), case.valid.to(DEVICE)) for part in (case.query, case.key, case.log_norm)
    )
    found = kernels.packed_column_statistics(query, key, norm, layout, prefix).cpu()
    torch.testing.assert_close(found[case.inside], case.columns[case.inside], atol=1e-5, rtol=1e-4)
    assert not found[~case.inside].any()
