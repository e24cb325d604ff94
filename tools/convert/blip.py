"""Converting BLIP: the authors' .pth, this project's names, and transformers' folders."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from transformers import BlipConfig, BlipImageProcessor

from configs.folder import CLASSES, MEAN, STD, folder_keys
from data.text import dec_token_id, load_tokenizer
from models.vit import NORM_EPS
from models.weights.blip import TRAINING_ALONE, as_published, dense_weights, to_transformers
from models.weights.reading import StateDict
from tools.convert.files import Source, layer_numbers, save_folder, save_weights
from utils import UserError

BICUBIC = 3
# Heads of the published sizes, by width; those of other widths have to be told.
VISION_HEADS, TEXT_HEADS = {768: 12, 1024: 16}, {768: 12}


class Unseen(NamedTuple):
    """The facts that the shapes of weights do not show."""

    vision_heads: int
    text_heads: int
    norm_eps: float


def convert_blip(source: Source, to: str, out: Path) -> list[str]:
    """Writes a BLIP in the format `to`, and returns lines on what was done.

    Raises:
        UserError: when it has no such format, a weight is not known, or a fact is missing.
    """
    weights = dense_weights(source.weights, str(source.path))
    task = task_of(weights, source.path)
    if to in ("openai", "open_clip"):
        raise UserError(f"--to {to}: a format of CLIP, and {source.path} is a BLIP; give transformers, blip or madtp")
    lines = [f"{out}: BLIP for task '{task}', {len(weights)} weights"]
    if to != "transformers":
        save_weights(out, {"model": as_published(weights) if to == "blip" else weights})
        return lines + _keys_to_set(source, task)
    if task not in CLASSES:
        raise UserError(f"{source.path}: a BLIP for NLVR2, for which transformers has no class; give --to blip or madtp")
    try:
        sizes_of(weights)
    except KeyError as error:
        raise UserError(f"{source.path}: lacks {error.args[0]}; is it cut off? Fetch it again") from None
    unseen = unseen_of(source, weights, task)
    if not source.tokenizer:
        raise UserError(f"{source.path}: does not hold its tokenizer; give BERT's vocab.txt, or its folder, with --tokenizer")
    tokenizer = load_tokenizer(source.tokenizer)
    words = {
        "bos_token_id": dec_token_id(tokenizer), "eos_token_id": tokenizer.sep_token_id, "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    config = blip_config(weights, unseen, words)
    if config.text_config.vocab_size != len(tokenizer):
        raise UserError(f"{source.tokenizer}: has {len(tokenizer)} words with [DEC] and [ENC], the weights of {source.path} others")
    save_folder(out, getattr(transformers, CLASSES[task]), config, to_transformers(weights), source.path)
    tokenizer.save_pretrained(out)
    (out / "vocab.txt").write_text("\n".join(tokenizer.convert_ids_to_tokens(range(len(tokenizer)))) + "\n", encoding="utf-8")
    side = config.vision_config.image_size
    pictures = BlipImageProcessor(
        size={"height": side, "width": side}, resample=BICUBIC, image_mean=list(MEAN), image_std=list(STD)
    )
    pictures.save_pretrained(out)
    dropped = [name for name in weights if TRAINING_ALONE.match(name)]
    return lines + ([f"left out, as only training uses them: {len(dropped)} weights, such as {dropped[0]}"] if dropped else [])


def task_of(weights: StateDict, source: Path) -> str:
    """Returns the task of a BLIP's weights.

    Raises:
        UserError: when it is none of this project's.
    """
    fronts = {name.split(".")[0] for name in weights}
    if "cls_head" in fronts or any(".self0." in name for name in weights):
        return "nlvr"
    if "itm_head" in fronts and "text_encoder" in fronts:
        return "retrieval"
    if "text_decoder" in fronts and "visual_encoder" in fronts:
        return "vqa" if "text_encoder" in fronts else "caption"
    raise UserError(f"{source}: lacks the head of a task; give a BLIP for retrieval, captioning, VQA or NLVR2")


def unseen_of(source: Source, weights: StateDict, task: str) -> Unseen:
    """Finds the heads and the epsilon of the image encoder's LayerNorm.

    Raises:
        UserError: when nothing tells them.
    """
    if source.is_folder:
        keys = folder_keys(source.path, task)
        return Unseen(keys["vit"]["num_heads"], keys["bert"]["num_attention_heads"], keys["vit_norm_eps"])
    if (config := source.config) is not None:
        return Unseen(config.vit_sizes.num_heads, config.bert_sizes.num_attention_heads, config.vit_norm_eps)
    sizes = sizes_of(weights)
    vision, text = sizes["vision_config"]["hidden_size"], sizes["text_config"]["hidden_size"]
    if vision not in VISION_HEADS or text not in TEXT_HEADS:
        raise UserError(f"{source.path}: does not show its attention heads; give the config.yaml of its run with --config")
    return Unseen(VISION_HEADS[vision], TEXT_HEADS[text], NORM_EPS)


def sizes_of(weights: StateDict) -> dict[str, Any]:
    """Returns the sizes that the shapes of `dense_weights` show, as keyword arguments of BlipConfig.

    Raises:
        KeyError: when a weight is missing.
    """
    text = "text_encoder." if "text_encoder.embeddings.word_embeddings.weight" in weights else "text_decoder.bert."
    patch, words = weights["visual_encoder.patch_embed.proj.weight"], weights[f"{text}embeddings.word_embeddings.weight"]
    grid = math.isqrt(weights["visual_encoder.pos_embed"].shape[1] - 1)
    return {
        "vision_config": {
            "hidden_size": len(patch),
            "intermediate_size": len(weights["visual_encoder.blocks.0.mlp.fc1.weight"]),
            "num_hidden_layers": _layers(weights, "visual_encoder.blocks."),
            "image_size": grid * patch.shape[-1],
            "patch_size": patch.shape[-1],
        },
        "text_config": {
            "vocab_size": len(words),
            "hidden_size": words.shape[1],
            "intermediate_size": len(weights[f"{text}encoder.layer.0.intermediate.dense.weight"]),
            "num_hidden_layers": _layers(weights, f"{text}encoder.layer."),
            "max_position_embeddings": len(weights[f"{text}embeddings.position_embeddings.weight"]),
        },
        "image_text_hidden_size": len(weights["vision_proj.weight"]) if "vision_proj.weight" in weights else 256,
    }


def blip_config(weights: StateDict, unseen: Unseen, words: dict[str, int]) -> BlipConfig:
    """Returns transformers' config of `dense_weights`. words: ids of special tokens"""
    sizes = sizes_of(weights)
    sizes["vision_config"] |= {"num_attention_heads": unseen.vision_heads, "layer_norm_eps": unseen.norm_eps}
    sizes["text_config"] |= {
        "num_attention_heads": unseen.text_heads, "encoder_hidden_size": sizes["vision_config"]["hidden_size"],
        "is_decoder": True, "tie_word_embeddings": True, **words,
    }  # fmt: skip
    return BlipConfig(**sizes)


def _layers(weights: StateDict, front: str) -> int:
    return 1 + max(layer_numbers(weights, front))


def _keys_to_set(source: Source, task: str) -> list[str]:
    """Returns a line with the keys of the config that a file of weights does not carry, where a folder of transformers had them."""
    if not source.is_folder:
        return []
    keys = folder_keys(source.path, task)
    told = ", ".join(f"{name}: {keys[name]}" for name in ("image_size", "vit", "vit_norm_eps", "bert"))
    return [f"keys that belong to it: {told}"]
