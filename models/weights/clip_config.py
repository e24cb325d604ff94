"""What the shapes of CLIP's weights do not show: activation and heads, from the config files that are published beside them."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CLIPConfig

from configs.folder import other_normalisation
from configs.folder_files import CONFIG
from configs.siglip_folder import OURS, SIGLIP, checked_config
from utils import UserError

OPEN_CLIP = "open_clip_config.json"
HEAD_WIDTH, TEXT_HEADS = 64, 8  # open_clip's defaults
VISION_WIDTH, LAYER_NORM_EPS = 768, 1e-5
# Keys of open_clip that only training or shapes depend on.
KNOWN = {"image_size", "layers", "width", "head_width", "heads", "patch_size", "mlp_ratio", "patch_dropout", "context_length"}
KNOWN |= {"vocab_size", "output_tokens"}
USUAL = {"pool_type": ("tok", "argmax"), "eos_id": (49407,)}


class Unseen(NamedTuple):
    """The facts about a CLIP that the shapes of its weights do not show.

    activation: a key of clip.model.ACTIVATIONS
    """

    activation: str
    vision_heads: int
    text_heads: int


def read_beside(weights: Path, named_as_transformers: bool) -> Unseen | None:
    """Reads the config that is published beside a file of weights, or in their folder: open_clip's or transformers'; None without.

    Raises:
        UserError: when the file is broken, or describes a model that this project does not have.
    """
    readers = [(OPEN_CLIP, _from_open_clip), (CONFIG, _from_transformers)]
    for name, reader in reversed(readers) if named_as_transformers else readers:
        file = weights / name if weights.is_dir() else weights.with_name(name)
        if file.is_file():
            try:
                found = reader(file, json.loads(file.read_text(encoding="utf-8-sig")))
            except UserError:
                raise
            except Exception:  # transformers checks what it is given in ways of its own
                raise UserError(f"{file}: not a config of CLIP; fetch it again, or remove it and set clip.activation") from None
            if found is not None:
                return found
    return None


def _from_open_clip(file: Path, content: dict[str, Any]) -> Unseen:
    model, preprocessing = content["model_cfg"], content.get("preprocess_cfg") or {}
    vision, text = model["vision_cfg"], model["text_cfg"]
    for part in (vision, text):
        for key, value in part.items():
            if value and key not in KNOWN and value not in USUAL.get(key, ()):
                raise _other_model(file, f"{key}: {value!r}")
    _check_pictures(file, preprocessing.get("mean"), preprocessing.get("std"))
    vision_heads = vision.get("width", VISION_WIDTH) // vision.get("head_width", HEAD_WIDTH)
    return Unseen("quick_gelu" if model.get("quick_gelu") else "gelu", vision_heads, text.get("heads", TEXT_HEADS))


def _from_transformers(file: Path, content: dict[str, Any]) -> Unseen | None:
    if content.get("model_type") == SIGLIP:
        vision, text = checked_config(file, content)
        return Unseen(OURS[vision.hidden_act], vision.num_attention_heads, text.num_attention_heads)
    if content.get("model_type") != "clip":
        return None  # of another model, whose weights lie in the same folder
    config = CLIPConfig.from_dict(content)
    vision, text = config.vision_config, config.text_config
    for part in (vision, text):  # older versions of transformers take any value
        if part.hidden_size % part.num_attention_heads:
            raise ValueError(f"{part.num_attention_heads} heads do not divide {part.hidden_size} channels")
    if vision.hidden_act != text.hidden_act or vision.hidden_act not in ("quick_gelu", "gelu"):
        raise _other_model(file, f"hidden_act: {vision.hidden_act!r} and {text.hidden_act!r}")
    if other := {vision.layer_norm_eps, text.layer_norm_eps} - {LAYER_NORM_EPS}:
        raise _other_model(file, f"layer_norm_eps: {other.pop()}")
    pictures = file.with_name("preprocessor_config.json")
    if pictures.is_file():
        preprocessing = json.loads(pictures.read_text(encoding="utf-8-sig"))
        _check_pictures(pictures, preprocessing.get("image_mean"), preprocessing.get("image_std"))
    return Unseen(vision.hidden_act, vision.num_attention_heads, text.num_attention_heads)


def _check_pictures(file: Path, mean: list[float] | None, std: list[float] | None) -> None:
    if other := other_normalisation(mean, std):
        raise _other_model(file, other)


def _other_model(file: Path, setting: str) -> UserError:
    return UserError(f"{file}: {setting} is of a CLIP that this project does not have; give weights of another model")
