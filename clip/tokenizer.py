"""CLIP's tokenizer with the interface of transformers: OpenAI's byte pairs, or a short word list with the same special tokens.

The end-of-text token has the highest id, and padding (0) comes after it. The end of a text is therefore the argmax of its ids.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import UserError

OPENAI = "clip"
UNKNOWN = "[UNK]"
START, END = "[START]", "[END]"  # names of the special tokens in convert_ids_to_tokens
WORDS = "vocab.txt"
WORD_END = "</w>"  # marks the last piece of a word in OpenAI's byte pairs


class ClipTokenizer:
    """A tokenizer from texts to ids. Its length is the vocabulary size of the model.

    It can be pickled, which loader workers need when they are spawned.
    """

    def __init__(self, words: Callable[[str], list[int]], name: Callable[[int], str], start: int, end: int):
        """Stores the vocabulary.

        Args:
            words: maps a text to ids, without special tokens.
            name: maps an id to its token.
            start, end: ids of the start-of-text and end-of-text tokens, the two highest.
        """
        self.words, self.name, self.start, self.end = words, name, start, end

    def __len__(self) -> int:
        return self.end + 1

    def __call__(
        self,
        texts: Sequence[str],
        padding: str = "longest",
        truncation: bool = True,
        max_length: int = 77,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """Encodes texts to input_ids and attention_mask (texts, L), padded to the longest text.

        Each text is cut to `max_length` tokens, including its start and end tokens.
        """
        ids = [[self.start, *self.words(text)[: max_length - 2], self.end] for text in texts]
        longest = max(map(len, ids))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        lengths = torch.tensor([len(row) for row in ids])
        return {"input_ids": padded, "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long()}

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        special = {self.start: START, self.end: END}
        return [special[number] if number in special else self.name(number) for number in ids]


def load_clip_tokenizer(source: str) -> ClipTokenizer:
    """Loads OpenAI's tokenizer (from open_clip) if `source` is "clip", else that of a file or folder.

    source: "clip", a file with a word per line, or a folder with the files of transformers' CLIPTokenizer or with such a vocab.txt

    Raises:
        UserError: when the file is missing or has no [UNK], or the folder holds neither.
    """
    if source == OPENAI:
        from open_clip.tokenizer import SimpleTokenizer  # imported only here: open_clip is slow to import

        pairs = SimpleTokenizer()
        return ClipTokenizer(pairs.encode, partial(_piece, pairs.decoder), pairs.sot_token_id, pairs.eot_token_id)
    if Path(source).is_dir():
        if not (Path(source) / WORDS).is_file():
            return _transformers_tokenizer(Path(source))
        source = str(Path(source) / WORDS)
    try:
        words = Path(source).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"{source}: {reason}; set the key 'tokenizer' to 'clip' or to a list of words") from None
    if UNKNOWN not in words:
        raise UserError(f"{source}: has no {UNKNOWN}; set the key 'tokenizer' to 'clip' or to a list of words")
    numbers = {word: number for number, word in enumerate(words)}
    start, end = len(words), len(words) + 1
    return ClipTokenizer(partial(_numbers, numbers), words.__getitem__, start, end)


def _transformers_tokenizer(folder: Path) -> ClipTokenizer:
    from transformers import CLIPTokenizer

    try:
        if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            raise FileNotFoundError
        pairs = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        start, end = pairs.bos_token_id, pairs.eos_token_id
        if (start, end) != (len(pairs) - 2, len(pairs) - 1):
            raise ValueError
    except Exception:  # transformers' words for a broken file are many, and none speaks of it
        raise UserError(f"{folder}: not the tokenizer of a CLIP; set the key 'tokenizer' to 'clip' or to a list of words") from None
    return ClipTokenizer(partial(_pairs, pairs), partial(_pair_name, pairs), start, end)


def _pairs(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _pair_name(tokenizer: Any, number: int) -> str:
    return tokenizer.convert_ids_to_tokens(number).removesuffix(WORD_END)


def _piece(pieces: Mapping[int, str], number: int) -> str:
    return pieces[number].removesuffix(WORD_END)


def _numbers(numbers: Mapping[str, int], text: str) -> list[int]:
    return [numbers.get(word, numbers[UNKNOWN]) for word in text.split()]
