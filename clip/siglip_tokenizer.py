"""SigLIP's tokenizer: that of its folder, with the interface of CLIP's.

A text is padded to one length. Its padding takes part like any other token, and so the mask marks all of them.
"""

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils import UserError

PIECES = "spiece.model"  # of SigLIP, for the package sentencepiece
FILES = ("tokenizer.json", PIECES)
SPACE = "\u2581"  # stands for the space before a word in a piece


class SiglipTokenizer:
    """A tokenizer of transformers, which can be pickled as loader workers need. Its length is its number of words."""

    def __init__(self, pieces: Any):
        self.pieces = pieces

    def __len__(self) -> int:
        return len(self.pieces)

    def __call__(
        self,
        texts: Sequence[str],
        padding: str = "max_length",
        truncation: bool = True,
        max_length: int = 64,
        return_tensors: str = "pt",
    ) -> dict[str, Tensor]:
        """Encodes texts to input_ids and attention_mask (texts, max_length), in lower case as SigLIP was trained.

        padding: no matter; always to `max_length`, where the model reads a text
        """
        lower = [text.lower() for text in texts]
        ids = self.pieces(lower, padding="max_length", truncation=True, max_length=max_length, return_tensors="pt")["input_ids"]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def convert_ids_to_tokens(self, ids: Iterable[int]) -> list[str]:
        return [str(piece).removeprefix(SPACE) or SPACE for piece in self.pieces.convert_ids_to_tokens(list(ids))]


def load_siglip_tokenizer(source: str) -> SiglipTokenizer:
    """Loads the tokenizer of a folder: tokenizer.json (SigLIP 2), or spiece.model (SigLIP).

    Raises:
        UserError: when the folder has neither, a file is broken, or a package is missing.
    """
    folder = Path(source)
    if not any((folder / name).is_file() for name in FILES):
        raise UserError(f"{folder}: has no {' or '.join(FILES)}; set the key 'tokenizer' to the folder of a SigLIP's tokenizer")
    missing = [name for name, module in (("sentencepiece", "sentencepiece"), ("protobuf", "google.protobuf")) if not _has(module)]
    if (folder / PIECES).is_file() and missing:
        raise UserError(f"{folder / PIECES}: needs the package {missing[0]}; install it: pip install sentencepiece protobuf")
    from transformers import AutoTokenizer  # slow to import

    try:
        pieces = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # transformers' words for a broken file are many, and none speaks of it
        raise UserError(f"{folder}: its tokenizer cannot be read; fetch the folder again") from None
    if pieces.pad_token_id is None:
        raise UserError(f"{folder}: its tokenizer has no padding token, and SigLIP pads its texts; fetch the folder again")
    return SiglipTokenizer(pieces)


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that holds it is missing
        return False
