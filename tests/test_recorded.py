"""The method's numbers stand still: recorded cases of both variants give the outputs that they were recorded with.

The golden tests compare with the authors' published code, whose numbers are not part of this project. These cases were recorded
while those tests passed, so that every clone has something to compare with.
"""

import pytest
import torch
from safetensors.torch import load_file

from tests import record


def recorded(name: str) -> dict[str, dict[str, torch.Tensor]]:
    parts: dict[str, dict[str, torch.Tensor]] = {"in": {}, "w": {}, "out": {}}
    for key, tensor in load_file(record.FOLDER / f"{name}.safetensors").items():
        prefix, _, rest = key.partition(".")
        parts[prefix][rest] = tensor
    return parts


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) == 9
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=5e-5, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("variant", record.RULES)
def test_a_pruning_step_gives_the_recorded_tokens(variant):
    case = recorded(f"step_{variant}")
    assert_same(record.step(case["in"], variant), case["out"])


@pytest.mark.parametrize("variant", record.RULES)
def test_a_model_gives_the_recorded_logits_losses_and_costs(variant):
    case = recorded(f"nlvr_{variant}")
    assert_same(record.nlvr(case["w"], case["in"], variant), case["out"])


@pytest.mark.parametrize("variant", record.RULES)
def test_what_was_recorded_differs_between_temperatures_and_samples(variant):
    out = recorded(f"nlvr_{variant}")["out"]
    logits = [out[f"T{temperature}.logits"] for temperature in record.TEMPERATURES[variant]]
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(logits, logits[1:], strict=False))
    assert all((one[0] - one[1]).abs().max() > 1e-3 for one in logits)
