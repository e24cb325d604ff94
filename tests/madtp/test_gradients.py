"""Gradients from the task to the learnable tokens: finite differences, the same in both layouts, and no other outputs."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from madtp.blocks import Guidance
from madtp.importance import AttentionStatistics, token_importance
from madtp.packing import pack
from madtp.pruning import TokenPruner
from madtp.rule import GRADIENTS, PruneSetting, PruningRule
from madtp.selection import decision_gate, sparsemax, threshold
from tests import tiny
from tests.models.test_vit import LEARNABLE, pictures, tower

DIM, NUMBER, TOKENS, TEMPERATURE, RELAXATION = 8, 5, 12, 3.0, 0.7
VALID = torch.arange(1 + TOKENS) < torch.tensor([[1 + TOKENS], [9]])


class Case:
    """One pruner in double precision on a batch of two, with everything but the learnable tokens fixed."""

    def __init__(self, gradient: str, merge: bool = True):
        torch.manual_seed(3)
        self.pruner = TokenPruner(DIM, NUMBER, DIM, PruningRule(keep="instance", merge=merge, gradient=gradient)).double()
        self.entering = torch.randn(2, 1 + TOKENS, DIM, dtype=torch.float64)
        self.x = torch.randn(2, 1 + TOKENS, DIM, dtype=torch.float64)
        self.learnable = torch.randn(NUMBER, DIM, dtype=torch.float64)
        self.weights = torch.randn(2, 1 + TOKENS, DIM, dtype=torch.float64)
        self.statistics = AttentionStatistics(torch.rand(2, TOKENS).double(), torch.rand(2, TOKENS).double())

    def attention(self, learnable: Tensor) -> Tensor:
        return self.pruner.align(self.entering, VALID, learnable, False)[0]

    def importance(self, learnable: Tensor) -> tuple[Tensor, Tensor]:
        attention = self.attention(learnable)
        importance = token_importance(self.statistics, attention, self.pruner.rule.scores, VALID[:, 1:])
        return importance, threshold(attention, importance, TEMPERATURE, VALID[:, 1:])

    def prune(self, learnable: Tensor, packed: bool = False) -> tuple[Tensor, Tensor]:
        x, entering, layout = self.x, self.entering, VALID
        if packed:
            (x, layout), (entering, _) = pack(x, VALID), pack(entering, VALID)
        attention = self.pruner.align(entering, layout, learnable, False)[0]
        tokens, layout, kept = self.pruner.prune(x, layout, attention, self.statistics, TEMPERATURE, RELAXATION)
        return (layout.pad(tokens) * layout.valid.unsqueeze(2) if packed else tokens * layout.unsqueeze(2)), kept

    def loss(self, learnable: Tensor, packed: bool = False) -> Tensor:
        tokens = self.prune(learnable, packed)[0]
        return (tokens * self.weights[:, : tokens.shape[1]]).sum()

    def gradient(self, packed: bool = False) -> Tensor:
        learnable = self.learnable.clone().requires_grad_()
        return torch.autograd.grad(self.loss(learnable, packed), learnable)[0]


def differences(function: Callable[[Tensor], Tensor], at: Tensor, step: float = 1e-6) -> Tensor:
    """Returns the gradient of a scalar function by central differences."""
    found = torch.empty_like(at)
    for index in range(at.numel()):
        shift = torch.zeros_like(at).flatten()
        shift[index] = step
        shift = shift.view_as(at)
        found.view(-1)[index] = (function(at + shift) - function(at - shift)) / (2 * step)
    return found


def test_without_a_gradient_from_the_task_the_learnable_tokens_have_none():
    case = Case("none")
    assert not case.loss(case.learnable.clone().requires_grad_()).requires_grad


def test_through_the_merge_the_gradient_is_that_of_the_outputs_while_the_decisions_stay():
    case = Case("merge")
    with torch.no_grad():
        expected = differences(case.loss, case.learnable)
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(case.gradient(), expected, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("merge", [True, False])
def test_through_the_decisions_the_gradient_is_that_of_a_soft_mask(merge):
    """The oracle scales every token by its soft decision, differentiates numerically, and adds the merge's own gradient."""
    case = Case("decision", merge)
    with torch.no_grad():
        importance, theta = case.importance(case.learnable)
        kept, pruned = case.prune(case.learnable)[1], VALID[:, 1:] & ~case.prune(case.learnable)[1]
        assert kept.any(dim=1).all() and (pruned.sum(dim=1) > 1).all()

        def soft(learnable: Tensor) -> Tensor:
            scores, bound = case.importance(learnable)
            return torch.sigmoid((scores - bound[:, None]) * torch.tensor([[TOKENS], [8]]) / RELAXATION)

        def surrogate(learnable: Tensor) -> Tensor:
            total, mask, before = 0.0, soft(learnable), soft(case.learnable)
            for sample in range(2):
                x, weight = case.x[sample, 1:], case.weights[sample]
                for place, token in enumerate(kept[sample].nonzero().flatten()):
                    total += (mask - before)[sample, token] * (x[token] @ weight[1 + place])
                if merge:
                    last, share = 1 + int(kept[sample].sum()), importance[sample] * pruned[sample]
                    for token in pruned[sample].nonzero().flatten():
                        change = (before - mask)[sample, token]
                        total += change * share[token] / share.sum() * (x[token] @ weight[last])
            return total

        expected = differences(surrogate, case.learnable)
    if merge:
        expected = expected + Case("merge").gradient()
    assert expected.abs().max() > 0.01
    torch.testing.assert_close(case.gradient(), expected, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize("gradient", GRADIENTS[1:])
def test_packed_and_padded_give_the_same_gradients(gradient):
    case = Case(gradient)
    torch.testing.assert_close(case.gradient(packed=True), case.gradient(), atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("packed", [False, True])
def test_the_way_of_the_gradient_changes_no_output(packed):
    outputs = [Case(gradient).prune(torch.nn.Parameter(Case(gradient).learnable), packed)[0] for gradient in GRADIENTS]
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


@pytest.mark.parametrize("padding", [0, 3])
def test_the_gradient_of_sparsemax_is_exact(padding):
    torch.manual_seed(0)
    z = (3 * torch.randn(4, 7, dtype=torch.float64)).requires_grad_()
    valid = torch.arange(7) < 7 - padding
    assert torch.autograd.gradcheck(lambda z: sparsemax(z, valid), z)


def test_a_soft_decision_is_half_at_the_threshold_and_steeper_when_narrower():
    importance = torch.tensor([[0.5, 0.3, 0.2]], requires_grad=True)
    theta, kept, valid = torch.tensor([0.3]), torch.tensor([[True, True, False]]), torch.ones(1, 3, dtype=torch.bool)
    slopes = []
    for relaxation in (1.0, 0.5):
        gate = decision_gate(importance, theta, kept, valid, relaxation)
        assert torch.equal(gate, torch.ones(1, 3))
        slopes.append(torch.autograd.grad(gate.sum(), importance)[0][0])
    assert slopes[0][1].item() == pytest.approx(0.25 * 3) and slopes[1][1].item() == pytest.approx(0.25 * 3 / 0.5)
    assert slopes[0][2].item() < 0 < slopes[0][0].item()  # a pruned token's share of the merged token falls


@pytest.mark.parametrize("gradient", GRADIENTS[1:])
@pytest.mark.parametrize("packed", [False, True])
def test_the_tasks_gradient_reaches_the_learnable_tokens_of_a_tower_and_survives_recomputation(packed, gradient):
    results = []
    for checkpointed in (0, 3):
        vit = tower(PruningRule(keep="instance", gradient=gradient), checkpoint_blocks=checkpointed).train()
        learnable = LEARNABLE.clone().requires_grad_()
        tokens, layout, _ = vit(pictures(), Guidance(PruneSetting(6.0), packed=packed, learnable_tokens=learnable))
        (tokens * (1.0 if packed else layout.unsqueeze(-1))).pow(3).mean().backward()
        results.append(learnable.grad)
    assert results[0].abs().max() > 1e-6
    torch.testing.assert_close(*results, atol=1e-8, rtol=1e-4)


def attention_slopes(rule: PruningRule) -> tuple[float, float]:
    """The derivative of a pruned tower's outputs along its first query, key and value weights: by autograd, and as it is."""
    vit, learnable = tower(rule).double(), LEARNABLE.double()
    weight, guidance = vit.blocks[0].attn.qkv.weight, Guidance(PruneSetting(2.0), learnable_tokens=learnable)
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)).double()
    direction /= direction.norm()

    def loss() -> Tensor:
        tokens = vit(pictures().double(), guidance)[0]
        return (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))).sum()

    (gradient,) = torch.autograd.grad(loss(), weight)
    return float((gradient * direction).sum()), tiny.slope(loss, weight, direction, step=3e-4)


