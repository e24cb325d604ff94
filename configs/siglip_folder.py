"""Keys that a folder of transformers' SiglipModel determines: SigLIP, and SigLIP 2 of one resolution."""

from pathlib import Path
from typing import Any

from configs.folder_files import CONFIG, one_side, other_model, picture_settings
from utils import UserError

SIGLIP, NAFLEX = "siglip", "siglip2"  # model types; SigLIP 2 of one resolution has the first
NAFLEX_REFUSED = (
    "holds SigLIP 2 NaFlex (Siglip2Model), whose pictures have patches of any number; give a SigLIP 2 of one resolution, such as"
    " google/siglip2-base-patch16-224"
)
ACTIVATION, NORM_EPS = "gelu_pytorch_tanh", 1e-6
OURS = {ACTIVATION: "gelu_tanh"}  # name of an activation there -> here
HALF = [0.5, 0.5, 0.5]  # mean and standard deviation of pictures where no file tells
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers
TOKENIZERS = ("tokenizer.json", "spiece.model")  # of SigLIP 2, and of SigLIP


def siglip_keys(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the config keys of a SigLIP whose config.json has this content.

    Raises:
        UserError: when the folder is broken, or describes a model that this project does not have.
    """
    try:
        vision, text = checked_config(path / CONFIG, content)
        size = one_side(vision.image_size)
        sizes = {
            "family": "siglip",
            "patch_size": one_side(vision.patch_size),
            "vision_width": vision.hidden_size,
            "vision_layers": vision.num_hidden_layers,
            "vision_heads": vision.num_attention_heads,
            "vision_hidden": vision.intermediate_size,
            "text_width": text.hidden_size,
            "text_layers": text.num_hidden_layers,
            "text_heads": text.num_attention_heads,
            "text_hidden": text.intermediate_size,
            "context_length": text.max_position_embeddings,
            "embed_dim": text.projection_size,
            "activation": OURS[vision.hidden_act],
            "vocab_size": text.vocab_size,
        }
    except UserError:
        raise
    except Exception:  # transformers checks what it is given in ways of its own
        raise UserError(f"{path / CONFIG}: not a config of SigLIP; fetch the folder again") from None
    return {
        "image_size": size,
        "clip": sizes,
        "max_text_tokens": sizes["context_length"],
        "pictures": _pictures(path, size),
        "tokenizer": str(path),
    }


def checked_config(file: Path, content: dict[str, Any]) -> tuple[Any, Any]:
    """Returns transformers' configs of both towers.

    Raises:
        UserError: when they are of another kind than SigLIP's.
    """
    from transformers import SiglipTextConfig, SiglipVisionConfig  # slow to import, and few configs name a folder

    vision = SiglipVisionConfig.from_dict(content.get("vision_config") or {})
    # The published special ids are another model's and lie outside of the vocabulary, of which transformers would warn.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    text = SiglipTextConfig.from_dict({**(content.get("text_config") or {}), **special})
    for name, value, ours in (
        ("vision_config.hidden_act", vision.hidden_act, ACTIVATION),
        ("text_config.hidden_act", text.hidden_act, ACTIVATION),
        ("vision_config.layer_norm_eps", vision.layer_norm_eps, NORM_EPS),
        ("text_config.layer_norm_eps", text.layer_norm_eps, NORM_EPS),
        ("vision_config.vision_use_head", getattr(vision, "vision_use_head", True), True),
        ("vision_config.num_channels", vision.num_channels, 3),
        ("text_config.projection_size", text.projection_size, vision.hidden_size),
    ):
        if value != ours:
            raise other_model(file, f"{name}: {value!r}")
    return vision, text


def _pictures(path: Path, size: int) -> dict[str, Any]:
    """Returns the keys of `pictures`, how the folder prepares pictures of this size."""
    file, content = picture_settings(path)
    if file is None:
        return {"mean": HALF, "std": HALF, "resample": "bicubic"}
    given, resample = content.get("size", {"height": size, "width": size}), content.get("resample", 3)
    if given != {"height": size, "width": size}:
        raise UserError(f"{file}: resizes to {given}, but {CONFIG} says {size} pixels; fetch the folder again")
    if resample not in RESAMPLE or not content.get("do_normalize", True):
        raise other_model(file, f"resample: {resample}" if resample not in RESAMPLE else "do_normalize: false")
    mean, std = content.get("image_mean") or HALF, content.get("image_std") or HALF
    return {"mean": list(mean), "std": list(std), "resample": RESAMPLE[resample]}


def same_tokenizer(given: Path, folder: Path) -> bool:
    """Tells whether a path is the tokenizer of a folder: the folder, or another that holds the same files."""
    if given.resolve() == folder.resolve():
        return True
    files = [name for name in TOKENIZERS if (folder / name).is_file()]
    return bool(files) and all(
        (given / name).is_file() and (given / name).read_bytes() == (folder / name).read_bytes() for name in files
    )
