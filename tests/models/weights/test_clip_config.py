"""Activation, heads and MLPs of CLIP's weights: read from the files beside them, kept in checkpoints, never guessed."""

import json
from dataclasses import replace
from pathlib import Path

import open_clip
import pytest
import torch
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from clip.model import ClipSize
from configs import folder
from configs.load import load_config
from configs.schema import ClipRetrievalConfig
from models.clip_retrieval import ClipRetrieval
from models.weights.clip import VOCABULARY, load_clip_weights
from models.weights.clip_config import read_beside
from models.weights.reading import read_checkpoint
from models.weights.safetensors import save_exported
from tests.tiny import ended_text, with_lively_weights
from transform.images import MEAN, STD
from utils import UserError

# What a user's config says: it cannot know the heads (3 and 4 in truth) nor the MLPs.
SIZE = ClipSize(32, 8, 24, 2, 2, 16, 2, 2, 12, 40, 20)
VISION_HEADS, TEXT_HEADS, VISION_MLP, TEXT_MLP = 3, 4, 120, 40
OPEN_CLIP = {
    "embed_dim": 20,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 24, "head_width": 8, "patch_size": 8, "mlp_ratio": 5.0},
    "text_cfg": {"context_length": 12, "vocab_size": 40, "width": 16, "heads": 4, "layers": 2, "mlp_ratio": 2.5},
}


def model_of(size: ClipSize = SIZE) -> ClipRetrieval:
    return ClipRetrieval(size, queue_size=8).eval()


def transformers_clip(activation: str) -> CLIPModel:
    shared = {"hidden_act": activation, "num_hidden_layers": 2}
    config = CLIPConfig(
        vision_config={
            "hidden_size": 24, "intermediate_size": VISION_MLP, "num_attention_heads": VISION_HEADS, "image_size": 32,
            "patch_size": 8, **shared,
        },
        text_config={
            "hidden_size": 16, "intermediate_size": TEXT_MLP, "num_attention_heads": TEXT_HEADS, "vocab_size": 40,
            "max_position_embeddings": 12, "eos_token_id": 39, "bos_token_id": 38, "pad_token_id": 0, **shared,
        },
        projection_dim=20,
    )  # fmt: skip
    return with_lively_weights(CLIPModel(config).eval())


def open_clips(quick: bool) -> nn.Module:
    torch.manual_seed(0)
    return with_lively_weights(open_clip.CLIP(**OPEN_CLIP, quick_gelu=quick).eval())


def write_open_clip(folder: Path, quick: bool = False, preprocessing: dict | None = None, **vision: object) -> None:
    content = {**OPEN_CLIP, "vision_cfg": {**OPEN_CLIP["vision_cfg"], **vision}}
    content |= {"quick_gelu": True} if quick else {}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": content, "preprocess_cfg": preprocessing or {}}))


def published(model: nn.Module) -> dict[str, Tensor]:
    """Returns the weights without momentum encoders and queues."""
    return {name: tensor for name, tensor in model.state_dict().items() if "_m" not in name.split(".")[0] and "queue" not in name}


def inputs() -> tuple[Tensor, Tensor]:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), ended_text([4, 12, 7], size=SIZE)[0]


def assert_encodes(model: ClipRetrieval, image: Tensor, text: Tensor) -> None:
    images, ids = inputs()
    for slow in (False, True):
        torch.testing.assert_close(model.encode_image(images, slow=slow).feature, image, atol=1e-5, rtol=0)
        torch.testing.assert_close(model.encode_text(ids, slow=slow).feature, text, atol=1e-5, rtol=0)


@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
@torch.no_grad()
def test_transformers_weights_are_read_as_their_config_says(tmp_path, activation):
    other, model = transformers_clip(activation), model_of()
    other.config.save_pretrained(tmp_path)
    load_clip_weights(model, other.state_dict(), str(tmp_path / "pytorch_model.bin"))
    images, ids = inputs()
    expected = other(input_ids=ids, pixel_values=images)
    assert_encodes(model, expected.image_embeds, expected.text_embeds)


@pytest.mark.parametrize("quick", [False, True])
@torch.no_grad()
def test_open_clips_weights_are_read_as_their_config_says(tmp_path, quick):
    other, model = open_clips(quick), model_of()
    write_open_clip(tmp_path, quick, {"mean": list(MEAN), "std": list(STD)})
    weights = {name: tensor for name, tensor in other.state_dict().items() if "attn_mask" not in name}
    load_clip_weights(model, weights, str(tmp_path / "open_clip_pytorch_model.bin"))
    images, ids = inputs()
    assert_encodes(model, other.encode_image(images, normalize=True), other.encode_text(ids, normalize=True))