def test_the_authors_merge_sends_gradients_into_the_attention_and_the_papers_does_not():
    """Under their formulas nothing that weights the merged token is a constant."""
    found, expected = attention_slopes(PruningRule(variant="released", gradient="merge"))
    assert found == pytest.approx(expected, rel=2e-3)
    for rule in (PruningRule(variant="released", gradient="none"), PruningRule(gradient="merge")):
        found, expected = attention_slopes(rule)
        assert found != pytest.approx(expected, rel=2e-3)


def test_a_sample_without_prunable_tokens_keeps_gradients_finite():
    case = Case("decision")
    learnable = case.learnable.clone().requires_grad_()
    valid = VALID.clone()
    valid[1, 1:] = False
    attention = case.pruner.align(case.entering, valid, learnable, False)[0]
    tokens, layout, _ = case.pruner.prune(case.x, valid, attention, case.statistics, TEMPERATURE)
    (tokens * layout.unsqueeze(2)).square().sum().backward()
    assert learnable.grad.isfinite().all() and learnable.grad.abs().max() > 0


@pytest.mark.parametrize("wrong", [{"variant": "released"}, {"method": "random"}])
def test_decisions_of_another_rule_have_no_gradient(wrong):
    with pytest.raises(ValueError, match="gradient 'decision'"):
        PruningRule(gradient="decision", **wrong)
