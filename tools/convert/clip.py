"""Converting CLIP: OpenAI's names, with or without open_clip's config, this project's checkpoints, and transformers' folders."""

import json
import math
from pathlib import Path

import torch
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from clip.model import ACTIVATIONS, OPENAIS, Clip, ClipSize
from clip.tokenizer import OPENAI, WORDS, load_clip_tokenizer
from configs.folder import CLIP_ENDS, MEAN, STD
from models.weights.clip import (
    OPENAIS_HEAD,
    TRAINING_ALONE,
    VOCABULARY,
    dense_weights,
    to_transformers,
    unseen_of,
)
from models.weights.clip_config import OPEN_CLIP, Unseen
from models.weights.reading import StateDict
from tools.convert.files import Source, check_free, layer_numbers, save_folder, save_weights
from utils import UserError

BICUBIC = 3


def convert_clip(source: Source, to: str, out: Path) -> list[str]:
    """Writes a CLIP in the format `to`, and returns lines on what was done.

    Raises:
        UserError: when it has no such format, a weight is not known, or a fact is missing.
    """
    if to == "blip":
        raise UserError(f"--to blip: {source.path} is a CLIP; give transformers, openai, open_clip or madtp")
    weights = dense_weights(source.weights, str(source.path))
    try:
        size = size_of(weights, source)
    except KeyError as error:
        raise UserError(f"{source.path}: lacks {error.args[0]}; is it a CLIP of this project's kind?") from None
    with torch.device("meta"):
        unseen = unseen_of(Clip(size), source.weights, str(source.path))
    if source.config is None and not source.is_folder and _guessed(size, unseen):
        raise UserError(f"{source.path}: does not show its attention heads; give the config.yaml of its run with --config")
    dropped = [name for name in weights if TRAINING_ALONE.match(name)]
    if to == "madtp":
        facts = torch.tensor([list(ACTIVATIONS).index(unseen.activation), unseen.vision_heads, unseen.text_heads])
        save_weights(out, {"model": {**weights, "unseen": facts}})
        dropped = []
    elif to == "transformers":
        check_tokenizer(source, len(weights["token_embedding.weight"]))
        save_folder(out, CLIPModel, clip_config(weights, size, unseen), to_transformers(weights), source.path)
        save_preparation(out, size, source)
    else:
        plain = {name: tensor for name, tensor in weights.items() if not TRAINING_ALONE.match(name)}
        (save_openai if to == "openai" else save_open_clip)(out, plain, size, unseen)
    lines = [f"{out}: CLIP, {len(weights)} weights, {unseen.activation}, {unseen.vision_heads} and {unseen.text_heads} heads"]
    return lines + ([f"left out, as only training uses them: {len(dropped)} weights, such as {dropped[0]}"] if dropped else [])


def size_of(weights: StateDict, source: Source) -> ClipSize:
    """Returns the sizes that shapes show; heads and activation are those of the config, or of OpenAI's models."""
    patch, positions = weights["visual.conv1.weight"], len(weights["visual.positional_embedding"])
    vision, text = len(patch), weights["token_embedding.weight"].shape[1]
    given = source.config.clip if source.config is not None and source.config.task == "retrieval_clip" else None
    return ClipSize(
        image_size=math.isqrt(positions - 1) * patch.shape[-1],
        patch_size=patch.shape[-1],
        vision_width=vision,
        vision_layers=_layers(weights, "visual.transformer.resblocks."),
        vision_heads=given.vision_heads if given else _openais_heads(vision),
        text_width=text,
        text_layers=_layers(weights, "transformer.resblocks."),
        text_heads=given.text_heads if given else _openais_heads(text),
        context_length=len(weights["positional_embedding"]),
        # Without a config, weights that nothing tells about are refused as OpenAI's vocabulary has them refused.
        vocab_size=len(weights["token_embedding.weight"]) if given else VOCABULARY,
        embed_dim=weights["visual.proj"].shape[1],
        activation=given.activation if given else None,
    )


