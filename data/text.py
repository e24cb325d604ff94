"""Cleaning of sentences, which differs by task, and the BERT tokenizer."""

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

import torch
from transformers import BertTokenizerFast, PreTrainedTokenizerBase

from configs.vocabulary import read_vocabulary, vocabulary_file
from utils import UserError

# Loader workers are forked after the tokenizer was used, and its threads do not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

DEC, ENC = "[DEC]", "[ENC]"  # first token of a text to generate; of a text read together with an image
NEEDED = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

Tokenizer = Callable[..., Mapping[str, torch.Tensor]]  # BERT's or CLIP's

_SIGNS = re.compile(r"[.!\"()*#:;~]")


def clean_sentence(text: str, mode: Literal["caption", "question"], max_words: int) -> str:
    """Cleans a sentence as BLIP does: lower case, without the signs .!"()*#:;~, cut at `max_words` words.

    In a "caption" (also used for statements) each sign becomes a space, and repeated spaces become one. In a "question" the
    signs are deleted.
    """
    text = _SIGNS.sub(" " if mode == "caption" else "", text.lower())
    if mode == "caption":
        text = re.sub(r"\s{2,}", " ", text).rstrip("\n").strip(" ")
    return " ".join(text.rstrip(" ").split(" ")[:max_words])


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """Builds BERT's lower-case tokenizer from a vocab.txt, a tokenizer.json or its folder; [DEC] and [ENC] are added at the end.

    The length of the tokenizer is the vocabulary size of the model. Nothing is downloaded.

    Raises:
        UserError: when the file is missing or lacks BERT's special tokens.
    """
    file = vocabulary_file(path)
    try:
        words = read_vocabulary(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or (
            "not a text file" if isinstance(error, UnicodeDecodeError) else "not a word list"
        )
        raise UserError(f"{file}: {reason}; set the key 'tokenizer' to BERT's vocab.txt or its folder") from None
    missing = [word for word in NEEDED if word not in words]
    if missing:
        raise UserError(f"{file}: has no {', '.join(missing)}; set the key 'tokenizer' to BERT's vocab.txt or its folder")
    tokenizer = BertTokenizerFast(vocab={word: index for index, word in enumerate(words)}, do_lower_case=True)
    tokenizer.add_tokens([DEC, ENC], special_tokens=True)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str], max_tokens: int, first_token_id: int | None = None) -> dict[str, torch.Tensor]:
    """Encodes texts to input_ids and attention_mask (texts, L), padded to the longest text and cut at `max_tokens`.

    `first_token_id`, if given, replaces the first token of each text.
    """
    text = tokenizer(texts, padding="longest", truncation=True, max_length=max_tokens, return_tensors="pt")
    if first_token_id is not None:
        text["input_ids"][:, 0] = first_token_id
    return {name: text[name] for name in ("input_ids", "attention_mask")}


def dec_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of [DEC]: 30522 with bert-base-uncased."""
    return tokenizer.convert_tokens_to_ids(DEC)


def enc_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the id of [ENC]: 30523 with bert-base-uncased."""
    return tokenizer.convert_tokens_to_ids(ENC)


def as_texts(tokenizer: PreTrainedTokenizerBase, ids: torch.Tensor) -> list[str]:
    """Decodes token ids (B, L) to texts, without the spaces that BERT puts around signs: don't, not don ' t."""
    return tokenizer.batch_decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Returns the ids that a generated caption starts with: [DEC] and the words of `prompt`."""
    return [dec_token_id(tokenizer), *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
