"""The stages of the Shapes models: what the image encoder is shown, and what a stage starts from and leaves."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from configs.schema import Config
from data.shapes.world import random_scene
from data.text import Tokenizer
from models.weights.reading import read_checkpoint
from tasks.registry import TASKS, build_model, load_any_config
from tools.pretrain_shapes import PRETRAINED, config_of, publish
from tools.stages.caption import train_captions
from tools.stages.common import Plan, draw_shown, encode_shown, patch_attributes, shown_patches, start_from_nlvr
from tools.stages.retrieval import encode_shown_images, train_pairs
from tools.stages.vqa import train_answers
from transform.images import eval_transform

TRAIN = {"caption": train_captions, "vqa": train_answers, "retrieval": train_pairs, "retrieval_clip": train_pairs}


def untrained(task: str) -> tuple[nn.Module, Config, Tokenizer]:
    config = load_any_config(config_of(task), {"p": 0.0, "tokenizer": str(PRETRAINED / "vocab.txt")})
    model, tokenizer = build_model(config)
    return model, config, tokenizer


def online(model: nn.Module) -> dict[str, nn.Parameter]:
    """All but the momentum encoders' weights."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_things_are_always_shown_and_ground_now_and_then() -> None:
    rng = np.random.default_rng(0)
    attributes = torch.stack([patch_attributes(random_scene(rng)) for _ in range(20)])
    shown = shown_patches(rng, attributes, thin=1.5)
    things = attributes[..., 0] > 0
    assert shown[:, 0].all() and shown[:, 1:][things].all()
    shares = (shown[:, 1:] & ~things).sum(dim=1) / (~things).sum(dim=1)
    assert shares.min() < 0.2 and shares.max() > 0.6


def test_an_encoder_that_is_shown_everything_is_the_encoder_itself() -> None:
    encoder, rng = untrained("caption")[0].visual_encoder, np.random.default_rng(1)
    images = draw_shown(rng, [random_scene(rng) for _ in range(2)], eval_transform(96))["images"]
    tokens, layout, _ = encode_shown(encoder, images, torch.ones(2, 145, dtype=torch.bool))
    torch.testing.assert_close(layout.pad(tokens), encoder(images)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("task", ["retrieval", "retrieval_clip"])
def test_pictures_of_which_everything_is_shown_have_their_own_features(task: str) -> None:
    (model, *_), rng = untrained(task), np.random.default_rng(1)
    batch = draw_shown(rng, [random_scene(rng) for _ in range(2)], eval_transform(96))
    batch["shown"] = torch.ones_like(batch["shown"])
    shown, whole = encode_shown_images(model, batch), model.encode_image(batch["images"])
    torch.testing.assert_close(shown.feature, whole.feature, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(shown.layout.pad(shown.tokens), whole.tokens, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("task", "text"), [("caption", "text_decoder.bert"), ("vqa", "text_encoder"), ("retrieval", "text_encoder")]
)
def test_the_encoders_come_from_the_model_for_nlvr2(task: str, text: str) -> None:
    model, *_ = untrained(task)
    weights = read_checkpoint(PRETRAINED / "nlvr.safetensors")["model"]
    start_from_nlvr(model, weights, text)
    for mine, encoder in (("visual_encoder", "visual_encoder"), (text, "text_encoder")):
        for name, parameter in model.get_submodule(mine).named_parameters():
            theirs = f"{encoder}.{name}".replace("crossattention.self.", "crossattention.self0.")
            theirs = theirs.replace("crossattention.output.dense.", "crossattention.output.dense0.")
            assert torch.equal(parameter, weights[theirs].float())


@pytest.mark.parametrize("task", TRAIN)
def test_a_stage_trains_every_weight_and_what_is_published_loads(task: str, tmp_path: Path) -> None:
    (model, config, tokenizer), (other, *_) = untrained(task), untrained(task)
    before = {name: parameter.clone() for name, parameter in online(model).items()}
    TRAIN[task](model, config, tokenizer, Plan(steps=2, batch=2, rate=1e-3, warmup=1), 0, tmp_path / "log")
    still = [name for name, parameter in online(model).items() if torch.equal(parameter, before[name])]
    assert all(name.endswith("key.bias") for name in still), still  # attention does not depend on it
    publish(model, tmp_path / "model.safetensors")
    assert (tmp_path / "model.safetensors").stat().st_size < 6 * 2**20
    TASKS[task].load(other, read_checkpoint(tmp_path / "model.safetensors")["model"], "model")
    for name, parameter in online(other).items():
        torch.testing.assert_close(parameter, model.get_parameter(name), rtol=1e-3, atol=1e-4)
