"""The diagnostics of the alignment, against their definitions and models whose answer is known."""

import pytest
import torch

from engine.diagnostics import Decisions, PairSimilarity, gradient_norms, moved, rank_correlation, separation, watch
from madtp.blocks import Guidance
from madtp.rule import PruneSetting, PruningRule
from tests import tiny

SETTING = PruneSetting(3.0)


def forward(model, batch, setting):
    return model(*batch["inputs"], Guidance(setting, packed=batch["packed"]))


def batches(packed=True):
    return [{"inputs": (tiny.images(4), *tiny.text([9, 4, 12, 7, 12, 10, 11, 3])), "packed": packed}]


def pairs(vision, language):
    left, right = vision.chunk(2)
    groups = torch.arange(len(left)).repeat_interleave(len(language) // len(left))
    return ((left + right) / 2)[groups], language, groups


def decisions(model, batches, forward, setting):
    watcher = Decisions(model.learnable_tokens.detach())
    watch(model, batches, forward, setting, [watcher])
    return watcher.result()


def pair_similarity(model, batches, forward, setting, pairs):
    watcher = PairSimilarity(pairs)
    watch(model, batches, forward, setting, [watcher])
    return watcher.result()


def test_rank_correlation_is_that_of_spearman():
    first = torch.tensor([[0.1, 0.4, 0.2, 0.9, 7.0], [3.0, 2.0, 1.0, 0.0, 0.0]])
    second = torch.tensor([[1.0, 5.0, 9.0, 30.0, 0.0], [1.0, 2.0, 3.0, 9.0, 9.0]])
    valid = torch.tensor([[True] * 4 + [False], [True] * 3 + [False] * 2])
    expected = 1 - 6 * (0 + 1 + 1 + 0) / (4 * (16 - 1))  # ranks 0 2 1 3 and 0 1 2 3
    assert rank_correlation(first, second, valid).tolist() == pytest.approx([expected, -1.0])


def test_separation_counts_the_pairs_in_the_right_order():
    matching, shuffled = torch.tensor([3.0, 1.0]), torch.tensor([0.0, 1.0, 2.0])
    right = sum(1.0 if m > s else 0.5 if m == s else 0.0 for m in matching for s in shuffled)
    assert separation(matching, shuffled) == pytest.approx(right / 6)


def test_learnable_tokens_move_by_their_relative_distance():
    before = torch.randn(5, 4)
    assert moved(before, before) == pytest.approx({"distance": 0.0, "cosine": 1.0})
    assert moved(before, 3 * before) == pytest.approx({"distance": 2.0, "cosine": 1.0})


@pytest.mark.parametrize(("gradient", "reached"), [("none", False), ("merge", True), ("decision", True)])
def test_gradient_norms_name_the_losses_that_reach_the_learnable_tokens(gradient, reached):
    model = tiny.nlvr(PruningRule(keep="instance", gradient=gradient), layers=2).train()
    output = model(*batches()[0]["inputs"], Guidance(SETTING, align=True))
    norms = gradient_norms({"task": output.logits.sum(), "similarity": output.similarity}, {"similarity": 0.1}, model.space_dict)
    twice = gradient_norms({"similarity": output.similarity}, {"similarity": 0.2}, model.space_dict)
    assert (norms["task"] > 0) == reached and norms["similarity"] > 0
    assert twice["similarity"] == pytest.approx(2 * norms["similarity"])


@pytest.mark.parametrize("packed", [False, True])
def test_decisions_depend_on_learnable_tokens_only_as_far_as_the_importance_does(packed):
    rule = PruningRule(keep="instance", terms=("cls", "self"))
    found = decisions(tiny.nlvr(rule, layers=3).eval(), batches(packed), forward, PruneSetting(0.0))
    assert found["changed_redrawn"] == 0 and found["changed_without_token"] == 0  # at temperature 0 theta is the mean importance
    assert set(found) == {"rank_cls_self", "changed_redrawn", "changed_without_token"}
    model = tiny.nlvr(PruningRule(keep="instance"), layers=3).eval()
    found = decisions(model, batches(packed), forward, SETTING)
    assert {"rank_cls_token", "rank_self_token"} <= set(found) and 0 < found["changed_redrawn"] < 1
    assert all(block.pruner.rule == PruningRule(keep="instance") for block in model.visual_encoder.blocks)


@torch.no_grad()
def test_watching_changes_no_output():
    model, batch = tiny.nlvr(PruningRule(keep="instance"), layers=3).eval(), batches()[0]
    outputs = []
    decisions(model, [batch], lambda *args: outputs.append(forward(*args).logits), SETTING)
    assert not any(block._forward_pre_hooks for block in model.visual_encoder.blocks)
    assert torch.equal(outputs[0], forward(model, batch, SETTING).logits)


def test_pair_similarity_is_l_sim_for_matching_pairs():
    model = tiny.nlvr(PruningRule(keep="instance"), layers=2).eval()
    found = pair_similarity(model, batches(), forward, SETTING, pairs)
    expected = model(*batches()[0]["inputs"], Guidance(SETTING, align=True, packed=True)).similarity.detach()
    assert found["matching"] == pytest.approx(float(expected), rel=1e-4)
    assert 0 <= found["auc"] <= 1


def test_a_single_image_has_no_shuffled_pairs():
    batch = {"inputs": (tiny.images(1), *tiny.text([9, 4])), "packed": True}
    assert pair_similarity(tiny.nlvr(PruningRule(keep="instance"), layers=2).eval(), [batch], forward, SETTING, pairs) == {}


def test_where_there_is_no_class_token_its_term_is_in_no_comparison():
    """Images of SigLIP, by the terms cls and token: without the token term nothing is left to choose by."""
    model = tiny.siglip(PruningRule(keep="instance", terms=("cls", "token")))
    inputs = {"inputs": tiny.pairs("siglip", [9, 4, 12]), "packed": True}

    def encode(model, batch, setting):
        return model.encode_image(batch["inputs"][0], Guidance(setting, packed=True))

    found = decisions(model, [inputs], encode, SETTING)
    assert "changed_without_token" not in found and 0 < found["changed_redrawn"] <= 1
