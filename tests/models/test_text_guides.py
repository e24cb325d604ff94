"""Images whose pruning the words of their text guide: text by text, in every layout, and what it costs."""

from dataclasses import replace

import pytest
import torch

from engine.flop_table import fvcore_gflops
from madtp.blocks import Guidance
from madtp.rule import OFF, PruneSetting, PruningRule
from models.blip_nlvr import BlipNlvr
from tests import tiny
from tests.models.test_blip_caption import SMALL
from tests.models.test_blip_vqa import answers, model_of, questions

INSTANCE = PruningRule(keep="instance")
SETTING = PruneSetting(6.0)


def guided_nlvr(rule: PruningRule = INSTANCE) -> BlipNlvr:
    model = tiny.nlvr(rule)
    model.text_guides = True
    return model


@torch.no_grad()
def test_each_sentence_prunes_its_images_by_the_features_that_the_learnable_tokens_find_in_its_words():
    model, images = guided_nlvr(), tiny.images(2)
    ids, mask = tiny.text([5, 9, 7, 6])
    together = model(images, ids, mask, Guidance(SETTING))
    for i, length in enumerate([5, 9, 7, 6]):
        words = model.text_encoder.embeddings(ids[i : i + 1, :length])[0, 1:]
        block = model.text_encoder.encoder.layer[0].pruner.alignment
        mapped = words @ block.projection.weight.t() + block.projection.bias
        attention = torch.softmax(model.learnable_tokens @ mapped.t() / tiny.TOKEN_DIM**0.5, dim=-1)
        collected = attention @ mapped
        scale = model.learnable_tokens.norm(dim=1) / collected.norm(dim=1)
        guides = collected * scale[:, None]
        for side in (0, 1):
            image = images[i // 2, side].unsqueeze(0)
            _, _, alone = model.visual_encoder(image, Guidance(SETTING, learnable_tokens=guides))
            row = i + side * 4
            assert [int(n[row]) for n in together.vision.leaving] == [int(n[0]) for n in alone.leaving]


@torch.no_grad()
def test_another_sentence_keeps_other_patches():
    model, images = guided_nlvr(), tiny.images(8)
    kept = [model(images, *tiny.text([9] * 8, seed), Guidance(SETTING)).vision.kept[0] for seed in (0, 1)]
    shared = [tiny.nlvr(INSTANCE)(images, *tiny.text([9] * 8, seed), Guidance(SETTING)).vision.kept[0] for seed in (0, 1)]
    assert not torch.equal(*kept) and torch.equal(*shared)


@pytest.mark.parametrize("align", [False, True])
@torch.no_grad()
def test_packed_is_padded(align):
    model, images, text = guided_nlvr(), tiny.images(2), tiny.text([5, 9, 7, 6])
    packed, padded = (model(images, *text, Guidance(SETTING, align=align, packed=each)) for each in (True, False))
    torch.testing.assert_close(packed.logits, padded.logits, atol=1e-5, rtol=1e-5)
    assert torch.equal(packed.vision.leaving[-1], padded.vision.leaving[-1])
    if align:
        torch.testing.assert_close(packed.similarity, padded.similarity)


@torch.no_grad()
def test_without_pruning_nothing_changes():
    images, text = tiny.images(2), tiny.text([5, 9, 7, 6])
    guided, shared = (model(images, *text, Guidance(OFF)) for model in (guided_nlvr(), tiny.nlvr(INSTANCE)))
    assert torch.equal(guided.logits, shared.logits) and len(guided.vision.leaving[0]) == 4


def test_the_loss_reaches_the_learnable_tokens_through_the_words():
    model = guided_nlvr(replace(INSTANCE, gradient="decision")).train()
    out = model(tiny.images(2), *tiny.text([5, 9, 7, 6]), Guidance(SETTING))
    out.logits.sum().backward()
    assert model.space_dict.grad.abs().sum() > 0
    assert model.text_encoder.encoder.layer[0].pruner.alignment.projection.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_the_closed_form_is_what_fvcore_counts():
    model = guided_nlvr()
    inputs = tiny.images(1)[:, :1].expand(-1, 2, -1, -1, -1), *tiny.text([11])
    out = model(*inputs, Guidance(SETTING))
    assert float(model.gflops(out)) == pytest.approx(sum(fvcore_gflops(model, inputs, Guidance(SETTING)).values()), rel=1e-9)


@torch.no_grad()
def test_questions_about_one_image_each_encode_it_and_cost_it():
    model = model_of(SMALL, INSTANCE)
    model.text_guides = True
    images, ids, mask = questions(SMALL, [7, 5, 9])
    asked, counts = answers([4, 3, 4]), torch.ones(3, dtype=torch.long)
    shared = model.encode(images[:1], ids, mask, Guidance(SETTING))
    repeated = model.encode(images[:1].repeat(3, 1, 1, 1), ids, mask, Guidance(SETTING))
    torch.testing.assert_close(shared.tokens, repeated.tokens)
    assert len(set(shared.vision.leaving[-1].tolist())) > 1
    together, each = (
        model.costs(pictures, ids, mask, *asked, counts, guidance=Guidance(SETTING))[0]
        for pictures in (images[:1], images[:1].repeat(3, 1, 1, 1))
    )
    for name, cost in together.items():
        assert float(cost.sum()) == pytest.approx(float(each[name].sum()), rel=1e-9)


@torch.no_grad()
def test_the_closed_form_for_questions_is_what_fvcore_counts():
    model = model_of(SMALL, INSTANCE)
    model.text_guides = True
    inputs = *questions(SMALL, [7]), *answers([4]), torch.ones(1, dtype=torch.long)
    counted = fvcore_gflops(model, inputs, Guidance(SETTING))
    assert float(model.costs(*inputs, guidance=Guidance(SETTING))[1]) == pytest.approx(sum(counted.values()), rel=1e-9)
