"""Whole towers and the whole BLIP-NLVR, `variant: released`, against the authors' published code."""

import pytest
import torch

from madtp.blocks import Guidance
from madtp.pruning import OFF, PruneSetting, PruningRule, TokenPruner
from models.bert import FIRST_MERGE_LAYER, BertSize, PairedCrossAttention, TextEncoder
from models.blip_nlvr import BlipNlvr
from models.vit import VisionTransformer
from tests import golden

RELEASED = PruningRule(variant="released", keep="max")


def pruner_for(learnable):
    return lambda dim: TokenPruner(dim, learnable.shape[0], learnable.shape[1], RELEASED)


def setting(temperature):
    return PruneSetting(float(temperature)) if temperature > 0 else OFF


@pytest.mark.parametrize("path", golden.cases("vit"))
@torch.no_grad()
def test_vit(path):
    info, t = golden.load(path)
    config, learnable = info["config"], t["space_dict"]
    size = config.get("vit", config)
    vit = VisionTransformer(
        t["image"].shape[-1],
        config.get("patch_size", 16),
        size["embed_dim"],
        size["depth"],
        size["num_heads"],
        make_pruner=pruner_for(learnable),
    ).eval()
    vit.load_state_dict(golden.published_weights(t))
    for temperature in config["temperatures"]:
        name = f"T{temperature}"
        out, _, record = vit(t["image"], Guidance(setting(temperature), align=True, learnable_tokens=learnable))
        expected = t.get(f"{name}.order_cuda.out", t[f"{name}.out"])
        assert [int(n[0]) for n in record.leaving] == t[f"{name}.tokens_per_layer"].tolist()
        golden.assert_close(out, expected)
        golden.assert_close(record.features, t[f"{name}.sd_img_ft_all"])


@pytest.mark.parametrize("path", golden.cases("nlvr*"))
@torch.no_grad()
def test_nlvr(path):
    info, t = golden.load(path)
    config = info["config"]
    bert = {k: config["med_config"][k] for k in BertSize.__dataclass_fields__ if k in config["med_config"]}
    vit = {k: config["vit"][k] for k in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
    learnable = t["w.space_dict"]
    vision = VisionTransformer(config["image_size"], config["patch_size"], **vit, make_pruner=pruner_for(learnable))
    size = BertSize(**bert, dropout=0.0)
    text_encoder = TextEncoder(
        size, lambda i: PairedCrossAttention(size, vision.embed_dim, i >= FIRST_MERGE_LAYER), pruner_for(learnable)
    )
    model = BlipNlvr(vision, text_encoder, (*learnable.shape, 1.0)).eval()
    weights = golden.published_weights(t)
    weights.pop("text_encoder.embeddings.position_ids", None)
    model.load_state_dict(weights)
    images = torch.stack(t["images"].chunk(2), dim=1)
    for text in ("pad", "nopad"):
        for temperature in config["temperatures"]:
            name = f"{text}.T{temperature}"
            here = f"{name}.order_cuda" if f"{name}.order_cuda.logits" in t else name
            out = model(images, t[f"{text}.input_ids"], t[f"{text}.attention_mask"], Guidance(setting(temperature), align=True))
            golden.assert_close(out.logits, t[f"{here}.logits"])
            golden.assert_close(out.vision.features, t[f"{name}.sd_img_ft"])
            task = torch.nn.functional.cross_entropy(out.logits, t["targets"])
            torch.testing.assert_close(task, t[f"{name}.loss_ori"], rtol=1e-5, atol=1e-4) if here == name else None
            if temperature > 0:
                loss = t.get(f"{here}.loss_fdt", t[f"{name}.loss_fdt"])
                torch.testing.assert_close(out.similarity, loss, rtol=1e-5, atol=1e-4)
