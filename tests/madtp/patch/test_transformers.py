"""Pruning the encoders of transformers: dense to the bit, packed, padded and alone alike, counted as fvcore counts."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import transformers
from fvcore.nn import FlopCountAnalysis
from torch import Tensor, nn

import madtp

WIDTH = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
VISION = {**WIDTH, "image_size": 32, "patch_size": 8}
NARROW = {**WIDTH, "hidden_size": 32, "num_attention_heads": 2}
END = 49
TEXT = {**NARROW, "vocab_size": 50, "max_position_embeddings": 16, "eos_token_id": END, "bos_token_id": 48, "pad_token_id": 1}
P = 0.3


def clip(**text) -> transformers.CLIPModel:
    config = transformers.CLIPConfig(text_config={**TEXT, **text}, vision_config=VISION, projection_dim=24)
    return transformers.CLIPModel._from_config(config, attn_implementation="eager")


def siglip() -> transformers.SiglipModel:
    text = {**TEXT, "projection_size": 48}
    config = transformers.SiglipConfig(text_config=text, vision_config=VISION)
    return transformers.SiglipModel._from_config(config, attn_implementation="eager")


def siglip2() -> transformers.Siglip2Model:
    vision = {**WIDTH, "patch_size": 8, "num_patches": 16}
    config = transformers.Siglip2Config(text_config={**TEXT, "projection_size": 48}, vision_config=vision)
    return transformers.Siglip2Model._from_config(config, attn_implementation="eager")


def dinov2(**settings) -> transformers.Dinov2Model:
    config = transformers.Dinov2Config(**{**VISION, "mlp_ratio": 2, "layerscale_value": 0.5, **settings})
    return transformers.Dinov2Model._from_config(config, attn_implementation="eager")


def vision_alone() -> transformers.CLIPVisionModelWithProjection:
    config = transformers.CLIPVisionConfig(**VISION, projection_dim=24)
    return transformers.CLIPVisionModelWithProjection._from_config(config, attn_implementation="eager")


MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": clip,
    "clip with the older end": lambda: clip(eos_token_id=2),
    "siglip": siglip,
    "siglip2": siglip2,
    "dinov2": dinov2,
    "dinov2 with swiglu": lambda: dinov2(use_swiglu_ffn=True),
    "clip's image encoder": vision_alone,
}
READS_TEXT = ("clip", "clip with the older end", "siglip", "siglip2")


@pytest.fixture(params=MODELS)
def kind(request) -> str:
    return request.param


def lively(build: Callable[[], nn.Module]) -> nn.Module:
    """Builds a model with weights so large that attention differs between tokens."""
    torch.manual_seed(0)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and "pos" not in name:
                parameter.normal_(std=0.15)
    return model


def model_of(kind: str) -> nn.Module:
    return lively(MODELS[kind])


def pictures(number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, 3, 32, 32, generator=generator) * torch.rand(number, 1, 1, 1, generator=generator) * 3


def texts(number: int, length: int = 12) -> Tensor:
    """Texts of several lengths: they end with END and are padded behind it."""
    ids = torch.randint(3, 40, (number, length), generator=torch.Generator().manual_seed(2))
    for row, end in enumerate(range(length - 1, length - 1 - number, -1)):
        ids[row, max(3, end)], ids[row, max(3, end) + 1 :] = END, 1
    return ids


def batch_of(kind: str, number: int = 6) -> dict[str, Tensor]:
    batch = {"pixel_values": pictures(number)}
    if kind == "siglip2":
        patches = batch["pixel_values"].unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        mask = torch.ones(number, 16, dtype=torch.long)
        mask[::2, 12:] = 0  # pictures of three rows
        shapes = torch.tensor([[3, 4], [4, 4]]).repeat(number // 2, 1)
        batch = {"pixel_values": patches * mask.unsqueeze(-1), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    return batch | ({"input_ids": texts(number)} if kind in READS_TEXT else {})


def features(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Every number that a caller of the model reads, (B, E)."""
    out = model(**batch)
    if "input_ids" in batch:
        return torch.cat([out.image_embeds, out.text_embeds], dim=1)
    return out["image_embeds"] if "image_embeds" in out else out.pooler_output


