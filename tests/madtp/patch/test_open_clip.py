"""Pruning open_clip's models: dense to the bit, packed, padded and alone alike, counted as fvcore counts."""

from dataclasses import replace

import open_clip
import pytest
import torch
import torch.nn.functional as F
from fvcore.nn import FlopCountAnalysis
from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from torch import Tensor, nn

import madtp
from tests.madtp.patch.test_transformers import END, P, lively, pictures, texts

VISION = {"layers": 4, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32, "mlp_ratio": 2.0}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 32, "heads": 2, "layers": 4}


def siglip() -> CustomTextCLIP:
    """SigLIP as open_clip has it: an image encoder of timm with attention pooling, and a text encoder without a causal mask."""
    from timm.models.vision_transformer import VisionTransformer

    text = CLIPTextCfg(**TEXT, no_causal_mask=True, pool_type="last")
    model = CustomTextCLIP(48, CLIPVisionCfg(**VISION), text)
    model.visual = nn.Sequential()
    model.visual.trunk = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=4, class_token=False, global_pool="map", num_classes=0
    )
    model.visual.head = nn.Sequential()
    return model


MODELS = {
    "clip": lambda: CLIP(24, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT), quick_gelu=True),
    "clip with scales": lambda: CLIP(24, CLIPVisionCfg(**VISION, ls_init_value=0.5), CLIPTextCfg(**TEXT)),
    "custom text": lambda: CustomTextCLIP(24, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT)),
    "siglip": siglip,
}


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


def model_of(kind: str) -> nn.Module:
    return lively(MODELS[kind])


def batch_of(number: int = 6) -> tuple[Tensor, Tensor]:
    return pictures(number), texts(number)


def features(model: nn.Module, images: Tensor, ids: Tensor) -> Tensor:
    return torch.cat([model.encode_image(images), model.encode_text(ids)], dim=1)


@torch.no_grad()
def test_off_it_is_the_original_to_the_bit_and_restored_it_is_the_same_object(kind):
    model, batch = model_of(kind), batch_of()
    expected, names = features(model, *batch), list(model.state_dict())
    pruning = madtp.prune(model, batch, p=P)
    assert not torch.equal(features(model, *batch), expected)
    assert [name for name in model.state_dict() if not name.startswith("madtp.")] == names
    pruning.setting = madtp.OFF
    assert torch.equal(features(model, *batch), expected)
    assert madtp.restore(model) is model and list(model.state_dict()) == names
    assert torch.equal(features(model, *batch), expected)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@torch.no_grad()
def test_a_pass_that_prunes_nothing_is_the_original_pass(kind, packed):
    model, batch = model_of(kind), batch_of()
    expected = features(model, *batch)
    pruning = madtp.prune(model, batch, p=P, packed=packed)
    for block in pruning.blocks:
        block.pruner.rule = replace(block.pruner.rule, share=1.0)
    torch.testing.assert_close(features(model, *batch), expected, atol=1e-5, rtol=1e-5)
    assert set(pruning.records) == {"vision", "language"}


@torch.no_grad()
def test_packed_padded_and_alone_agree(kind, rule):
    model, (images, ids) = model_of(kind), batch_of()
    pruning = madtp.prune(model, {"image": images, "text": ids}, p=P, rule=rule)
    packed = features(model, images, ids)
    assert pruning.record.packed and len(pruning.record.leaving[-1].unique()) > 1
    pruning.packed = False
    torch.testing.assert_close(features(model, images, ids), packed, atol=1e-5, rtol=1e-5)
    pruning.packed = True
    each = [features(model, images[i : i + 1], ids[i : i + 1]) for i in range(len(ids))]
    torch.testing.assert_close(torch.cat(each), packed, atol=1e-5, rtol=1e-5)


class Call(nn.Module):
    """The features of a model, for the tracer."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, ids: Tensor) -> Tensor:
        return features(self.model, images, ids)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_, **__) -> Tensor:
    scores = query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5
    return (scores if attn_mask is None else scores + attn_mask).softmax(dim=-1) @ value


@torch.no_grad()
def test_p_of_the_gflops_go_and_the_dense_count_is_fvcores(kind, rule, monkeypatch):
    model, batch = model_of(kind), batch_of()
    one = batch[0][:1], torch.tensor([[5, 9, 7, 21, 33, 8, 4, 17, 3, 25, 12, END]])
    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", plain_attention)  # fvcore counts nothing for fused ones
        patch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
        counter = FlopCountAnalysis(Call(model), one).unsupported_ops_warnings(False).tracer_warnings("none")
        counted = counter.total() / 1e9
    pruning = madtp.prune(model, batch, p=P, rule=rule)
    assert float(pruning.gflops(one, madtp.OFF)) == pytest.approx(counted, rel=1e-9)
    assert float(pruning.gflops(batch).mean()) == pytest.approx((1 - P) * pruning.dense_gflops, rel=0.01)


@torch.no_grad()
def test_images_alone_prune_the_image_encoder_alone():
    model, (images, ids) = model_of("clip"), batch_of()
    words = model.encode_text(ids)
    assert list(madtp.prune(model, images, p=P).records) == ["vision"]
    assert torch.equal(model.encode_text(ids), words)


def test_what_is_not_supported_is_refused_by_name():
    text = CLIPTextCfg(**TEXT)
    resnet = CLIP(24, CLIPVisionCfg(layers=(1, 1, 1, 1), width=8, image_size=32), text)
    with pytest.raises(TypeError, match="the image encoder is a ModifiedResNet"):
        madtp.prune(resnet, batch_of())
    average = CLIP(24, CLIPVisionCfg(**VISION, pool_type="avg"), text)
    with pytest.raises(TypeError, match="does not pool by its class token"):
        madtp.prune(average, batch_of())
    appended = CustomTextCLIP(24, CLIPVisionCfg(**VISION), CLIPTextCfg(**TEXT, embed_cls=True))
    with pytest.raises(TypeError, match="give images alone"):
        madtp.prune(appended, batch_of())
    assert list(madtp.prune(appended, batch_of()[0], p=P).records) == ["vision"]
    model = model_of("clip")
    model.set_grad_checkpointing()
    with pytest.raises(TypeError, match=r"set_grad_checkpointing\(False\)"):
        madtp.prune(model, batch_of())


def test_the_published_shapes_of_open_clip_are_supported():
    """Every text and image encoder of open_clip's vision transformers that CLIP's checkpoints use."""
    for name in ("ViT-B-32", "ViT-B-16", "ViT-L-14", "ViT-H-14", "ViT-bigG-14"):
        config = open_clip.get_model_config(name)
        small = config["vision_cfg"] | {"layers": 1}, config["text_cfg"] | {"layers": 1}
        with torch.device("meta"):
            model = CLIP(config["embed_dim"], CLIPVisionCfg(**small[0]), CLIPTextCfg(**small[1]))
        assert [tower.name for tower in madtp.prune(model, setting=madtp.PruneSetting(1.0)).towers] == ["vision", "language"], name
