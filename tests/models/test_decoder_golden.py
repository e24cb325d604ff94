"""The whole BLIP for captioning and for VQA, `variant: released`, against the authors' published code."""

import pytest
import torch

from madtp.blocks import Guidance
from madtp.pruning import TokenPruner
from madtp.rule import OFF, PruneSetting, PruningRule
from models.bert import BertSize, CrossAttention, TextEncoder
from models.blip_caption import BlipCaption
from models.blip_vqa import BlipVqa, weighted_loss
from models.vit import VisionTransformer
from models.weights.blip import load_decoder_weights
from tests import golden

RELEASED = PruningRule(variant="released", keep="max")
SMOOTHING = 0.1


def parts_of(config: dict, learnable: torch.Tensor):
    """The image encoder, the sizes of the text encoder and decoder, and what makes their pruners."""

    def pruner(dim: int, mask_follows: bool = False) -> TokenPruner:
        return TokenPruner(dim, *learnable.shape, RELEASED, mask_follows=mask_follows)

    vision = VisionTransformer(config["image_size"], config["patch_size"], **config["vit"], make_pruner=pruner)
    bert = {k: config["med_config"][k] for k in BertSize.__dataclass_fields__ if k in config["med_config"]}
    return vision, BertSize(**bert, dropout=0.0), pruner


def setting(temperature: float) -> PruneSetting:
    return PruneSetting(float(temperature)) if temperature > 0 else OFF


def caption_of(info, t, path) -> BlipCaption:
    weights = golden.published_weights(t)
    vision, size, _ = parts_of(info["config"], weights["space_dict"])
    prompt = t["input_ids"][0, : info["prompt_length"]].tolist()
    end = info["vocab"].index("[SEP]")
    model = BlipCaption(vision, size, prompt, end, 0, SMOOTHING, (*weights["space_dict"].shape, 1.0)).eval()
    load_decoder_weights(model, weights, path.name)
    return model


@pytest.mark.parametrize("path", golden.cases("caption*"))
@torch.no_grad()
def test_caption(path):
    info, t = golden.load(path)
    model = caption_of(info, t, path)
    for temperature in info["config"]["temperatures"]:
        name = f"T{temperature}"
        output = model(t["image"], t["input_ids"], t["attention_mask"], Guidance(setting(temperature)))
        golden.assert_close(output.logits, t[f"{name}.logits"])
        torch.testing.assert_close(output.losses["task"], t[f"{name}.loss_lm"], rtol=1e-5, atol=1e-4)
        assert [int(n[0]) for n in output.vision.leaving] == t[f"{name}.vit_tokens_per_layer"].tolist()


def vqa_of(info, t, path) -> BlipVqa:
    weights = golden.published_weights(t)
    vision, size, pruner = parts_of(info["config"], weights["space_dict"])
    text = TextEncoder(size, lambda i: CrossAttention(size, vision.embed_dim), lambda dim: pruner(dim, mask_follows=True))
    start, end = int(t["answer_input_ids"][0, 0]), info["vocab"].index("[SEP]")
    learnable = (*weights["space_dict"].shape, 1.0)
    model = BlipVqa(vision, text, size, start, end, 0, SMOOTHING, learnable, reads_padding=True).eval()
    load_decoder_weights(model, weights, path.name)
    return model


@pytest.mark.parametrize("path", golden.cases("vqa*"))
@torch.no_grad()
def test_vqa(path):
    info, t = golden.load(path)
    model = vqa_of(info, t, path)
    question = t["image"], t["question_input_ids"], t["question_attention_mask"]
    for temperature in info["config"]["temperatures"]:
        name, here = f"T{temperature}", setting(temperature)
        output = model(*question, t["answer_input_ids"], t["answer_attention_mask"], t["n"].long(), Guidance(here, align=True))
        torch.testing.assert_close(output.answer_losses, t[f"{name}.loss_per_answer"], rtol=1e-5, atol=1e-4)
        task = weighted_loss(output.answer_losses, t["weights"], len(t["image"]))
        torch.testing.assert_close(task, t[f"{name}.loss_vqa"], rtol=1e-5, atol=1e-4)
        golden.assert_close(output.question.language.features, t[f"{name}.sd_txt_ft"])
        if temperature > 0:  # at 0 the published code repeats the task's loss in its place
            torch.testing.assert_close(output.similarity, t[f"{name}.loss_fdt"], rtol=1e-5, atol=1e-4)
        best, losses, _ = model.rank(output.question, t["cand_input_ids"], t["cand_attention_mask"], info["config"]["k_test"])
        assert best[:, 0].tolist() == t[f"{name}.rank.max_ids"].tolist()
        expected = (-t[f"{name}.rank.log_probs_sum"]).sort(dim=1).values
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-4)