@torch.no_grad()
def test_off_it_is_the_original_to_the_bit_and_restored_it_is_the_same_object(kind):
    model, batch = model_of(kind), batch_of(kind)
    expected, names = features(model, batch), list(model.state_dict())
    pruning = madtp.prune(model, batch, p=P)
    assert not torch.equal(features(model, batch), expected)
    assert [name for name in model.state_dict() if not name.startswith("madtp.")] == names
    pruning.setting = madtp.OFF
    assert torch.equal(features(model, batch), expected)
    assert madtp.restore(model) is model and list(model.state_dict()) == names
    assert torch.equal(features(model, batch), expected)
    assert not any("forward" in vars(module) or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@torch.no_grad()
def test_a_pass_that_prunes_nothing_is_the_original_pass(kind, packed):
    model, batch = model_of(kind), batch_of(kind)
    expected = features(model, batch)
    pruning = madtp.prune(model, batch, p=P, packed=packed)
    for block in pruning.blocks:
        block.pruner.rule = replace(block.pruner.rule, share=1.0)
    torch.testing.assert_close(features(model, batch), expected, atol=1e-5, rtol=1e-5)
    assert set(pruning.records) == ({"vision", "language"} if kind in READS_TEXT else {"vision"})


@torch.no_grad()
def test_packed_padded_and_alone_agree(kind, rule):
    model, batch = model_of(kind), batch_of(kind)
    pruning = madtp.prune(model, batch, p=P, rule=rule)
    packed, records = features(model, batch), pruning.records
    assert all(record.packed for record in records.values())
    assert any(len(record.leaving[-1].unique()) > 1 for record in records.values())
    pruning.packed = False
    torch.testing.assert_close(features(model, batch), packed, atol=1e-5, rtol=1e-5)
    for name, record in pruning.records.items():
        assert all(torch.equal(a, b) for a, b in zip(record.leaving, records[name].leaving, strict=True))
    pruning.packed = True
    each = [features(model, {name: values[i : i + 1] for name, values in batch.items()}) for i in range(len(packed))]
    torch.testing.assert_close(torch.cat(each), packed, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_p_of_the_gflops_go_and_the_dense_count_is_fvcores(kind, rule):
    model, batch = model_of(kind), batch_of(kind)
    one = {name: values[1:2] for name, values in batch.items()}  # a picture without padding
    if "input_ids" in one:
        one["input_ids"] = torch.tensor([[5, 9, 7, 21, 33, END]])
    counted = counted_by_fvcore(kind, model, one)
    pruning = madtp.prune(model, batch, p=P, rule=rule)
    assert float(pruning.gflops(one, madtp.OFF)) == pytest.approx(counted, rel=1e-9)
    assert float(pruning.gflops(batch).mean()) == pytest.approx((1 - P) * pruning.dense_gflops, rel=0.01)


class Call(nn.Module):
    """A model whose arguments have names, for the tracer that has none."""

    def __init__(self, model: nn.Module, names: list[str]):
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        return features(self.model, dict(zip(self.names, values, strict=True)))


def counted_by_fvcore(kind: str, model: nn.Module, batch: dict[str, Tensor]) -> float:
    counter = FlopCountAnalysis(Call(model, list(batch)), tuple(batch.values()))
    total = counter.unsupported_ops_warnings(False).tracer_warnings("none").total() + UNKNOWN.get(kind, 0)
    if kind == "siglip2":  # position embeddings that are resized, which some versions count
        embeddings, patches = (counter.by_module()[f"model.vision_model.embeddings{name}"] for name in ("", ".patch_embedding"))
        total -= embeddings - patches
    return total / 1e9


# Not counted by fvcore: a convolution with padding="valid"; the product of an attention with a mask.
UNKNOWN = {"siglip": 16 * 48 * 3 * 64, "siglip2": 16 * 48}


@torch.no_grad()
def test_images_alone_prune_the_image_encoder_alone():
    model, batch = model_of("clip"), batch_of("clip")
    words = model(**batch).text_embeds
    pruning = madtp.prune(model, batch["pixel_values"], p=P)
    assert list(pruning.records) == ["vision"]
    assert torch.equal(model(**batch).text_embeds, words)
    assert madtp.restore(model) is model and list(madtp.prune(model, batch, towers=["language"], p=P).records) == ["language"]


@torch.no_grad()
def test_learnable_tokens_are_made_of_the_calibration_data():
    batch = batch_of("clip")
    made, rule = {}, madtp.PruningRule(keep="instance")
    for init in ("random", "kmeans", "principal"):
        model = model_of("clip")
        made[init] = madtp.prune(model, batch, p=P, rule=rule, init=init, num_learnable=8, init_std=1.0).learnable_tokens
        assert made[init].shape == (8, 48) and float(made[init].square().mean()) == pytest.approx(1, rel=0.3)
    assert len({tuple(tokens.flatten().tolist()) for tokens in made.values()}) == 3
    with pytest.raises(ValueError, match="init must be one of random, kmeans, principal"):
        madtp.prune(model_of("clip"), batch, init="zeros")


@torch.no_grad()
def test_a_saved_model_prunes_again_without_a_search():
    model, batch = model_of("clip"), batch_of("clip")
    pruning = madtp.prune(model, batch, p=P, seed=3)
    again = model_of("clip")
    madtp.prune(again, setting=pruning.setting)
    again.load_state_dict(model.state_dict())
    assert torch.equal(features(again, batch), features(model, batch))


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_the_layers_of_both_encoders(packed):
    model, batch = model_of("clip").train(), batch_of("clip")
    madtp.prune(model, batch, p=P, rule=madtp.PruningRule(keep="instance", gradient="merge"), packed=packed)
    model(**batch, return_loss=True).loss.backward()
    for layer in (model.vision_model.encoder.layers[0], model.text_model.encoder.layers[0]):
        assert layer.self_attn.q_proj.weight.grad.abs().sum() > 0
    assert model.madtp.learnable_tokens.grad.abs().sum() > 0


def test_what_is_not_supported_is_refused_by_name():
    model, batch = model_of("clip"), batch_of("clip")
    with pytest.raises(TypeError, match="ViTModel cannot be pruned"):
        madtp.prune(transformers.ViTModel(transformers.ViTConfig(**VISION)), batch)
    model.gradient_checkpointing_enable()
    with pytest.raises(TypeError, match="recomputes activations"):
        madtp.prune(model, batch)
    model.gradient_checkpointing_disable()
    with pytest.raises(TypeError, match="none of the encoders language"):
        madtp.prune(model_of("clip's image encoder"), pictures(2), towers=["language"])
    madtp.prune(model, batch, p=P)
    hidden = torch.ones_like(batch["input_ids"])
    hidden[0, 1] = 0
    with torch.no_grad(), pytest.raises(ValueError, match="no attention mask that hides tokens"):
        model(**batch, attention_mask=hidden)
    with torch.no_grad(), pytest.raises(ValueError, match="another number of images than of texts"):
        model.madtp.gflops({**batch, "pixel_values": pictures(2)})
