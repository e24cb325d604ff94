"""Arbitrary configurations and annotations: each is read, or refused in one line, and none ends in a traceback.

MADTP_FUZZ=N tries N examples of each kind instead of a few; 60 seconds are some thousands.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from configs.load import parse_command_line
from configs.schema import CaptionConfig, Config, VqaConfig
from data.captions import CaptionPairs, read_captioned
from data.nlvr import read_statements
from data.vqa import read_answer_list, read_test_questions
from tasks.registry import TASKS
from transform.images import eval_transform
from utils import UserError

EXAMPLES = int(os.environ.get("MADTP_FUZZ", "40"))
QUICK = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))

SCALARS = st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=12)
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3))
FIELDS = ["sentence", "label", "images", "image", "caption", "image_id", "question", "question_id", "answer", "dataset", "id"]
GOOD = {
    "sentence": "a cat", "label": "True", "images": ["a.png", "b.png"], "image": "a.png", "caption": ["a cat"], "image_id": 1,
    "question": "what?", "question_id": 1, "answer": ["cat"], "dataset": "vqa",
}  # fmt: skip


@st.composite
def entries(draw: st.DrawFn) -> Any:
    """Draws what an annotation file may hold: entries of the right shape, each with some values of another kind, or anything."""
    wrong = st.dictionaries(st.sampled_from(FIELDS), VALUES, max_size=2)
    entry = st.builds(lambda change, gone: {k: v for k, v in {**GOOD, **change}.items() if k not in gone}, wrong,
                      st.sets(st.sampled_from(FIELDS), max_size=1))  # fmt: skip
    return draw(st.lists(entry, max_size=3) | VALUES)


def one_line(read: Callable[[], object]) -> None:
    """Passes when `read` returns, or refuses in one line."""
    try:
        read()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error)


@pytest.mark.parametrize("task", TASKS)
def test_any_configuration_is_read_or_refused_in_one_line(task: str) -> None:
    cls: type[Config] = TASKS[task].config_class
    keys = st.sampled_from([*cls.model_fields, "nonsense", "vit.depth"])

    @QUICK
    @given(st.dictionaries(keys, VALUES, max_size=4), st.lists(st.tuples(keys, st.text(max_size=10)), max_size=2))
    def check(values: dict[str, Any], flags: list[tuple[str, str]]) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "config.yaml"
            with path.open("w", encoding="utf-8") as file:
                YAML(typ="safe", pure=True).dump(values, file)
            argv = ["--config", str(path), *(f"--set={key}={text}" for key, text in flags)]
            one_line(lambda: parse_command_line("", cls, argv))

    check()


@pytest.mark.parametrize("kind", ["nlvr", "captions", "pairs", "questions", "answers"])
def test_any_annotations_are_read_or_refused_in_one_line(kind: str) -> None:
    @QUICK
    @given(entries())
    def check(content: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "file.json"
            file.write_text(json.dumps(content), encoding="utf-8")
            config = VqaConfig(ann_root=Path(folder), test_file="file", answer_list="file")
            readers: dict[str, Callable[[], object]] = {
                "nlvr": lambda: read_statements(file),
                "captions": lambda: read_captioned(file),
                "pairs": lambda: CaptionPairs([file], folder, eval_transform(8)),
                "questions": lambda: read_test_questions(config),
                "answers": lambda: read_answer_list(config),
            }
            one_line(readers[kind])

    check()


def test_what_the_fuzz_starts_from_is_read() -> None:
    """So that the examples differ from good files in the values that were drawn alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "file.json"
        file.write_text(json.dumps([GOOD]))
        assert len(read_statements(file)) == len(read_captioned(file)) == 1
        assert CaptionConfig(ann_root=Path(folder)).ann_root == Path(folder)
