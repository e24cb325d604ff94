"""SigLIP's towers: dense, they are transformers'; pruned, the library's; the last place is read, and the tokens left are pooled."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from transformers import SiglipConfig, SiglipModel

import madtp
from clip.model import ClipSize, QuickGelu
from clip.siglip import Siglip
from madtp.blocks import Guidance
from madtp.flops import GIGA
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from models.clip_retrieval import SiglipRetrieval
from models.weights.clip import dense_weights, load_clip_weights, to_transformers
from tests import tiny
from tests.tiny import padded_text, with_lively_weights

SMALL = replace(tiny.SIGLIP, vision_layers=2, activation="gelu_tanh")
LARGER = ClipSize(50, 8, 32, 3, 4, 24, 4, 3, 16, 50, 32, "gelu_tanh", 70, 100, "siglip")  # an edge of 2 pixels is left out
SIZES = pytest.mark.parametrize("size", [SMALL, LARGER], ids=["small", "larger"])
INSTANCE = PruningRule(keep="instance")


def transformers_model(size: ClipSize) -> SiglipModel:
    config = SiglipConfig(
        vision_config={
            "hidden_size": size.vision_width, "intermediate_size": size.vision_hidden, "num_hidden_layers": size.vision_layers,
            "num_attention_heads": size.vision_heads, "image_size": size.image_size, "patch_size": size.patch_size,
        },
        text_config={
            "hidden_size": size.text_width, "intermediate_size": size.text_hidden, "num_hidden_layers": size.text_layers,
            "num_attention_heads": size.text_heads, "max_position_embeddings": size.context_length,
            "vocab_size": size.vocab_size, "projection_size": size.embed_dim, "bos_token_id": 1, "eos_token_id": 1,
        },
    )  # fmt: skip
    model = with_lively_weights(SiglipModel(config).eval())
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    return model


def inputs(size: ClipSize) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    strength = torch.tensor([0.3, 1, 2, 3])[:, None, None, None]
    return torch.randn(4, 3, size.image_size, size.image_size) * strength, padded_text([4, 9, 7, 12], size=size)[0]


@SIZES
@torch.no_grad()
def test_dense_equals_transformers(size):
    other, model = transformers_model(size), SiglipRetrieval(size, queue_size=8).eval()
    load_clip_weights(model, other.state_dict(), "SiglipModel")
    images, ids = inputs(size)
    expected = other(input_ids=ids, pixel_values=images)
    assert not torch.allclose(expected.image_embeds[0], expected.image_embeds[1], atol=1e-2)  # the comparison is not empty
    assert not torch.allclose(expected.text_embeds[0], expected.text_embeds[1], atol=1e-2)
    for packed in (False, True):
        image, text = model.encode_image(images, Guidance(packed=packed)), model.encode_text(ids, guidance=Guidance(packed=packed))
        torch.testing.assert_close(image.feature, expected.image_embeds, atol=1e-5, rtol=0)
        torch.testing.assert_close(text.feature, expected.text_embeds, atol=1e-5, rtol=0)
    logits = text.feature @ image.feature.t() / model.contrastive_temperature + model.logit_bias
    torch.testing.assert_close(logits, expected.logits_per_text, atol=1e-5, rtol=1e-5)
    slow = model.encode_image(images, slow=True), model.encode_text(ids, slow=True)
    torch.testing.assert_close(slow[0].feature, image.feature, atol=1e-6, rtol=0)
    torch.testing.assert_close(slow[1].feature, text.feature, atol=1e-6, rtol=0)


def test_the_norms_are_theirs():
    """Their epsilon is too small to be seen in features."""
    ours, theirs = (
        sorted(module.eps for module in model.modules() if isinstance(module, nn.LayerNorm))
        for model in (Siglip(SMALL), transformers_model(SMALL))
    )
    assert ours == theirs


@SIZES
def test_weights_go_there_and_back_bit_by_bit(size):
    weights, model = transformers_model(size).state_dict(), SiglipRetrieval(size, queue_size=8)
    load_clip_weights(model, weights, "SiglipModel")
    back = to_transformers(dense_weights(model.state_dict(), "ours"))
    assert back.keys() == weights.keys() and all(torch.equal(back[name], weights[name]) for name in weights)


@SIZES
@pytest.mark.parametrize("temperature", [0.0, 3.0])
@torch.no_grad()
def test_pruned_it_is_what_the_library_makes_of_transformers_model(size, temperature):
    """The library prunes their layers, and pools by their attention."""
    other, setting, number = transformers_model(size), PruneSetting(temperature), 5
    model = Siglip(size, partial(pruner, number, size.vision_width), (number, size.vision_width, 1.0)).eval()
    load_clip_weights(model, other.state_dict(), "SiglipModel")
    images, ids = inputs(size)
    batch = {"pixel_values": images, "input_ids": ids}
    handle = madtp.prune(other, batch, rule=INSTANCE, num_learnable=number, init_std=1.0, setting=setting)
    model.space_dict.copy_(handle.learnable_tokens)
    blocks = [*model.visual.transformer.resblocks, *model.transformer.resblocks]
    for block, theirs in zip(blocks, handle.pruners, strict=True):
        block.pruner.load_state_dict(theirs.state_dict())
    expected, cost = other(**batch), handle.gflops(batch)
    guidance = Guidance(setting, packed=True)
    image, text = model.encode_image(images, guidance), model.encode_text(ids, guidance)
    for encoded, name in ((image, "vision"), (text, "language")):
        left = [tokens.tolist() for tokens in encoded.record.leaving]
        assert left == [tokens.tolist() for tokens in handle.records[name].leaving] and len(set(left[-1])) > 1
        assert max(left[-1]) < int(encoded.record.entering[0][0])
    theirs = expected.vision_model_output.pooler_output, expected.text_model_output.pooler_output
    torch.testing.assert_close(image.feature, theirs[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text.feature, theirs[1], atol=1e-5, rtol=1e-5)
    ours = (model.visual.flops(image) + model.text_flops(text)).double() / GIGA
    assert ours.tolist() == pytest.approx(cost.tolist(), rel=1e-12)


def pruner(number: int, token_dim: int, dim: int, num_prefix_tokens: int = 1) -> TokenPruner:
    return TokenPruner(dim, number, token_dim, replace(INSTANCE, num_prefix_tokens=num_prefix_tokens))


@pytest.mark.parametrize("setting", [OFF, PruneSetting(0.0), PruneSetting(20.0), PruneSetting(3.0, 1)])
@torch.no_grad()
def test_packed_alone_and_padded_agree(setting):
    model = tiny.siglip(INSTANCE)
    images, ids = inputs(tiny.SIGLIP)
    for encode, given in ((model.encode_image, images), (model.encode_text, ids)):
        padded, packed = encode(given, guidance=Guidance(setting)), encode(given, guidance=Guidance(setting, packed=True))
        torch.testing.assert_close(packed.feature, padded.feature, atol=1e-5, rtol=1e-5)
        assert [n.tolist() for n in packed.record.leaving] == [n.tolist() for n in padded.record.leaving]
        for i in range(4):
            alone = encode(given[i : i + 1], guidance=Guidance(setting, packed=True))
            torch.testing.assert_close(alone.feature[0], packed.feature[i], atol=1e-5, rtol=1e-5)


def test_another_activation_and_other_heads_are_adopted_by_the_pooling_as_well():
    model, other = tiny.siglip(), tiny.siglip(size=replace(tiny.SIGLIP, activation="gelu", vision_heads=4))
    load_clip_weights(model, other.state_dict(), "ours")
    images = inputs(tiny.SIGLIP)[0]
    assert torch.equal(model.encode_image(images).feature, other.encode_image(images).feature)
    plain = tiny.siglip(size=replace(tiny.SIGLIP, activation="quick_gelu"))
    assert {type(block.mlp.gelu) for block in (*plain.branches["vision"], plain.visual.pool)} == {QuickGelu}


def test_in_mixed_precision_the_residual_stream_stays_exact():
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny.siglip().visual.embed(torch.randn(2, 3, tiny.IMAGE, tiny.IMAGE)).dtype == torch.float32
