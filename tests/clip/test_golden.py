"""CLIP's blocks and towers, `variant: released`, against the authors' published code."""

import re

import pytest
import torch

from clip.model import Clip, ClipSize, ResidualAttentionBlock, VisionTower
from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from models.clip_retrieval import ClipRetrieval
from models.momentum import PairPasses
from models.weights.clip import PRUNER, load_clip_weights
from models.weights.reading import QUEUES
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


def image_tower(config, t):
    size = ClipSize(
        config["input_resolution"], config["patch_size"], config["width"], config["layers"], config["heads"],
        embed_dim=config["output_dim"],
    )  # fmt: skip
    tower = VisionTower(size, pruner_for(t["space_dict"], min_keep=1)).eval()
    tower.load_state_dict(weights_of(t))
    return tower


@pytest.mark.parametrize("path", golden.cases("clip_image*"))
@torch.no_grad()
def test_image(path):
    info, t = golden.load(path)
    config, learnable = info["config"], t["space_dict"]
    tower = image_tower(config, t)
    for temperature in config["temperatures"]:
        name = f"T{temperature}"
        encoded = tower(t["image"], Guidance(setting(temperature), align=True, learnable_tokens=learnable))
        assert [int(n[0]) for n in encoded.record.leaving] == t[f"{name}.tokens_per_layer"].tolist()
        golden.assert_close(encoded.feature, t.get(f"{name}.order_cuda.out", t[f"{name}.out"]))
        golden.assert_close(encoded.record.features, t[f"{name}.sd_img_ft"])


def min_keep_of(text):
    """A text block of the authors' prunes only while more tokens stay than reach the last end of text of the batch."""
    return int(text.argmax(dim=1).max()) + 2


@pytest.mark.parametrize("path", golden.cases("clip_text*"))
@torch.no_grad()
def test_text(path):
    """At T > 0 it is their order of tokens that decides which one is read as the end of text."""
    info, t = golden.load(path)
    config, learnable, text = info["config"], t["w.space_dict"], t["text"].long()
    size = ClipSize(
        32, 8, 8, 1, 1, config["transformer_width"], config["transformer_layers"], config["transformer_heads"],
        config["context_length"], config["vocab_size"], config["embed_dim"],
    )  # fmt: skip
    pruner = pruner_for(learnable, min_keep_of(text))
    model = Clip(size, pruner, (*learnable.shape, 1.0), text_order="class_first").eval()
    loaded = model.load_state_dict(weights_of(t), strict=False)
    assert not loaded.unexpected_keys and all(name.startswith(("visual.", "logit_scale")) for name in loaded.missing_keys)
    for temperature in config["temperatures"]:
        name = f"T{temperature}.order_cuda" if temperature > 0 else f"T{temperature}"
        encoded = model.encode_text(text, Guidance(setting(temperature), align=True))
        golden.assert_close(encoded.feature, t[f"{name}.out"])
        golden.assert_close(encoded.record.features, t[f"{name}.sd_txt_ft"])
        assert [int(n[0]) for n in encoded.record.leaving] == t[f"{name}.tokens_per_layer"].tolist()


def released_pair_model(config, t):
    """A model that does what theirs does: momentum texts pass the online transformer, and texts have the class token first."""
    size = ClipSize(
        config["image_resolution"], config["patch_size"], config["vision_width"], config["vision_layers"], config["vision_heads"],
        config["transformer_width"], config["transformer_layers"], config["transformer_heads"], config["context_length"],
        config["vocab_size"], config["embed_dim"],
    )  # fmt: skip
    learnable = t["w.space_dict"]
    model = ClipRetrieval(
        size, config["queue_size"], config["momentum"], pruner_for(learnable, min_keep=1), (*learnable.shape, 1.0)
    ).eval()
    assert not load_clip_weights(model, golden.published_weights(t), "the golden file")
    model.text_order = "class_first"
    for block in (*model.transformer.resblocks, *model.transformer_m.resblocks):
        block.attn.causal, block.pruner.min_keep = "class_first", min_keep_of(t["text"])
    return model


@pytest.mark.parametrize("path", golden.cases("clip_loss*"))
@torch.no_grad()
def test_loss(path):
    """With two of the published code's slips put in by hand: what momentum texts pass through, and what the queues take."""
    info, t = golden.load(path)
    config = info["config"]
    for temperature in config["temperatures"]:
        model, name = released_pair_model(config, t), f"T{temperature}"
        here = f"{name}.order_cuda" if f"{name}.order_cuda.loss_ita" in t else name
        model.limit_contrastive_temperature()
        model.follow()
        after = {key.removeprefix(f"{name}.after."): tensor for key, tensor in t.items() if key.startswith(f"{name}.after.")}
        for key in set(after) - set(QUEUES):
            golden.assert_close(model.state_dict()[key], after[key])
        model.transformer_m, model.ln_final_m = model.transformer, model.ln_final
        passes = model.passes(t["image"], t["text"].long(), None, t["idx"], Guidance(setting(temperature), align=True))
        losses = model.losses(passes, t["idx"], config["alpha"])
        model.enqueue(PairPasses(passes.image, passes.text, passes.image, passes.text), t["idx"])
        torch.testing.assert_close(losses["contrastive"], t[f"{here}.loss_ita"], rtol=1e-5, atol=1e-4)
        if temperature > 0:  # at 0 the published code repeats the contrastive loss in their place
            torch.testing.assert_close(losses["similarity"], t[f"{here}.loss_fdt"], rtol=1e-5, atol=1e-4)
            torch.testing.assert_close(losses["similarity_momentum"], t[f"{here}.loss_fdt_m"], rtol=1e-5, atol=1e-4)
        for key in set(QUEUES) - ({"text_queue"} if here != name else set()):  # pruned texts are stored in another order
            golden.assert_close(getattr(model, key), after[key])
