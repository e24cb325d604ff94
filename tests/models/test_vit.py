"""The vision tower: dense, it is timm's and transformers'; pruned, it is the same whatever the batch."""

import pytest
import timm
import torch
from transformers import BlipVisionConfig, BlipVisionModel

from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from models.vit import VisionTransformer
from tests.tiny import with_lively_weights

SIZES = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
LEARNABLE = 0.1 * torch.randn(5, 24, generator=torch.Generator().manual_seed(1))


def tower(rule: PruningRule | None = None, **settings) -> VisionTransformer:
    make_pruner = (lambda dim: None) if rule is None else (lambda dim: TokenPruner(dim, *LEARNABLE.shape, rule))
    return with_lively_weights(VisionTransformer(**SIZES, make_pruner=make_pruner, **settings)).eval()


def pictures(number: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 3, 32, 32, generator=generator) * torch.linspace(0.2, 3, number)[:, None, None, None]


@torch.no_grad()
def test_dense_equals_timm():
    vit = tower()
    other = timm.models.vision_transformer.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=0, global_pool=""
    ).eval()
    other.load_state_dict(vit.state_dict())
    tokens, valid, record = vit(pictures())
    torch.testing.assert_close(tokens, other.forward_features(pictures()), atol=1e-5, rtol=1e-5)
    assert valid is None and record.features is None and record.kept == [None] * 3
    assert [n.tolist() for n in record.entering] == [n.tolist() for n in record.leaving] == [[17] * 3] * 3


# our name of a part -> transformers'
HF_NAMES = {
    "cls_token": "embeddings.class_embedding", "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding", "blocks": "encoder.layers", "norm1": "layer_norm1", "norm2": "layer_norm2",
    "attn.qkv": "self_attn.qkv", "attn.proj": "self_attn.projection", "norm": "post_layernorm",
}  # fmt: skip


@torch.no_grad()
def test_dense_equals_the_vision_model_of_transformers():
    vit = tower()
    config = BlipVisionConfig(
        hidden_size=24,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=3,
        image_size=32,
        patch_size=8,
        layer_norm_eps=1e-6,
    )
    weights = {}
    for name, tensor in vit.state_dict().items():
        translated = f".{name}."
        for ours, theirs in HF_NAMES.items():
            translated = translated.replace(f".{ours}.", f".{theirs}.")
        weights[translated.strip(".")] = tensor
    other = BlipVisionModel(config).eval()
    other.load_state_dict(weights)
    tokens = vit(pictures())[0]
    torch.testing.assert_close(tokens, other(pictures()).last_hidden_state, atol=1e-5, rtol=1e-5)
    assert (tokens[0] - tokens[1]).abs().max() > 0.1  # the pictures do have an effect


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_switched_off_pruners_change_not_one_number(training):
    """Neither without a temperature, nor when only the alignment features are wanted, nor before `prune_from`."""
    dense, sparse = tower().train(training), tower(PruningRule()).train(training)
    expected = dense(pictures())[0]
    assert torch.equal(sparse(pictures(), Guidance(learnable_tokens=LEARNABLE))[0], expected)
    aligned, _, record = sparse(pictures(), Guidance(OFF, align=True, learnable_tokens=LEARNABLE))
    assert torch.equal(aligned, expected) and record.features.shape == (3, 5, 24)
    assert torch.equal(sparse(pictures(), Guidance(PruneSetting(1.0, prune_from=3), learnable_tokens=LEARNABLE))[0], expected)
    assert sparse(pictures(), Guidance(PruneSetting(1.0, prune_from=2), learnable_tokens=LEARNABLE))[0].shape[1] < expected.shape[1]


@torch.no_grad()
def test_a_batch_of_one_is_a_batch_of_many_under_instance():
    vit, setting, many = tower(PruningRule(keep="instance")), PruneSetting(8.0), pictures(8)
    tokens, valid, record = vit(many, Guidance(setting, align=True, learnable_tokens=LEARNABLE))
    assert len(set(record.leaving[0].tolist())) > 3  # the pictures differ in what is kept
    for index in range(8):
        alone, _, alone_record = vit(many[index : index + 1], Guidance(setting, align=True, learnable_tokens=LEARNABLE))
        torch.testing.assert_close(tokens[index][valid[index]], alone[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(record.features[index : index + 1], alone_record.features, atol=1e-5, rtol=1e-5)
        assert [int(n[index]) for n in record.leaving] == [int(n[0]) for n in alone_record.leaving]
        for block, alone_block in zip(record.kept, alone_record.kept, strict=True):
            kept = block[index].nonzero().squeeze(1)
            assert torch.equal(kept, alone_block[0].nonzero().squeeze(1))


@torch.no_grad()
@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_blocks_between_those_that_prune_are_the_dense_ones(packed):
    """They attend without the statistics of scores, so that attention stays fused."""
    vit, asked = tower(PruningRule(keep="instance", every=2)), []
    for block in vit.blocks:
        plain = block.attend
        block.attend = lambda x, layout, rule, plain=plain: (asked.append(rule), plain(x, layout, rule))[1]
    record = vit(pictures(), Guidance(PruneSetting(8.0), learnable_tokens=LEARNABLE, packed=packed))[2]
    assert [rule is not None for rule in asked] == [True, False, True] == [kept is not None for kept in record.kept]
    assert torch.equal(record.entering[1], record.leaving[1]) and (record.leaving[2] < record.entering[2]).any()


@torch.no_grad()
def test_a_static_method_removes_as_many_in_each_block_that_prunes():
    vit = tower(PruningRule(method="stp", keep="instance", every=2))
    record = vit(pictures(), Guidance(PruneSetting(9.0), learnable_tokens=LEARNABLE))[2]
    removed = [int((before - after)[0]) for before, after in zip(record.entering, record.leaving, strict=True)]
    tokens = int(record.entering[0][0]) - 1
    assert removed == [tokens // 10, 0, 2 * tokens // 10 - tokens // 10]


@torch.no_grad()
def test_under_max_every_picture_keeps_as_many_as_the_one_that_needs_most():
    setting = PruneSetting(8.0)
    together = tower(PruningRule(keep="max"))(pictures(8), Guidance(setting, learnable_tokens=LEARNABLE))[2]
    apart = tower(PruningRule(keep="instance"))(pictures(8), Guidance(setting, learnable_tokens=LEARNABLE))[2]
    assert together.leaving[0].tolist() == [int(apart.leaving[0].max())] * 8
    assert int(apart.leaving[0].min()) < int(apart.leaving[0].max())


@torch.no_grad()
def test_the_features_are_those_of_the_tokens_that_enter_the_blocks():
    """One block: its features come from the embedded patches, before any norm, pruned or not."""
    vit = tower(PruningRule(keep="instance"))
    vit.blocks = vit.blocks[:1]
    patches = (vit.patch_embed(pictures()) + vit.pos_embed[:, 1:]).double()
    weights = (LEARNABLE.double() @ patches.transpose(1, 2) / 24**0.5).softmax(dim=-1)
    for setting in (OFF, PruneSetting(5.0)):
        features = vit(pictures(), Guidance(setting, align=True, learnable_tokens=LEARNABLE))[2].features
        torch.testing.assert_close(features.double(), weights @ patches, atol=1e-4, rtol=1e-4)


def test_stochastic_depth_rises_to_the_last_block():
    vit = tower(drop_path=0.2)
    assert [block.drop_path.rate for block in vit.blocks] == pytest.approx([0.0, 0.1, 0.2])
