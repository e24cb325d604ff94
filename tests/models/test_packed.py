"""Packed execution: the padded answer without padding, alone or in any company, at the cost that the closed form says."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from madtp.attention import varlen
from madtp.attention.attend import similar
from madtp.blocks import DropPath, Guidance
from madtp.flops import GIGA
from madtp.packing import Packed
from madtp.pruning import OFF, PruneSetting, PruningRule
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
    grads = []
    for packed in (False, True):
        model = tiny.nlvr(INSTANCE).train()
        output = model(*batch(), Guidance(SETTING, align=True, packed=packed))
        (output.logits.square().mean() + output.similarity).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, atol=1e-5, rtol=1e-4, msg=name)


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


@given(
    st.lists(st.tuples(st.integers(1, 600), st.integers(1, 600)), min_size=1, max_size=20),
    st.sampled_from([8, 128, 768]),
    st.sampled_from([2**20, 2**24]),
)
@settings(max_examples=50, deadline=None, derandomize=True, database=None)
def test_groups_hold_every_sample_once_and_pad_no_more_than_a_group_costs(lengths, width, cost):
    queries, keys = zip(*lengths, strict=True)
    groups = list(similar(queries, keys, width, cost))
    assert sorted(sample for group in groups for sample in group) == list(range(len(lengths)))
    for group in groups:
        area = len(group) * max(queries[i] for i in group) * max(keys[i] for i in group)
        assert 2 * width * (area - sum(queries[i] * keys[i] for i in group)) <= cost
    largest = [max(keys[i] for i in group) for group in groups]
    assert largest == sorted(largest, reverse=True)


def test_stochastic_depth_drops_whole_samples():
    layout = Packed.of([3, 1, 5, 2] * 20, torch.device("cpu"))
    drop = DropPath(0.5).train()
    torch.manual_seed(0)
    out = drop(torch.ones(layout.total, 2), layout)
    samples = [part.unique().tolist() for part in out.split(layout.lengths)]
    assert {tuple(values) for values in samples} == {(0.0,), (2.0,)}
    assert torch.equal(drop.eval()(out, layout), out)


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
