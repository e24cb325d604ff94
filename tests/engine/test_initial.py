"""The learnable tokens at the start of a run: which are kept, which are made anew, and from what."""

from types import SimpleNamespace

import pytest
import torch

from configs.schema import NlvrConfig
from engine.initial import initialise_tokens
from madtp.blocks import Guidance
from madtp.initial import TokenSample
from madtp.packing import pack
from madtp.rule import PruningRule
from tests import tiny
from utils import Run, UserError

RULE = PruningRule(keep="instance")


def forward(model, batch, setting):
    return model(*batch["inputs"], Guidance(setting, packed=True))


def started(checkpoint: dict | None = None, **settings) -> torch.Tensor:
    """Returns the learnable tokens of a tiny model after the start of a run."""
    batches = [{"inputs": (tiny.images(4, seed), *tiny.text([9, 4, 12, 7], seed))} for seed in (0, 1)]
    config, run = NlvrConfig(**settings), Run(torch.device("cpu"))
    model = tiny.nlvr(RULE)
    initialise_tokens(
        SimpleNamespace(
            config=config, run=run, model=model, checkpoint=checkpoint or {}, calibration_batches=batches, gflops=forward
        )
    )
    return model.learnable_tokens.detach()


OF_THE_MODEL = tiny.nlvr(RULE).learnable_tokens.detach()
COMPRESSED = {"temperature": 3.0}


@pytest.mark.parametrize("settings", [{}, {"checkpoint": COMPRESSED, "sd_init": "kmeans"}, {"sd_init": "kmeans", "resume": "x"}])
def test_the_tokens_of_the_model_stay(settings):
    assert torch.equal(started(**settings), OF_THE_MODEL)


@pytest.mark.parametrize(
    "settings",
    [{"sd_init": "kmeans"}, {"sd_init": "principal"}, {"checkpoint": COMPRESSED, "sd_redraw": True}, {"sd_redraw": True}],
)
def test_new_tokens_have_the_size_of_the_old_ones_and_depend_on_the_seed_at_most(settings):
    made = started(**settings)
    assert not torch.equal(made, OF_THE_MODEL) and torch.equal(made, started(**settings))
    if settings.get("sd_init") != "principal":
        assert not torch.equal(made, started(**settings, seed=1))
    assert float(made.std()) == pytest.approx(float(OF_THE_MODEL.std()), rel=0.2)


def test_too_many_tokens_are_refused_with_the_keys_to_change(monkeypatch):
    monkeypatch.setattr("madtp.initial.PER_BLOCK", 0)
    with pytest.raises(UserError, match="sd_init: kmeans: 0 tokens cannot form 5 clusters; lower sd_num"):
        started(sd_init="kmeans")


@torch.no_grad()
def test_the_sample_holds_prunable_tokens_of_both_branches_in_equal_numbers():
    block = tiny.nlvr(RULE).visual_encoder.blocks[0]
    x = torch.randn(2, 6, 20)
    valid = torch.arange(6) < torch.tensor([[6], [4]])
    expected = block.pruner.alignment.projection(torch.cat([x[0, 1:], x[1, 1:4]]))
    for inputs in ((x, valid), pack(x, valid)):
        sample = TokenSample(torch.Generator().manual_seed(0))
        sample.see("vision", block, *inputs, Guidance())
        found = sample.tokens()
        assert len(found) == 8 and torch.cdist(found, expected).amin(dim=1).max() < 1e-5
        sample.see("language", block, x[:1, :3], None, Guidance())
        assert len(sample.tokens()) == 2 * 2
