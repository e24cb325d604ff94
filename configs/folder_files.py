"""The files of a folder of transformers, whatever its model."""

import json
from pathlib import Path
from typing import Any

from utils import UserError

CONFIG = "config.json"
PICTURES = ("preprocessor_config.json", "processor_config.json")


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file}: not a JSON object; fetch the folder again")
    return content


def picture_settings(folder: Path) -> tuple[Path | None, dict[str, Any]]:
    """Returns the file that tells how pictures are prepared, with its settings; None and no settings without one."""
    file = next((folder / name for name in PICTURES if (folder / name).is_file()), None)
    if file is None:
        return None, {}
    content = read_json(file)
    return file, content.get("image_processor", content)


def one_side(size: Any) -> int:
    """Returns one side of a square size, a number or two."""
    if isinstance(size, list | tuple):
        first, *others = size
        if any(other != first for other in others):
            raise ValueError("not a square")
        return first
    return size


def other_model(file: Path, setting: str) -> UserError:
    return UserError(f"{file}: {setting} is of a model that this project does not have; give weights of another model")
