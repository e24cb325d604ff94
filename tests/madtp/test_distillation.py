"""Distillation: what is compared, against closed forms, for every model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from madtp.blocks import Guidance
from madtp.distillation import Distillation, logit_loss
from madtp.rule import PruneSetting, PruningRule
from tests import tiny

RULE = PruningRule(keep="instance")
SETTING = PruneSetting(5.0)


def nlvr_inputs() -> tuple:
    return tiny.images(3), *tiny.text([9, 5, 12])


def test_answers_are_compared_by_their_divergence_at_a_temperature():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    p, q = (teacher / 2).softmax(dim=-1), (student / 2).softmax(dim=-1)
    expected = 4 * (p * (p / q).log()).sum(dim=-1)
    torch.testing.assert_close(logit_loss(student, teacher, 2.0), expected.mean())
    valid = torch.tensor([True, False, True, False])
    torch.testing.assert_close(logit_loss(student, teacher, 2.0, valid), expected[valid].mean())


@pytest.mark.parametrize(("distill_temperature", "weight"), [(2.0, 2.0), (1.0, 0.5)])
def test_the_documented_weights_give_the_loss_of_the_authors_code_on_two_classes(distill_temperature, weight):
    """T^2 twice, and the mean over samples and classes, as of `KLDivLoss()` in their PyTorch."""
    student, teacher, t = torch.randn(4, 2), torch.randn(4, 2), distill_temperature
    theirs = t**4 * F.kl_div(F.log_softmax(student / t, dim=1), F.softmax(teacher / t, dim=1), reduction="none").mean()
    torch.testing.assert_close(weight * logit_loss(student, teacher, t), theirs)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_an_unpruned_student_with_the_teachers_weights_has_nothing_to_learn(packed):
    student, teacher = tiny.nlvr(RULE).train(), tiny.nlvr()
    distillation = Distillation(teacher, student, 2.0)
    student(*nlvr_inputs(), Guidance(packed=packed))
    losses = distillation.losses(lambda teacher: teacher(*nlvr_inputs(), Guidance(packed=packed)))
    assert set(losses) == {"distill_vision", "distill_language", "distill_logits"}
    assert all(float(loss.detach().abs()) < 1e-6 for loss in losses.values())


def test_features_are_class_tokens_of_every_block():
    """Computed by hand from the blocks of two plain models."""
    student, teacher = tiny.nlvr(RULE).train(), tiny.nlvr()
    with torch.no_grad():
        teacher.visual_encoder.pos_embed.mul_(1.5)
    distillation = Distillation(teacher, student, 2.0)
    student(*nlvr_inputs())
    losses = distillation.losses(lambda teacher: teacher(*nlvr_inputs()))
    images = nlvr_inputs()[0].transpose(0, 1).flatten(0, 1)
    means = []
    with torch.no_grad():
        pair = [start(model.visual_encoder, images) for model in (student, teacher)]
        for blocks in zip(student.visual_encoder.blocks, teacher.visual_encoder.blocks, strict=True):
            pair = [block(x, None, Guidance())[0] for block, x in zip(blocks, pair, strict=True)]
            means.append(F.mse_loss(pair[0][:, 0], pair[1][:, 0]))
    torch.testing.assert_close(losses["distill_vision"], torch.stack(means).mean())


def start(vit: nn.Module, images: torch.Tensor) -> torch.Tensor:
    x = vit.patch_embed(images)
    return torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed


def test_the_student_learns_from_it_and_the_teacher_does_not():
    student, teacher = tiny.nlvr(RULE).train(), tiny.nlvr()
    distillation = Distillation(teacher, student, 2.0)
    student(*nlvr_inputs(), Guidance(SETTING))
    losses = distillation.losses(lambda teacher: teacher(*nlvr_inputs()))
    assert all(float(loss.detach()) > 1e-4 for loss in losses.values())
    sum(losses.values()).backward()
    assert student.visual_encoder.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert student.text_encoder.encoder.layer[0].attention.self.query.weight.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_evaluating_the_student_between_steps_is_not_listened_to():
    student, teacher = tiny.nlvr(RULE), tiny.nlvr()
    distillation = Distillation(teacher, student, 2.0)
    student.eval()(tiny.images(5, seed=1), *tiny.text([4] * 5))
    student.train()(*nlvr_inputs())
    losses = distillation.losses(lambda teacher: teacher(*nlvr_inputs()))
    assert all(float(loss.detach().abs()) < 1e-6 for loss in losses.values())


@pytest.mark.parametrize("kind", tiny.PAIR_MODELS)
def test_pairs_are_compared_by_their_similarities_either_way(kind):
    """Only the first of the text encoder's passes counts, and none of the momentum encoders'."""
    student, teacher = tiny.PAIR_MODELS[kind](RULE).train(), tiny.PAIR_MODELS[kind](None)
    pairs, ids = tiny.pairs(kind, [8, 5, 11]), torch.arange(3)
    distillation = Distillation(teacher, student, 2.0)
    student(*pairs, ids, 0.4)
    losses = distillation.losses(lambda teacher: teacher.encode_pairs(*pairs))
    assert set(losses) == {"distill_vision", "distill_language", "distill_logits"}
    assert all(float(loss.detach().abs()) < 1e-5 for loss in losses.values())
    encoded = teacher.encode_pairs(*pairs)
    vision, language = (block_end(teacher, name, pairs) for name in ("vision", "language"))
    expected = encoded[0].feature @ encoded[1].feature.t() / teacher.contrastive_temperature
    torch.testing.assert_close(teacher.pair_logits(vision, language), expected, atol=1e-5, rtol=1e-5)


def block_end(model: nn.Module, branch: str, pairs: tuple) -> torch.Tensor:
    """The class token that a branch's last block leaves, or what the model has in its place."""
    seen = []
    *_, last = model.branches[branch]
    hook = last.register_forward_hook(lambda module, inputs, output: seen.append(model.class_token(branch, *output[:2])))
    with torch.no_grad():
        model.encode_pairs(*pairs)
    hook.remove()
    return seen[0]
