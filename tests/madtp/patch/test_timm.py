"""Pruning timm's vision transformers: dense to the bit, packed and padded alike, counted as fvcore counts."""

from dataclasses import replace

import pytest
import torch
from fvcore.nn import FlopCountAnalysis
from timm.models.vision_transformer import VisionTransformer

import madtp
from madtp.patch.timm import TimmBlock
from madtp.trace import surviving

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_heads": 4}
STYLES = {
    "vit": {"num_classes": 7},
    "clip": {"pre_norm": True, "num_classes": 5, "norm_layer": torch.nn.LayerNorm},
    "dinov2": {"reg_tokens": 4, "init_values": 1e-1, "num_classes": 0, "no_embed_class": True},
    "siglip": {"class_token": False, "global_pool": "map", "num_classes": 0},
    "average": {"class_token": False, "global_pool": "avg", "num_classes": 3, "qk_norm": True},
}
PREFIX = {"vit": 1, "clip": 1, "dinov2": 5, "siglip": 0, "average": 0}


@pytest.fixture(params=STYLES)
def style(request) -> str:
    return request.param


def model_of(style: str) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(**SIZES, **STYLES[style]).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "pos_embed" not in name:
                parameter.mul_(3)  # so that attention differs between tokens
    return model


def pictures(number: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 32, 32, generator=generator) * torch.rand(number, 1, 1, 1, generator=generator) * 3


@torch.no_grad()
def test_off_it_is_timms_model_to_the_bit_and_restored_it_is_the_same_object(style):
    model, images = model_of(style), pictures()
    expected, names = model(images), list(model.state_dict())
    pruning = madtp.prune(model, images, p=0.3)
    assert not torch.equal(model(images), expected)
    assert [name for name in model.state_dict() if not name.startswith("madtp.")] == names
    pruning.setting = madtp.OFF
    assert torch.equal(model(images), expected)
    assert madtp.restore(model) is model
    assert torch.equal(model(images), expected) and list(model.state_dict()) == names and "forward" not in vars(model)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@torch.no_grad()
def test_a_pass_that_prunes_nothing_is_timms_pass(style, packed):
    model, images = model_of(style), pictures()
    expected = model(images)
    pruning = madtp.prune(model, images, p=0.3, packed=packed)
    for block in pruning.blocks:
        block.pruner.rule = replace(block.pruner.rule, share=1.0)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    tokens = 16 + PREFIX[style]
    assert all(bool((n == tokens).all()) for n in pruning.record.leaving)


@torch.no_grad()
def test_packed_padded_and_alone_agree_and_prefix_tokens_stay(style, rule):
    model, images = model_of(style), pictures()
    pruning = madtp.prune(model, images, p=0.3, rule=rule)
    packed, record = model(images), pruning.record
    assert record.packed and len(record.leaving[-1].unique()) > 1  # images keep different numbers of tokens
    pruning.packed = False
    padded = model(images)
    torch.testing.assert_close(packed, padded, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(a, b.cpu()) for a, b in zip(record.leaving, pruning.record.leaving, strict=True))
    pruning.packed = True
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=1e-5)
    assert int(torch.stack(record.leaving).min()) >= PREFIX[style]
    alive = surviving(record, torch.ones(len(images), 16, dtype=torch.bool), PREFIX[style])
    kept = record.leaving[-1] - PREFIX[style] - alive[:, -1].sum(dim=1)
    assert 0 <= int(kept.min()) and int(kept.max()) <= SIZES["depth"]  # every block may merge


@torch.no_grad()
def test_p_of_the_gflops_go_and_the_dense_count_is_fvcores(style, rule):
    model, images = model_of(style), pictures()
    image = images[:1]
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False  # fvcore counts nothing for fused attention
    counted = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).tracer_warnings("none").total() / 1e9
    pruning = madtp.prune(model, images, p=0.3, rule=rule)
    assert float(pruning.gflops(image, madtp.OFF)) == pytest.approx(counted, rel=1e-9)
    assert pruning.dense_gflops == pytest.approx(counted, rel=1e-9)  # no padding: all images cost the same
    assert float(pruning.gflops(images).mean()) == pytest.approx(0.7 * counted, rel=0.01)


@torch.no_grad()
def test_without_a_class_token_the_importance_leaves_its_score_out():
    rule = madtp.PruningRule(num_prefix_tokens=0)
    assert rule.scores == ("self", "token") and madtp.PruningRule(num_prefix_tokens=5).scores == ("cls", "self", "token")
    with pytest.raises(ValueError, match="need a class token"):
        madtp.PruningRule(terms=("cls",), num_prefix_tokens=0)


