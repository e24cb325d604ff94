"""Keys that a folder of SigLIP determines, and folders that are of no SigLIP of this project."""

import json
import shutil

import pytest

from configs.sizes import Pictures
from tests.configs.test_folder import config_of, refusal
from tests.folders import SIDE, SIGLIP_LENGTH, SIGLIP_WORDS, changed, clip_folder, siglip_folder

TASK = "retrieval_clip"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip")
    siglip_folder(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "siglip")


def test_all_that_a_model_needs_is_in_its_folder(folder):
    config = config_of(folder, TASK)
    assert config.image_size == SIDE and config.max_text_tokens == SIGLIP_LENGTH and config.tokenizer == str(folder)
    assert config.pictures.mean == config.pictures.std == (0.5, 0.5, 0.5) and config.pictures.resample == "bicubic"
    assert config.clip.model_dump() == {
        "family": "siglip", "patch_size": 8, "vision_width": 24, "vision_layers": 2, "vision_heads": 2, "vision_hidden": 50,
        "text_width": 16, "text_layers": 2, "text_heads": 2, "text_hidden": 40, "context_length": SIGLIP_LENGTH, "embed_dim": 24,
        "activation": "gelu_tanh", "vocab_size": len(SIGLIP_WORDS) + 2,
    }  # fmt: skip


def test_how_pictures_are_prepared_is_read(folder):
    changed(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=2)
    pictures = config_of(folder, TASK).pictures
    assert pictures.mean == (0.1, 0.2, 0.3) and pictures.std == (0.4, 0.5, 0.6) and pictures.resample == "bilinear"
    (folder / "preprocessor_config.json").unlink()
    assert config_of(folder, TASK).pictures.mean == (0.5, 0.5, 0.5)


def test_a_published_config_leaves_out_what_is_usual(tmp_path):
    content = {"model_type": "siglip", "architectures": ["SiglipModel"], "text_config": {}, "vision_config": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    config = config_of(tmp_path, TASK)
    assert config.clip.vision_hidden == 3072 and config.clip.vocab_size == 32000 and config.max_text_tokens == 64
    content["vision_config"] = {"patch_size": 14, "image_size": 384}  # no whole number of patches
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert config_of(tmp_path, TASK).image_size == 384


def test_keys_that_agree_may_be_given(folder, tmp_path):
    again = shutil.copytree(folder, tmp_path / "again")
    given = {"clip": {"family": "siglip", "patch_size": 8}, "pictures": {"mean": [0.5, 0.5, 0.5]}, "tokenizer": str(again)}
    config = config_of(folder, TASK, image_size=SIDE, **given)
    assert config.tokenizer == str(again) and config.clip.text_hidden == 40
    (again / "tokenizer.json").write_text("{}")
    assert "has other words than" in refusal(folder, TASK, tokenizer=str(again))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"image_size": 48}, "image_size: 48 contradicts"),
        ({"max_text_tokens": 77}, "max_text_tokens: 77 contradicts"),
        ({"clip": {"family": "clip"}}, "clip.family: clip contradicts"),
        ({"pictures": {"mean": [0.48, 0.46, 0.41]}}, "pictures.mean: [0.48, 0.46, 0.41] contradicts"),
        ({"tokenizer": "clip"}, "tokenizer: clip has other words than"),
    ],
)
def test_a_key_that_contradicts_the_folder_is_refused(folder, keys, said):
    assert said in refusal(folder, TASK, **keys)


@pytest.mark.parametrize(
    ("file", "keys", "said"),
    [
        ("config.json", {"model_type": "siglip2", "architectures": ["Siglip2Model"]}, "holds SigLIP 2 NaFlex (Siglip2Model)"),
        ("config.json", {"architectures": ["SiglipForImageClassification"]}, "takes CLIPModel or SiglipModel"),
        ("config.json", {"vision_config__hidden_act": "relu"}, "vision_config.hidden_act: 'relu' is of a model"),
        ("config.json", {"text_config__layer_norm_eps": 1e-5}, "text_config.layer_norm_eps: 1e-05 is of a model"),
        ("config.json", {"vision_config__vision_use_head": False}, "vision_config.vision_use_head: False is of a model"),
        ("config.json", {"text_config__projection_size": 20}, "text_config.projection_size: 20 is of a model"),
        ("config.json", {"vision_config": [1]}, "not a config of SigLIP"),
        ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "but config.json says 32 pixels"),
        ("preprocessor_config.json", {"resample": 0}, "resample: 0 is of a model"),
    ],
)
def test_a_folder_of_another_model_is_refused(folder, file, keys, said):
    changed(folder / file, **keys)
    assert said in refusal(folder, TASK)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"clip": {"family": "siglip", "embed_dim": 768, "vision_width": 1024}}, "of siglip, embed_dim must be vision_width"),
        ({"clip": {"vocab_size": 9}}, "vision_hidden, text_hidden and vocab_size are for family: siglip"),
        ({"clip": {"family": "siglip", "vision_width": 768}, "max_text_tokens": 9}, "pads its texts to clip.context_length, 77"),
    ],
)
def test_sizes_that_do_not_fit_the_family_are_refused(tmp_path, keys, said):
    assert said in refusal(tmp_path, TASK, **keys)


def test_pictures_of_clip_are_normalised_as_its_weights_were_trained(tmp_path):
    clip_folder(tmp_path)
    assert config_of(tmp_path, TASK, max_text_tokens=12).pictures == Pictures()
    assert "pictures.std: [0.5, 0.5, 0.5] contradicts" in refusal(tmp_path, TASK, pictures={"std": [0.5, 0.5, 0.5]})


def test_a_deviation_of_0_is_refused(tmp_path):
    assert "pictures: std must be above 0" in refusal(tmp_path, TASK, pictures={"std": [0.5, 0.5, 0]})
