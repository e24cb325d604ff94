"""Whole towers and the whole BLIP-NLVR, `variant: released`, against the authors' published code."""

import pytest
import torch

from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from models.bert import FIRST_MERGE_LAYER, BertSize, PairedCrossAttention, TextEncoder
from models.blip_nlvr import BlipNlvr
from models.vit import VisionTransformer
from tests import golden, tiny

RELEASED = PruningRule(variant="released", keep="max")


def pruner_for(learnable, rule=RELEASED):
    return lambda dim: TokenPruner(dim, learnable.shape[0], learnable.shape[1], rule)


def setting(temperature):
    return PruneSetting(float(temperature)) if temperature > 0 else OFF


def vit_of(t, config, rule):
    size, make_pruner = config.get("vit", config), pruner_for(t["space_dict"], rule)
    sizes = size["embed_dim"], size["depth"], size["num_heads"]
    vit = VisionTransformer(t["image"].shape[-1], config.get("patch_size", 16), *sizes, make_pruner=make_pruner).eval()
    vit.load_state_dict(golden.published_weights(t))
    return vit


@pytest.mark.parametrize("path", golden.cases("vit"))
@torch.no_grad()
def test_vit(path):
    info, t = golden.load(path)
    config, learnable = info["config"], t["space_dict"]
    vit = vit_of(t, config, RELEASED)
    for temperature in config["temperatures"]:
        name = f"T{temperature}"
        out, _, record = vit(t["image"], Guidance(setting(temperature), align=True, learnable_tokens=learnable))
        expected = t.get(f"{name}.order_cuda.out", t[f"{name}.out"])
        assert [int(n[0]) for n in record.leaving] == t[f"{name}.tokens_per_layer"].tolist()
        golden.assert_close(out, expected)
        golden.assert_close(record.features, t[f"{name}.sd_img_ft_all"])


@pytest.mark.parametrize("path", golden.cases("vit"))
@pytest.mark.parametrize("name", ["space_dict", "blocks.0.attn.qkv.weight", "blocks.1.norm1.weight"])
def test_vit_gradients_are_those_of_the_outputs_while_the_decisions_stay(path, name):
    """Nothing of the authors' scores is detached: the merge's weights send gradients to the learnable tokens and the attention."""
    info, t = golden.load(path)
    config, learnable = info["config"], torch.nn.Parameter(t["space_dict"].double())
    vit = vit_of(t, config, PruningRule(variant="released", keep="max", gradient="merge")).double()
    parameter = learnable if name == "space_dict" else dict(vit.named_parameters())[name]
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(torch.randn(parameter.shape, generator=generator).double().flatten(), dim=0)
    direction = direction.view_as(parameter)
    for temperature in (value for value in config["temperatures"] if value > 0):
        guidance = Guidance(setting(temperature), learnable_tokens=learnable)

        def loss(guidance=guidance) -> torch.Tensor:
            out, _, _ = vit(t["image"].double(), guidance)
            return (out * torch.randn(out.shape, generator=torch.Generator().manual_seed(1))).sum()

        (gradient,) = torch.autograd.grad(loss(), parameter)
        expected = tiny.slope(loss, parameter, direction)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=5e-3, abs=2e-3)


def nlvr_of(t, config):
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
    return model


@pytest.mark.parametrize("path", golden.cases("nlvr*"))
@torch.no_grad()
def test_nlvr(path):
    info, t = golden.load(path)
    config = info["config"]
    model = nlvr_of(t, config)
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