def clip_config(weights: StateDict, size: ClipSize, unseen: Unseen) -> CLIPConfig:
    words = len(weights["token_embedding.weight"])
    return CLIPConfig(
        vision_config={
            "hidden_size": size.vision_width, "intermediate_size": len(weights["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": size.vision_layers, "num_attention_heads": unseen.vision_heads, "image_size": size.image_size,
            "patch_size": size.patch_size, "hidden_act": unseen.activation, "projection_dim": size.embed_dim,
        },
        text_config={
            "hidden_size": size.text_width, "intermediate_size": len(weights["transformer.resblocks.0.mlp.c_fc.weight"]),
            "num_hidden_layers": size.text_layers, "num_attention_heads": unseen.text_heads, "vocab_size": words,
            "max_position_embeddings": size.context_length, "hidden_act": unseen.activation, "projection_dim": size.embed_dim,
            "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 0,
        },
        projection_dim=size.embed_dim,
    )  # fmt: skip


def check_tokenizer(source: Source, words: int) -> None:
    """Checks that the tokenizer of the weights is known.

    Raises:
        UserError: when it has another number of words.
    """
    given = source.tokenizer or OPENAI
    if (number := len(load_clip_tokenizer(given))) != words:
        raise UserError(f"{source.path}: has {words} words, and the tokenizer {given} {number}; give its own with --tokenizer")


def save_preparation(out: Path, size: ClipSize, source: Source) -> None:
    """Saves the tokenizer, and how pictures are prepared: as here where the config is known, else as OpenAI does."""
    given = source.tokenizer or OPENAI
    if given == OPENAI:
        from open_clip.tokenizer import SimpleTokenizer  # slow to import

        pairs = SimpleTokenizer()
        words = sorted(pairs.encoder, key=pairs.encoder.__getitem__)[:-2] + list(CLIP_ENDS)  # which open_clip names otherwise
        vocabulary = {word: number for number, word in enumerate(words)}
        CLIPTokenizer(vocab=vocabulary, merges=list(pairs.bpe_ranks)).save_pretrained(out)
    elif Path(given).is_dir() and not (Path(given) / WORDS).is_file():
        CLIPTokenizer.from_pretrained(given, local_files_only=True).save_pretrained(out)
    else:  # a list of words, which transformers has no tokenizer for
        file = Path(given) / WORDS if Path(given).is_dir() else Path(given)
        (out / WORDS).write_bytes(file.read_bytes())
    side = {"height": size.image_size, "width": size.image_size}
    how = {"size": side, "do_center_crop": False}
    if source.config is None:
        how = {"size": {"shortest_edge": size.image_size}, "do_center_crop": True}
    pictures = CLIPImageProcessor(**how, crop_size=side, resample=BICUBIC, image_mean=list(MEAN), image_std=list(STD))
    pictures.save_pretrained(out)


def save_openai(out: Path, weights: StateDict, size: ClipSize, unseen: Unseen) -> None:
    """Saves a state dict that OpenAI's code builds its model from. It knows one activation, and heads of one width.

    Raises:
        UserError: when the model has others.
    """
    if unseen != Unseen(OPENAIS, size.vision_width // OPENAIS_HEAD, size.text_width // OPENAIS_HEAD):
        raise UserError(f"--to openai: its models have {OPENAIS} and heads of {OPENAIS_HEAD} channels; give --to open_clip")
    numbers = {
        "input_resolution": size.image_size, "context_length": size.context_length,
        "vocab_size": len(weights["token_embedding.weight"]),
    }  # fmt: skip
    save_weights(out, {**weights, **{name: torch.tensor(number) for name, number in numbers.items()}})


def save_open_clip(out: Path, weights: StateDict, size: ClipSize, unseen: Unseen) -> None:
    """Saves a state dict of open_clip, and open_clip_config.json beside it."""
    hidden = {tower: len(weights[f"{tower}transformer.resblocks.0.mlp.c_fc.weight"]) for tower in ("visual.", "")}
    content = {
        "model_cfg": {
            "embed_dim": size.embed_dim,
            **({"quick_gelu": True} if unseen.activation == OPENAIS else {}),
            "vision_cfg": {
                "image_size": size.image_size, "layers": size.vision_layers, "width": size.vision_width,
                "head_width": size.vision_width // unseen.vision_heads, "patch_size": size.patch_size,
                "mlp_ratio": hidden["visual."] / size.vision_width,
            },
            "text_cfg": {
                "context_length": size.context_length, "vocab_size": len(weights["token_embedding.weight"]),
                "width": size.text_width, "heads": unseen.text_heads, "layers": size.text_layers,
                "mlp_ratio": hidden[""] / size.text_width,
            },
        },
        "preprocess_cfg": {"mean": list(MEAN), "std": list(STD)},
    }  # fmt: skip
    check_free(out.with_name(OPEN_CLIP))
    save_weights(out, weights)
    out.with_name(OPEN_CLIP).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _openais_heads(width: int) -> int:
    """Returns the heads of OpenAI's models; 1 for a width that none has, whose heads the weights' file must tell."""
    return 1 if width % OPENAIS_HEAD else width // OPENAIS_HEAD


def _guessed(size: ClipSize, unseen: Unseen) -> bool:
    towers = (size.vision_width, unseen.vision_heads), (size.text_width, unseen.text_heads)
    return any(width % OPENAIS_HEAD and heads == 1 for width, heads in towers)


def _layers(weights: StateDict, front: str) -> int:
    return 1 + max(layer_numbers(weights, front))
