"""Formats of annotation files that others publish, recognised in order to name them: they have to be converted."""

import json
from typing import Any

CONVERT = (
    "convert it to BLIP's annotation format: tools/import_data.py does that for COCO, Karpathy, VQA and NLVR2; see docs/data.md"
)
# Name of the format -> keys of the object that the file is.
OBJECTS = {
    "VQA's official questions": {"questions"},
    "COCO's own annotations": {"images", "annotations"},
    "VQA's official annotations": {"annotations"},
    "Karpathy's split file": {"images", "dataset"},
}
# Name of the format -> keys of each entry, where the file is a list.
ENTRIES = {
    "Visual Genome's own questions": {"qas"},
    "NLVR2's own statements": {"identifier", "sentence"},
    "Karpathy's images": {"sentences", "split"},
    "VQA's official annotations": {"answers", "multiple_choice_answer"},
}


def foreign_format(content: dict[str, Any]) -> str | None:
    """Returns the name of the format of a file that is an object, if it is one of others; else None."""
    return _matching(content, OBJECTS)


def foreign_entry(entry: Any) -> str | None:
    """Returns the name of the format that an entry of a list has, if it is one of others; else None."""
    return _matching(entry, ENTRIES) if isinstance(entry, dict) else None


def is_json_lines(text: str) -> bool:
    """Tells whether a text has a JSON object on each line, as NLVR2's own files have. Only the first two are read."""
    lines = [line for line in text.split("\n", 3)[:3] if line.strip()][:2]
    try:
        return len(lines) == 2 and all(isinstance(json.loads(line), dict) for line in lines)
    except json.JSONDecodeError:
        return False


def _matching(content: dict[str, Any], formats: dict[str, set[str]]) -> str | None:
    return next((name for name, keys in formats.items() if keys <= content.keys()), None)
