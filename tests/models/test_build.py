"""Parts of models from a config."""

import pytest
import torch

from configs.schema import NlvrConfig
from models.build import checkpoint_blocks, learnable_tokens, pruner_factory, vision_transformer
from utils import UserError

SMALL = {"image_size": 32, "vit": {"patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}, "sd_num": 5, "sd_dim": 24}


@pytest.mark.parametrize("settings", [{"p": 0.0}, {"method": "none"}])
def test_an_uncompressed_model_has_neither_pruners_nor_learnable_tokens(settings):
    config = NlvrConfig(**SMALL, **settings)
    assert pruner_factory(config)(16) is None and learnable_tokens(config) is None
    assert all(block.pruner is None for block in vision_transformer(config, pruner_factory(config)).blocks)


def test_pruners_follow_the_config():
    config = NlvrConfig(**SMALL, keep="instance", tis=["cls", "token"], merge=False)
    pruner = pruner_factory(config)(16, mask_follows=True)
    assert (pruner.rule.keep, pruner.rule.terms, pruner.rule.merge) == ("instance", ("cls", "token"), False)
    assert (pruner.num_learnable, pruner.token_dim, pruner.mask_follows) == (5, 24, True)
    assert isinstance(pruner.alignment.projection, torch.nn.Linear)  # widths differ


def test_the_tasks_loss_reaches_the_learnable_tokens_as_the_variant_has_it():
    def gradient(**keys) -> str:
        return pruner_factory(NlvrConfig(**SMALL, **keys))(16).rule.gradient

    assert gradient() == "none" and gradient(variant="released") == "merge"
    assert gradient(token_gradient="decision") == "decision" and gradient(variant="released", token_gradient="none") == "none"


def test_learnable_tokens_start_as_the_variant_has_them():
    assert learnable_tokens(NlvrConfig(**SMALL)) == (5, 24, 0.02)
    assert learnable_tokens(NlvrConfig(**SMALL, variant="released")) == (5, 24, 1.0)
    assert learnable_tokens(NlvrConfig(**SMALL, variant="released", sd_init_std=3.0)) == (5, 24, 3.0)


def test_blocks_recompute_only_where_the_switch_is_on():
    assert checkpoint_blocks(NlvrConfig(vit_ckpt_layer=4)) == 0
    assert checkpoint_blocks(NlvrConfig(vit_ckpt_layer=4, vit_grad_ckpt=True)) == 4


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"variant": "released", "keep": "instance"}, "variant 'released' knows"),
        ({"mag_projection": "off"}, "without a projection; change the keys"),
    ],
)
def test_a_rule_that_cannot_be_is_the_users_error(settings, said):
    with pytest.raises(UserError, match=said):
        pruner_factory(NlvrConfig(**SMALL, **settings))(16)
