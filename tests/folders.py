"""Tiny models of transformers with random weights, saved as transformers saves them."""

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from configs.folder import CLASSES
from tests.tiny import with_lively_weights
from tests.tiny_run import WORDS

VOCABULARY = (*WORDS, "[DEC]", "[ENC]")
DEC, ENC = len(WORDS), len(WORDS) + 1
SIDE = 32
VISION = {
    "hidden_size": 24, "intermediate_size": 56, "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": SIDE,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "max_position_embeddings": 20,
    "vocab_size": len(VOCABULARY), "bos_token_id": DEC, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0,
    "label_smoothing": 0.0,
}  # fmt: skip
PIECES = {**{letter: number for number, letter in enumerate("adestr")}, "r</w>": 6, "a</w>": 7, "d</w>": 8, "s</w>": 9}
PIECES |= {"st": 10, "ar</w>": 11, "star</w>": 12, "e</w>": 13, "t</w>": 14, "<|startoftext|>": 15, "<|endoftext|>": 16}
MERGES = [("s", "t"), ("a", "r</w>"), ("st", "ar</w>")]


def blip_folder(folder: Path, task: str, vision: dict | None = None, text: dict | None = None) -> PreTrainedModel:
    """Saves transformers' model of a task with its tokenizer and image processor, and returns it."""
    config = BlipConfig(vision_config=VISION | (vision or {}), text_config=TEXT | (text or {}), image_text_hidden_size=12)
    model = with_lively_weights(getattr(transformers, CLASSES[task])(config).eval())
    model.save_pretrained(folder)
    tokenizer = BertTokenizerFast(vocab={word: number for number, word in enumerate(WORDS)}, do_lower_case=True)
    tokenizer.add_tokens(["[DEC]", "[ENC]"], special_tokens=True)
    BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer).save_pretrained(folder)
    return model


def clip_folder(folder: Path, activation: str = "gelu", head: int = 0) -> CLIPModel:
    """Saves a CLIP with its tokenizer and image processor, and returns it.

    head: channels of the heads; 0 for 3 and 4 heads of a smaller model
    """
    widths = (64, 128) if head else (24, 16)
    heads = [width // head for width in widths] if head else (3, 4)
    shared = {"hidden_act": activation, "num_hidden_layers": 2}
    config = CLIPConfig(
        vision_config={
            "hidden_size": widths[0], "intermediate_size": 100, "num_attention_heads": heads[0], "image_size": SIDE,
            "patch_size": 8, **shared,
        },
        text_config={
            "hidden_size": widths[1], "intermediate_size": 40, "num_attention_heads": heads[1], "vocab_size": len(PIECES),
            "max_position_embeddings": 12, "bos_token_id": 15, "eos_token_id": 16, "pad_token_id": 0, **shared,
        },
        projection_dim=20,
    )  # fmt: skip
    model = with_lively_weights(CLIPModel(config).eval())
    model.save_pretrained(folder)
    CLIPTokenizer(vocab=PIECES, merges=MERGES).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model


SIGLIP_WORDS = ("<pad>", "</s>", "<unk>", "\u2581a", "\u2581red", "\u2581star", "\u2581and")
SIGLIP_LENGTH = 10


def siglip_folder(folder: Path, words: tuple[str, ...] = SIGLIP_WORDS, length: int = SIGLIP_LENGTH) -> SiglipModel:
    """Saves a SigLIP with its tokenizer and image processor, and returns it. It has two embeddings more than words."""
    shared = {"num_hidden_layers": 2, "num_attention_heads": 2}
    special = {"bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    config = SiglipConfig(
        vision_config={"hidden_size": 24, "intermediate_size": 50, "image_size": SIDE, "patch_size": 8, **shared},
        text_config={
            "hidden_size": 16, "intermediate_size": 40, "max_position_embeddings": length, "vocab_size": len(words) + 2,
            "projection_size": 24, **shared, **special,
        },
    )  # fmt: skip
    model = with_lively_weights(SiglipModel(config).eval())
    with torch.no_grad():
        model.logit_scale.fill_(2.0)
    model.save_pretrained(folder)
    pieces = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, "<unk>"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Metaspace()
    pieces.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    names = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=pieces, padding_side="right", **names).save_pretrained(folder)
    SiglipImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return model


def changed(file: Path, **keys: Any) -> None:
    """Sets keys of a JSON file; a dotted one in a mapping of it is written with two underscores."""
    content = json.loads(file.read_text())
    for key, value in keys.items():
        *outer, last = key.split("__")
        part = content
        for name in outer:
            part = part[name]
        part[last] = value
    file.write_text(json.dumps(content))


def pictures(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(number, 3, SIDE, SIDE, generator=generator) * torch.linspace(0.3, 2, number)[:, None, None, None]
