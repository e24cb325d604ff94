"""Files of others: recognised and named, or read though they are spelt otherwise."""

import json
from pathlib import Path

import pytest

from data.captions import read_captioned
from data.loading import check_images, read_entries, read_json
from data.nlvr import read_statements
from utils import UserError

STATEMENT = {"sentence": "a", "label": "True", "images": ["l.png", "r.png"]}
FOREIGN = {
    "VQA's official questions": {"info": {}, "questions": [{"image_id": 1, "question": "?", "question_id": 1}]},
    "VQA's official annotations": {"info": {}, "annotations": [{"answers": [], "image_id": 1}]},
    "COCO's own annotations": {"info": {}, "images": [{"id": 1}], "annotations": [{"image_id": 1, "caption": "a"}]},
    "Karpathy's split file": {"images": [{"sentences": [], "split": "train"}], "dataset": "coco"},
    "Visual Genome's own questions": [{"id": 1, "qas": [{"question": "?", "answer": "a"}]}],
    "NLVR2's own statements": [{"identifier": "dev-0-0-0", "sentence": "a", "label": "True"}],
}


def write(folder: Path, content: object) -> Path:
    (folder / "x.json").write_text(json.dumps(content))
    return folder / "x.json"


@pytest.mark.parametrize("name", FOREIGN)
def test_the_original_files_are_named_and_to_be_converted(tmp_path, name):
    with pytest.raises(UserError, match=f"x.json: is in the format of {name}.*; convert it to BLIP's .* docs/data.md"):
        read_entries(write(tmp_path, FOREIGN[name]), lambda entry: "has no 'image' that is a path")


def test_a_file_of_an_object_per_line_is_not_called_cut_off(tmp_path):
    (tmp_path / "dev.json").write_text("\n".join(json.dumps(FOREIGN["NLVR2's own statements"][0]) for _ in range(3)))
    with pytest.raises(UserError, match=r"dev.json: has an object on each line \(JSONL, .*; convert it to BLIP's annot"):
        read_statements(tmp_path / "dev.json")
    (tmp_path / "dev.json").write_text('{"a": 1}\n{"a"')
    with pytest.raises(UserError, match="not valid JSON at line 2"):
        read_json(tmp_path / "dev.json")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_json_is_read_in_any_unicode_encoding(tmp_path, encoding):
    (tmp_path / "x.json").write_text('["größer"]', encoding=encoding)
    assert read_json(tmp_path / "x.json") == ["größer"]


@pytest.mark.parametrize(
    ("label", "read"),
    [(True, "True"), (False, "False"), (1, "True"), (0, "False"), ("true", "True"), ("False", "False"), ("0", "False")],
)
def test_labels_are_read_in_any_spelling(tmp_path, label, read):
    assert read_statements(write(tmp_path, [{**STATEMENT, "label": label}]))[0]["label"] == read


@pytest.mark.parametrize("label", [2, "yes", None, [], ["True"], 0.5])
def test_what_is_no_label_is_refused(tmp_path, label):
    with pytest.raises(UserError, match='entry 0 has the \'label\' .*, not "True" or "False"'):
        read_statements(write(tmp_path, [{**STATEMENT, "label": label}]))


def test_paths_may_have_the_slashes_of_windows(tmp_path):
    statement = read_statements(write(tmp_path, [{**STATEMENT, "images": ["train\\1\\l.png", "train/1/r.png"]}]))[0]
    assert statement["images"] == ["train/1/l.png", "train/1/r.png"]
    assert read_captioned(write(tmp_path, [{"image": "val\\a.png", "caption": ["a"]}]))[0]["image"] == "val/a.png"


def test_a_picture_that_differs_only_in_case_is_named(tmp_path):
    (tmp_path / "a.JPG").touch()
    with pytest.raises(UserError, match="a.jpg: no such picture, but a.JPG is there; rename the file, or correct the annotations"):
        check_images(tmp_path, ["a.jpg"])
