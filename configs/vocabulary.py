"""Reading the word list of a tokenizer, in the files in which BERT's and CLIP's are published."""

import json
from pathlib import Path
from typing import Any

LISTS = ("vocab.txt", "tokenizer.json", "vocab.json")  # in a tokenizer's folder, the first that is there


def vocabulary_file(path: str | Path) -> Path:
    """Returns the file with the words of a tokenizer, given as that file or as its folder; vocab.txt where none is there."""
    path = Path(path)
    if not path.is_dir():
        return path
    return next((path / name for name in LISTS if (path / name).is_file()), path / LISTS[0])


def read_vocabulary(file: Path) -> list[str]:
    """Returns the words in the order of their ids: those of a text file with a word per line, or of a tokenizer's JSON.

    Raises:
        OSError, UnicodeDecodeError: when the file cannot be read as text.
        ValueError: when it is another kind of JSON, or when ids are left out.
    """
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix != ".json":
        return text.splitlines()
    ids = _ids(json.loads(text))
    words = sorted(ids, key=ids.__getitem__)
    if sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2, ...")
    return words


def _ids(content: Any) -> dict[str, int]:
    """Returns the ids of a tokenizer.json, which lists added tokens apart, or of a vocab.json."""
    model = content.get("model") if isinstance(content, dict) else None
    ids = model.get("vocab") if isinstance(model, dict) else content
    if not isinstance(ids, dict) or not all(isinstance(number, int) for number in ids.values()):
        raise ValueError("holds no words with their ids")
    added = content.get("added_tokens", []) if ids is not content else []
    return {**ids, **{token["content"]: token["id"] for token in added}}


def lowers_case(folder: Path) -> bool:
    """Tells whether the tokenizer of a folder lowers upper case, as this project does; True where its files do not say."""
    said = []
    for name, key in (("tokenizer_config.json", "do_lower_case"), ("tokenizer.json", "normalizer")):
        if (folder / name).is_file():
            value = json.loads((folder / name).read_text(encoding="utf-8-sig")).get(key)
            said.append(value.get("lowercase") if isinstance(value, dict) else value)
    return False not in said
