"""Packed execution: the padded answer without padding, alone or in any company, at the cost that the closed form says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from madtp.blocks import Guidance
from madtp.flops import GIGA
from madtp.rule import OFF, PruneSetting, PruningRule
from tests import tiny
from tests.executed import counting_products

INSTANCE = PruningRule(keep="instance")
SETTING = PruneSetting(3.0)
RULES = [
    INSTANCE,
    PruningRule(keep="max"),
    PruningRule(keep="instance", merge=False),
    PruningRule(keep="instance", terms=("self",)),
    PruningRule(keep="instance", terms=("cls", "token")),
    PruningRule(keep="instance", method="random"),
]
LENGTHS = [9, 4, 12, 7, 12, 10, 11, 3]


def batch(pairs: int = 4):
    return tiny.images(pairs), *tiny.text(LENGTHS)


@pytest.mark.parametrize("rule", RULES, ids=str)
@torch.no_grad()
def test_packed_gives_the_padded_answer(rule):
    model, inputs = tiny.nlvr(rule, layers=3), batch()
    for setting in (OFF, SETTING):
        torch.manual_seed(0)  # for the random method
        padded = model(*inputs, Guidance(setting))
        torch.manual_seed(0)
        packed = model(*inputs, Guidance(setting, packed=True))
        if rule.method == "dtp" or setting is OFF:  # random numbers fall to other tokens; how many stay is the same
            torch.testing.assert_close(packed.logits, padded.logits, atol=3e-5, rtol=1e-5)
        for one, other in ((padded.vision, packed.vision), (padded.language, packed.language)):
            assert [n.tolist() for n in one.leaving] == [n.tolist() for n in other.leaving]


def test_gradients_are_those_of_the_padded_form():
    """In float64: in float32 they are apart by what rounding does in each version of PyTorch."""
    (images, *text), grads = batch(), []
    for packed in (False, True):
        model = tiny.nlvr(INSTANCE).double().train()
        output = model(images.double(), *text, Guidance(SETTING, align=True, packed=packed))
        (output.logits.square().mean() + output.similarity).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-10, rtol=1e-10, msg=name)


@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(3, 14), min_size=1, max_size=5), st.randoms(use_true_random=False))
@torch.no_grad()
def test_company_and_order_never_change_an_answer(lengths, random):
    """Kept tokens and costs exactly, logits to 1e-5."""
    model, images, (ids, mask) = tiny.nlvr(INSTANCE), tiny.images(len(lengths)), tiny.text(lengths)
    order = random.sample(range(len(lengths)), len(lengths))
    whole = model(images[order], ids[order], mask[order], Guidance(SETTING, packed=True))
    for place, sample in enumerate(order):
        one = slice(sample, sample + 1)
        alone = model(images[one], ids[one, : lengths[sample]], mask[one, : lengths[sample]], Guidance(SETTING, packed=True))
        torch.testing.assert_close(whole.logits[place : place + 1], alone.logits, atol=1e-5, rtol=1e-5)
        assert model.gflops(whole)[place] == model.gflops(alone)[0]
        for kept, kept_alone in zip(whole.language.kept, alone.language.kept, strict=True):
            number = kept_alone.shape[1]
            assert torch.equal(kept[place, :number], kept_alone[0]) and not kept[place, number:].any()


@pytest.mark.parametrize("rule", [INSTANCE, PruningRule(keep="instance", terms=("cls",)), PruningRule(terms=("self", "token"))])
@torch.no_grad()
def test_the_closed_form_is_what_runs_packed(rule):
    """Counted by what is executed; layer norms by their lengths. Equal samples, so that no group is padded."""
    model, (images, ids, mask) = tiny.nlvr(rule), batch(1)
    images = images[:, :1].expand(-1, 2, -1, -1, -1)
    inputs = images, ids[2:3], mask[2:3]

    with counting_products() as counter:
        out = model(*inputs, Guidance(SETTING, packed=True))
    norms = sum(int((a + b).sum()) * 20 for a, b in zip(out.vision.entering, out.vision.leaving, strict=True))
    norms += sum(int((a + 2 * b).sum()) * 16 for a, b in zip(out.language.entering, out.language.leaving, strict=True))
    norms += int(out.vision.leaving[-1].sum()) * 20 + int(out.language.entering[0].sum()) * 16
    assert (counter.get_total_flops() / 2 + 5 * norms) / GIGA == pytest.approx(float(model.gflops(out)), rel=1e-9)
