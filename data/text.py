"""Sentences: their cleaning, which differs by task, and the BERT tokenizer."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from utils import UserError

# Loader workers are forked after the tokenizer was used, and its threads do not survive that.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEC, ENC = "[DEC]", "[ENC]"  # the first token of a text to generate, and of a text read with a picture
NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Tokenizer = Callable[..., Mapping[str, torch.Tensor]]  # BERT's or CLIP's

_SIGNS = re.compile(r"[.!\"()*#:;~]")


def clean_sentence(text: str, mode: Literal["caption", "question"], max_words: int) -> str:
    """BLIP's cleaning: lower case, the signs .!"()*#:;~ gone, and at most `max_words` words.

    A "caption" (and a statement) gets a space for each sign and then single spaces; from a "question" signs are deleted.
    """
    text = _SIGNS.sub(" " if mode == "caption" else "", text.lower())
    if mode == "caption":
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.rstrip(" ").split(" ")[:max_words])


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """BERT's lower-case tokenizer from a vocab.txt, or a folder that holds one, with [DEC] and [ENC] added at the end.

    Its length is the model's vocabulary size. Nothing is downloaded.

    Raises:
        UserError: when the file is missing or is not BERT's list of words.
    """
    path = Path(path)
    file = path / "vocab.txt" if path.is_dir() else path
    try:
        words = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{file}: {reason}; set the key 'tokenizer' to BERT's vocab.txt or its folder") from None
    missing = [word for word in NEEDED if word not in words]
    if missing:
        raise UserError(f"{file}: has no {', '.join(missing)}; set the key 'tokenizer' to BERT's vocab.txt or its folder")
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    tokenizer.add_tokens([DEC, ENC], special_tokens=True)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], max_tokens: int, first_token_id: int | None = None) -> dict[str, torch.Tensor]:
    """input_ids and attention_mask (texts, L), padded to the longest text and cut at `max_tokens`.

    `first_token_id` takes the place of the token that the tokenizer begins with.
    """
    text = tokenizer(texts, padding="longest", truncation=True, max_length=max_tokens, return_tensors="pt")
    if first_token_id is not None:
        text["input_ids"][:, 0] = first_token_id
    return {name: text[name] for name in ("input_ids", "attention_mask")}


def dec_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of [DEC]: 30522 with bert-base-uncased."""
    return tokenizer.convert_tokens_to_ids(DEC)


def enc_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id of [ENC]: 30523 with bert-base-uncased."""
    return tokenizer.convert_tokens_to_ids(ENC)


def as_texts(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """What token ids (B, L) say, as one writes: don't, not don ' t."""
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """The ids that a caption to write begins with: [DEC] and the words of `prompt`."""
    return [dec_token_id(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