def test_learnable_tokens_train_with_the_model(style):
    model, images = model_of(style), pictures()
    pruning = madtp.prune(model, images, p=0.3, rule=madtp.PruningRule(keep="instance"))
    pruning.align = True
    model.train()
    loss = model(images).float().square().mean() + madtp.similarity_loss(pruning.record.features, torch.randn(8, 100, 48))
    loss.backward()
    assert pruning.learnable_tokens.grad.abs().sum() > 0 and model.blocks[0].attn.qkv.weight.grad.abs().sum() > 0
    assert "madtp.learnable_tokens" in dict(model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_fn": "ParallelScalingBlock"}, "block 0 is a ParallelScalingBlock"),
        ({"global_pool": "map", "class_token": False, "grad": True}, "recomputes activations"),
    ],
)
def test_a_model_that_is_not_supported_is_refused_by_name(settings, message):
    from timm.models import vision_transformer

    settings, grad = dict(settings), settings.get("grad", False)
    settings.pop("grad", None)
    if "block_fn" in settings:
        settings["block_fn"] = getattr(vision_transformer, settings["block_fn"])
    model = VisionTransformer(**SIZES, **settings)
    model.set_grad_checkpointing(grad)
    with pytest.raises(TypeError, match=message):
        madtp.prune(model, pictures())
    assert not hasattr(model, "madtp")
    with pytest.raises(TypeError, match="Linear cannot be pruned"):
        madtp.prune(torch.nn.Linear(2, 2), pictures())


def test_a_pruned_model_is_refused_a_second_time_and_an_unreachable_p_leaves_it_as_it_was():
    model = model_of("vit")
    with pytest.raises(madtp.UnreachableTarget):
        madtp.prune(model, pictures(), p=0.99)
    assert not hasattr(model, "madtp")
    madtp.prune(model, pictures(), p=0.3)
    with pytest.raises(ValueError, match="pruned already"):
        madtp.prune(model, pictures(), p=0.3)
    assert all(isinstance(block, TimmBlock) for block in model.madtp.blocks)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_a_model_in_half_precision_prunes_alone_as_in_a_batch(dtype):
    model, images = model_of("vit").to(dtype), pictures().to(dtype)
    pruning = madtp.prune(model, images, p=0.3, rule=madtp.PruningRule(keep="instance"))
    together = model(images)
    assert together.dtype == dtype and pruning.learnable_tokens.dtype == dtype
    lengths = pruning.record.leaving[-1].tolist()
    for index in range(len(images)):
        model(images[index : index + 1])
        assert pruning.record.leaving[-1].tolist() == [lengths[index]]


def test_frozen_layers_stay_in_evaluation_mode():
    model = model_of("vit").train()
    model.blocks[1].eval()
    before = {name: module.training for name, module in model.named_modules()}
    madtp.prune(model, pictures(), p=0.3)
    assert {name: model.get_submodule(name).training for name in before} == before


def test_a_model_that_returns_all_tokens_is_refused():
    model = model_of("average")
    model.global_pool = ""
    with pytest.raises(TypeError, match="global_pool"):
        madtp.prune(model, pictures(), p=0.3)


def test_by_default_there_are_no_learnable_tokens():
    model = model_of("vit")
    names = list(model.state_dict())
    pruning = madtp.prune(model, pictures(), p=0.3)
    assert pruning.learnable_tokens is None and list(model.state_dict()) == names
    with pytest.raises(ValueError, match="no learnable tokens to align with"):
        pruning.align = True
    madtp.restore(model)
    for given, words in (({"init": "kmeans"}, "init='kmeans'"), ({"num_learnable": 7}, "num_learnable=7")):
        with pytest.raises(ValueError, match=f"{words}: the rule has no learnable tokens; give one with mag=True"):
            madtp.prune(model, pictures(), p=0.3, **given)


def test_a_loss_trains_the_learnable_tokens_where_the_rule_says_so():
    for gradient, reached in (("none", False), ("merge", True), ("decision", True)):
        model = model_of("vit")
        pruning = madtp.prune(model, pictures(), p=0.3, rule=madtp.PruningRule(keep="instance", gradient=gradient))
        model(pictures()).square().sum().backward()
        assert (pruning.learnable_tokens.grad is not None and bool(pruning.learnable_tokens.grad.any())) == reached
