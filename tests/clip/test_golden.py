"""CLIP's blocks and towers, `variant: released`, against the authors' published code."""

import re

import pytest
import torch

from clip.model import Clip, ClipSize, ResidualAttentionBlock, VisionTower
from madtp.blocks import Guidance
from madtp.pruning import OFF, PruneSetting, PruningRule, TokenPruner
from models.weights.clip import PRUNER
from tests import golden

RELEASED = PruningRule(variant="released", keep="max")


def pruner_for(learnable, min_keep=0):
    return lambda dim: TokenPruner(dim, *learnable.shape, RELEASED, "on", min_keep=min_keep)


def weights_of(tensors):
    return {name.replace(*PRUNER): tensor for name, tensor in golden.published_weights(tensors).items()}


def setting(temperature):
    return PruneSetting(float(temperature)) if temperature > 0 else OFF


@pytest.mark.parametrize("path", golden.cases("clip_block*"))
@torch.no_grad()
def test_block(path):
    info, t = golden.load(path)
    config, learnable = info["config"], t["space_dict"]
    causal = "class_first" if config["causal_mask"] else None
    pruner = pruner_for(learnable, config.get("max_keep", 1))(config["d_model"])
    block = ResidualAttentionBlock(config["d_model"], config["n_head"], causal, pruner).eval()
    block.load_state_dict(weights_of(t))
    x = t["x"].transpose(0, 1)
    for temperature in [float(name[1:-4]) for name in t if re.fullmatch(r"T[\d.]+\.out", name)]:
        out, _, _, features = block(x, None, Guidance(setting(temperature), align=True, learnable_tokens=learnable))
        name = f"T{temperature:g}"
        golden.assert_close(out.transpose(0, 1), t.get(f"{name}.order_cuda.out", t[f"{name}.out"]))
        golden.assert_close(features, t[f"{name}.sd_ft"])


@pytest.mark.parametrize("path", golden.cases("clip_image*"))
@torch.no_grad()
def test_image(path):
    info, t = golden.load(path)
    config, learnable = info["config"], t["space_dict"]
    size = ClipSize(
        config["input_resolution"], config["patch_size"], config["width"], config["layers"], config["heads"],
        embed_dim=config["output_dim"],
    )  # fmt: skip
    tower = VisionTower(size, pruner_for(learnable, min_keep=1)).eval()
    tower.load_state_dict(weights_of(t))
    for temperature in config["temperatures"]:
        name = f"T{temperature}"
        encoded = tower(t["image"], Guidance(setting(temperature), align=True, learnable_tokens=learnable))
        assert [int(n[0]) for n in encoded.record.leaving] == t[f"{name}.tokens_per_layer"].tolist()
        golden.assert_close(encoded.feature, t.get(f"{name}.order_cuda.out", t[f"{name}.out"]))
        golden.assert_close(encoded.record.features, t[f"{name}.sd_img_ft"])


@pytest.mark.parametrize("path", golden.cases("clip_text*"))
@torch.no_grad()
def test_text_unpruned(path):
    """Pruned, the published code reads another token than the end-of-text one."""
    info, t = golden.load(path)
    config, learnable = info["config"], t["w.space_dict"]
    size = ClipSize(
        32, 8, 8, 1, 1, config["transformer_width"], config["transformer_layers"], config["transformer_heads"],
        config["context_length"], config["vocab_size"], config["embed_dim"],
    )  # fmt: skip
    model = Clip(size, pruner_for(learnable), (*learnable.shape, 1.0), text_order="class_first").eval()
    loaded = model.load_state_dict(weights_of(t), strict=False)
    assert not loaded.unexpected_keys and all(name.startswith(("visual.", "logit_scale")) for name in loaded.missing_keys)
    encoded = model.encode_text(t["text"].long(), Guidance(align=True))
    golden.assert_close(encoded.feature, t["T0.out"])
    golden.assert_close(encoded.record.features, t["T0.sd_txt_ft"])
