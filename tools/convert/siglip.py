"""Converting SigLIP: this project's checkpoints and transformers' folders."""

import json
import math
from pathlib import Path

import torch
from transformers import SiglipConfig, SiglipImageProcessor, SiglipModel

from clip.model import ACTIVATIONS
from clip.siglip_tokenizer import load_siglip_tokenizer
from configs.folder_files import CONFIG, read_json
from configs.siglip_folder import ACTIVATION, HALF, NORM_EPS, OURS, RESAMPLE, siglip_keys
from models.weights.clip import TRAINING_ALONE, dense_weights, to_transformers
from models.weights.clip_config import Unseen, read_beside
from models.weights.reading import StateDict
from tools.convert.files import Source, layer_numbers, save_folder, save_weights
from utils import UserError

POOLS = ("visual.pool.probe", "vision_model.head.probe")  # a weight that SigLIP alone has, here and in transformers


def convert_siglip(source: Source, to: str, out: Path) -> list[str]:
    """Writes a SigLIP in the format `to`, and returns lines on what was done.

    Raises:
        UserError: when it has no such format, a weight is not known, or a fact is missing.
    """
    if to not in ("transformers", "madtp"):
        raise UserError(f"--to {to}: {source.path} is a SigLIP; give transformers or madtp")
    weights, unseen = dense_weights(source.weights, str(source.path)), unseen_of(source)
    dropped = [name for name in weights if TRAINING_ALONE.match(name)]
    if to == "madtp":
        save_weights(out, {"model": {**weights, "unseen": facts(unseen)}})
        dropped = []
    else:
        if not source.tokenizer:
            raise UserError(f"{source.path}: does not hold its tokenizer; give the folder of it with --tokenizer")
        tokenizer = load_siglip_tokenizer(source.tokenizer).pieces
        try:
            config = siglip_config(weights, unseen)
        except KeyError as error:
            raise UserError(f"{source.path}: lacks {error.args[0]}; is it cut off? Fetch it again") from None
        if len(tokenizer) > config.text_config.vocab_size:
            raise UserError(f"{source.tokenizer}: has {len(tokenizer)} words, the weights of {source.path} fewer")
        for name in ("bos", "eos", "pad"):
            setattr(config.text_config, f"{name}_token_id", getattr(tokenizer, f"{name}_token_id"))
        if source.config is not None:  # an edge beyond the last whole patch is in no shape
            config.vision_config.image_size = source.config.image_size
        save_folder(out, SiglipModel, config, to_transformers(weights), source.path)
        tokenizer.save_pretrained(out)
        save_pictures(out, config.vision_config.image_size, source)
    lines = [f"{out}: SigLIP, {len(weights)} weights, {unseen.vision_heads} and {unseen.text_heads} heads"]
    if to == "madtp" and source.is_folder:
        keys = siglip_keys(source.path, read_json(source.path / CONFIG))
        del keys["image_size"]  # to which positions are interpolated
        lines += ["keys of the config that they need:", *(f"{key}: {json.dumps(value)}" for key, value in keys.items())]
    return lines + ([f"left out, as only training uses them: {len(dropped)} weights, such as {dropped[0]}"] if dropped else [])


def unseen_of(source: Source) -> Unseen:
    """Finds the activation and heads, which shapes do not show.

    Raises:
        UserError: when nothing tells them, or transformers' SigLIP has another activation.
    """
    if "unseen" in source.weights:
        activation, *heads = source.weights["unseen"].tolist()
        found = Unseen(list(ACTIVATIONS)[activation], *heads)
    else:
        found = read_beside(source.path, True)
    if found is None:
        raise UserError(f"{source.path}: does not show its attention heads; give the folder that its config.json lies in")
    if found.activation != OURS[ACTIVATION]:
        raise UserError(f"{source.path}: has the activation {found.activation}; SigLIP's is {OURS[ACTIVATION]}, give its weights")
    return found


def facts(unseen: Unseen) -> torch.Tensor:
    return torch.tensor([list(ACTIVATIONS).index(unseen.activation), unseen.vision_heads, unseen.text_heads])


def siglip_config(weights: StateDict, unseen: Unseen) -> SiglipConfig:
    """Returns transformers' config of `dense_weights`.

    Raises:
        KeyError: when a weight is missing.
    """
    patch, words = weights["visual.conv1.weight"], weights["token_embedding.weight"]
    shared = {"hidden_act": ACTIVATION, "layer_norm_eps": NORM_EPS}
    towers = {}
    for name, front, heads, width in (
        ("vision_config", "visual.", unseen.vision_heads, len(patch)),
        ("text_config", "", unseen.text_heads, words.shape[1]),
    ):
        towers[name] = {
            "hidden_size": width,
            "intermediate_size": len(weights[f"{front}transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": 1 + max(layer_numbers(weights, f"{front}transformer.resblocks.")),
            "num_attention_heads": heads,
            **shared,
        }
    patches = len(weights["visual.positional_embedding"])
    towers["vision_config"] |= {"patch_size": patch.shape[-1], "image_size": math.isqrt(patches) * patch.shape[-1]}
    towers["text_config"] |= {
        "vocab_size": len(words), "max_position_embeddings": len(weights["positional_embedding"]),
        "projection_size": len(weights["text_projection.weight"]), "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
    }  # fmt: skip
    return SiglipConfig(**towers)


def save_pictures(out: Path, side: int, source: Source) -> None:
    """Saves how pictures are prepared: as the run's config says, else as SigLIP was published."""
    mean, std, resample = HALF, HALF, "bicubic"
    if source.config is not None:
        pictures = source.config.pictures
        mean, std, resample = list(pictures.mean), list(pictures.std), pictures.resample
    numbers = {name: number for number, name in RESAMPLE.items()}
    size = {"height": side, "width": side}
    SiglipImageProcessor(size=size, resample=numbers[resample], image_mean=mean, image_std=std).save_pretrained(out)
