"""Numbers of the authors' published code, as data. Set MADTP_GOLDEN to their folder; without it these tests skip."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ATOL = 5e-5  # rounding of float32; the decisions themselves have margins above 1e-4


def cases(pattern: str) -> list:
    """One pytest parameter a golden case; a single skipped one when there is no golden data."""
    folder = os.environ.get("MADTP_GOLDEN")
    if not folder:
        return [pytest.param(None, marks=pytest.mark.skip(reason="MADTP_GOLDEN is not set: no golden data"))]
    found = sorted(Path(folder).glob(f"{pattern}.json"))
    assert found, f"no {pattern}.json in MADTP_GOLDEN={folder}"
    return [pytest.param(path, id=path.stem) for path in found]


def load(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))


def published_weights(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w.")}


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=ATOL, rtol=0)