@torch.no_grad()
def test_a_checkpoint_keeps_activation_heads_and_mlps_without_any_file_beside_it(tmp_path):
    other, model, again = open_clips(False), model_of(), model_of()
    write_open_clip(tmp_path)
    load_clip_weights(model, other.state_dict(), str(tmp_path / "x.bin"))
    load_clip_weights(again, model.state_dict(), "checkpoint_best.pth")
    images, ids = inputs()
    assert_encodes(again, other.encode_image(images, normalize=True), other.encode_text(ids, normalize=True))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_openais_weights_are_quick_gelu_whatever_lies_beside_them(tmp_path):
    write_open_clip(tmp_path)
    model, weights = model_of(), model_of().state_dict()
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(12), "vocab_size": torch.tensor(40)}
    load_clip_weights(model, {**weights, **numbers}, str(tmp_path / "ViT-T-8.pt"))
    assert model.visual.transformer.resblocks[0].attn.num_heads == 2 and "unseen" not in model.state_dict()


@torch.no_grad()
def test_openais_heads_have_64_channels_whatever_the_config_says():
    size = replace(SIZE, vision_width=128, vision_heads=8, text_width=64, text_heads=4)
    right = replace(size, vision_heads=2, text_heads=1)
    model, expected = (with_lively_weights(model_of(each)) for each in (size, right))
    load_clip_weights(model, {**published(expected), "input_resolution": torch.tensor(32)}, "ViT-T-8.pt")
    images, ids = inputs()
    assert_encodes(model, expected.encode_image(images).feature, expected.encode_text(ids).feature)


def test_a_causal_mask_beside_the_weights_is_left_alone(tmp_path):
    """Older weights of open_clip have one, of minus infinity."""
    torch.save({**open_clips(False).state_dict(), "attn_mask": torch.full((12, 12), float("-inf")).triu(1)}, tmp_path / "x.pt")
    write_open_clip(tmp_path)
    load_clip_weights(model_of(), read_checkpoint(tmp_path / "x.pt")["model"], str(tmp_path / "x.pt"))


@pytest.fixture
def unknown() -> tuple[ClipSize, dict[str, Tensor]]:
    """OpenAI's vocabulary, and weights that nothing is known about."""
    size = replace(SIZE, vocab_size=VOCABULARY)
    return size, published(model_of(size))


def test_weights_that_nothing_tells_about_are_refused(unknown):
    size, weights = unknown
    with pytest.raises(UserError, match=r"\Ax.pt: does not show its activation .*clip.activation .*clip.vision_heads") as error:
        load_clip_weights(model_of(size), weights, "x.pt")
    assert "\n" not in str(error.value)


def test_the_config_tells_where_nothing_else_does(unknown):
    size, weights = unknown
    model = model_of(replace(size, activation="gelu"))
    load_clip_weights(model, weights, "x.pt")
    blocks = *model.visual.transformer.resblocks, *model.transformer_m.resblocks
    assert all(isinstance(block.mlp.gelu, nn.GELU) for block in blocks)


def test_what_was_trained_or_exported_here_is_read_as_before(unknown, tmp_path):
    size, weights = unknown
    load_clip_weights(model_of(size), {**weights, "image_queue": torch.zeros(20, 8)}, "checkpoint_best.pth")
    save_exported(tmp_path / "model.safetensors", weights, {"task": "retrieval_clip"})
    load_clip_weights(model_of(size), weights, str(tmp_path / "model.safetensors"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pool_type": "avg"}, "pool_type: 'avg' is of a CLIP that this project does not have"),
        ({"timm_model_name": "vit_so400m"}, "timm_model_name: 'vit_so400m' is of a CLIP"),
        ({"act_kwargs": {"approximate": "tanh"}}, "act_kwargs: .* is of a CLIP"),
        ({"preprocessing": {"mean": [0.5] * 3}}, r"mean: \[0.5, 0.5, 0.5\] is of a CLIP"),
    ],
)
def test_a_clip_of_another_kind_is_refused_by_its_setting(tmp_path, change, said):
    write_open_clip(tmp_path, **change)
    with pytest.raises(UserError, match=f"open_clip_config.json: {said}"):
        read_beside(tmp_path / "x.bin", False)


def test_the_config_of_another_model_in_the_folder_is_left_alone_and_a_broken_one_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "blip"}))
    assert read_beside(tmp_path / "x.bin", True) is None
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match="open_clip_config.json: not a config of CLIP"):
        read_beside(tmp_path / "x.bin", False)


@pytest.mark.parametrize("vision", [{"hidden_size": "wide"}, [1], {"num_attention_heads": 7}])
def test_a_config_that_transformers_refuses_is_named(tmp_path, vision):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision}))
    with pytest.raises(UserError, match="config.json: not a config of CLIP"):
        read_beside(tmp_path / "x.bin", True)


def test_heads_of_another_model_are_named(tmp_path):
    write_open_clip(tmp_path, head_width=5)
    with pytest.raises(UserError, match="x.bin: the config beside it has 4 heads, which do not divide 30 channels"):
        load_clip_weights(model_of(replace(SIZE, vision_width=30)), open_clips(False).state_dict(), str(tmp_path / "x.bin"))


def test_pictures_are_normalised_as_the_check_expects():
    assert (folder.MEAN, folder.STD) == (MEAN, STD)


def test_an_activation_needs_its_heads(tmp_path):
    (tmp_path / "x.yaml").write_text("clip: {activation: gelu}\n")
    with pytest.raises(UserError, match="activation needs vision_heads and text_heads with it"):
        load_config(ClipRetrievalConfig, tmp_path / "x.yaml")
