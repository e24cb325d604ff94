"""The whole BLIP for retrieval, `variant: released`, against the authors' published code."""

import pytest
import torch

from madtp.blocks import Guidance
from madtp.pruning import OFF, PruneSetting, PruningRule, TokenPruner
from models.bert import BertSize, CrossAttention, TextEncoder
from models.blip_retrieval import BlipRetrieval
from models.vit import VisionTransformer
from models.weights.blip import load_retrieval_weights
from tests import golden

RELEASED = PruningRule(variant="released", keep="max")


def model_of(info: dict, weights: dict[str, torch.Tensor]) -> BlipRetrieval:
    config, learnable = info["config"], weights["space_dict"]

    def pruner(dim: int, mask_follows: bool = False) -> TokenPruner:
        return TokenPruner(dim, *learnable.shape, RELEASED, mask_follows=mask_follows)

    vision = VisionTransformer(config["image_size"], config["patch_size"], **config["vit"], make_pruner=pruner)
    bert = {k: config["med_config"][k] for k in BertSize.__dataclass_fields__ if k in config["med_config"]}
    size = BertSize(**bert, dropout=0.0)
    text = TextEncoder(size, lambda i: CrossAttention(size, vision.embed_dim), lambda dim: pruner(dim, mask_follows=True))
    model = BlipRetrieval(
        vision,
        text,
        info["vocab"].index("[ENC]"),
        config["embed_dim"],
        config["queue_size"],
        config["momentum"],
        learnable_tokens=(*learnable.shape, 1.0),
    )
    load_retrieval_weights(model, weights, "the golden file")
    model.idx_queue.copy_(weights["idx_queue"])  # the ids of this very data, which loading cannot know
    return model.eval()


class Replay:
    """`torch.multinomial` that gives what the authors' run drew, and keeps the weights that it is asked to draw by."""

    def __init__(self, drawn: list[torch.Tensor]):
        self.drawn, self.weights = iter(drawn), []

    def __call__(self, weights: torch.Tensor, number: int) -> torch.Tensor:
        self.weights.append(weights)
        return next(self.drawn).unsqueeze(1)


@pytest.mark.parametrize("path", golden.cases("retrieval*"))
@torch.no_grad()
def test_retrieval(path, monkeypatch):
    info, t = golden.load(path)
    for temperature in info["config"]["temperatures"]:
        model, name = model_of(info, golden.published_weights(t)), f"T{temperature}"
        draw = Replay([t[f"{name}.neg_image"], t[f"{name}.neg_text"]])
        monkeypatch.setattr(torch, "multinomial", draw)
        setting = PruneSetting(float(temperature)) if temperature > 0 else OFF
        batch = t["images"], t["input_ids"], t["attention_mask"]
        model.follow()
        passes = model.passes(*batch, t["idx"], Guidance(setting, align=True))
        losses = model.losses(passes, t["idx"], info["config"]["alpha"])
        model.enqueue(passes, t["idx"])
        golden.assert_close(passes.logits, t[f"{name}.itm_logits"])
        golden.assert_close(draw.weights[0], t[f"{name}.weights_t2i"])
        golden.assert_close(draw.weights[1], t[f"{name}.weights_i2t"])
        golden.assert_close(passes.image.record.features, t[f"{name}.sd_img_ft"])
        golden.assert_close(passes.text.record.features, t[f"{name}.sd_txt_ft"])
        names = {"contrastive": "loss_ita", "matching": "loss_itm"}
        if temperature > 0:  # at 0 the published code repeats the contrastive loss in their place
            names |= {"similarity": "loss_fdt", "similarity_momentum": "loss_fdt_m"}
        for ours, theirs in names.items():
            torch.testing.assert_close(losses[ours], t[f"{name}.{theirs}"], rtol=1e-5, atol=1e-4)
        state = model.state_dict()
        for key, tensor in t.items():
            if key.startswith(f"{name}.after."):
                golden.assert_close(state[key.removeprefix(f"{name}.after.")], tensor)
        if temperature > 0:
            for part, encoded in (("image", passes.image), ("image_m", passes.image_momentum)):
                leaving = [int(n[0]) for n in encoded.record.leaving]
                assert leaving == t[f"{name}.{part}.tokens_per_layer"].tolist()
