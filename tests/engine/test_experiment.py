"""A task as the loop sees it: masking fits what is kept to the calibration slice, as many layers at a time as fit."""

import pytest
import torch

from configs.schema import NlvrConfig
from engine import experiment
from engine.experiment import Experiment, portions
from madtp.blocks import Guidance
from madtp.rule import OFF, PruneSetting
from madtp.sparsity.refit import second_moments
from tests import tiny
from utils import Run


def test_portions_hold_no_more_moments_than_allowed_but_one_weight_at_least():
    weights = {name: torch.empty(2, inputs) for name, inputs in (("a", 4), ("b", 4), ("c", 8), ("d", 2), ("e", 2))}
    assert [list(some) for some in portions(weights, 32)] == [["a", "b"], ["c"], ["d", "e"]]
    assert [list(some) for some in portions(weights, 10**6)] == [list("abcde")]
    assert list(portions({}, 5)) == []


def masked(at_once: int, **keys) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of all linear layers of a tiny model after masking; and by how much each misses its outputs, of the dense model,
    on the samples that they were fitted to."""
    model = tiny.nlvr()
    batch = {"images": tiny.images(6), **dict(zip(("ids", "mask"), tiny.text([9, 4, 12, 7, 5, 10]), strict=True))}

    def forward(model: torch.nn.Module, batch: dict, setting: PruneSetting) -> torch.Tensor:
        return model(batch["images"], batch["ids"], batch["mask"], Guidance(setting, packed=True)).logits

    task = Experiment(
        NlvrConfig(p=0.5, sparsity_type="2:4", **keys), Run(torch.device("cpu")), model, {"calibration": [batch]}, losses=None,
        evaluate=None, gflops=forward, score="acc", reference=1.0,
    )  # fmt: skip
    weights = task.sparse.weights
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    moments = second_moments(weights, lambda: forward(model, batch, OFF))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "MOMENTS", at_once)
        task.mask(weights, OFF)
    assert set(task.sparse.masks) == set(weights)
    changes = {name: before[name] - weight.detach() for name, weight in weights.items()}
    return weights, {name: ((change @ moments[name]) * change).sum() for name, change in changes.items()}


def test_what_is_kept_takes_over_in_every_layer():
    _, fitted = masked(2**28)
    _, plain = masked(2**28, refit_weights=False)
    assert all(fitted[name] < plain[name] for name in plain)
    assert sum(fitted[name] / plain[name] for name in plain) < 0.7 * len(plain)


def test_what_comes_in_portions_is_fitted_to_what_those_before_put_out():
    together, portioned = masked(2**28)[0], masked(1)[0]
    first, *_, last = together
    assert torch.equal(together[first], portioned[first]) and not torch.equal(together[last], portioned[last])


def test_the_authors_form_is_masked_alone():
    plain, authors = masked(2**28, refit_weights=False)[0], masked(2**28, variant="released")[0]
    assert all(torch.equal(plain[name], authors[name]) for name in plain)
