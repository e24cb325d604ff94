"""Activation checkpointing: the same tokens, losses and gradients as without, in both precisions and layouts."""

import pytest
import torch
from fairscale.nn.checkpoint import is_recomputing

from madtp.blocks import Guidance
from madtp.rule import PruneSetting, PruningRule
from tests.models.test_vit import LEARNABLE, pictures, tower


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize(("temperature", "checkpointed"), [(None, 2), (6.0, 2), (6.0, 9)])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(temperature, checkpointed, amp, packed):
    """9: more than there are."""
    rule, results = PruningRule(keep="instance"), []
    for blocks in (0, checkpointed):
        vit = tower(rule, checkpoint_blocks=blocks).train()
        learnable = LEARNABLE.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            guidance = Guidance(PruneSetting(temperature), align=True, packed=packed, learnable_tokens=learnable)
            tokens, layout, record = vit(pictures(), guidance)
        weight = 1.0 if layout is None or packed else layout.unsqueeze(-1)
        loss = (tokens * weight).pow(2).mean() + record.features.pow(2).mean() / 100
        loss.backward()
        results.append((loss.detach(), learnable.grad, {name: p.grad for name, p in vit.named_parameters()}))
    (loss, grad, grads), (other_loss, other_grad, other_grads) = results
    assert grad.abs().max() > 0.01
    for ours, other in ((loss, other_loss), (grad, other_grad), (grads, other_grads)):
        torch.testing.assert_close(ours, other, atol=1e-5, rtol=1e-4)


def test_the_last_blocks_run_again_in_the_backward_pass_and_only_in_training():
    vit, runs = tower(PruningRule(keep="instance"), checkpoint_blocks=2), []
    for index, block in enumerate(vit.blocks):
        block.mlp.register_forward_hook(lambda *_, index=index: runs.append((index, is_recomputing())))
    guidance = Guidance(PruneSetting(6.0), align=True, learnable_tokens=LEARNABLE.clone().requires_grad_())
    for training in (True, False):
        runs.clear()
        vit.train(training)(pictures(), guidance)[0].square().mean().backward()
        again = [(2, True), (1, True)] if training else []
        assert runs == [(0, False), (1, False), (2, False), *again]


def test_parameters_keep_their_names():
    assert list(tower(checkpoint_blocks=2).state_dict()) == list(tower().state_dict())
