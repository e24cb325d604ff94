"""Own data: tables of every task reach the same loaders, split without a picture in two splits; a wrong line is named."""

import csv
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from configs.load import load_config, save_config
from configs.table import SPLITS, TablePart
from data.captions import read_captioned
from data.loading import read_entries
from data.nlvr import read_statements
from data.table import read_part
from data.vqa import read_answer_list, read_test_questions
from tasks.registry import TASKS, load_any_config
from tests.runs import run_here
from tests.tiny_run import MODELS, VQA, WORDS
from utils import Run, UserError

SHARES = (0.8, 0.1, 0.1)
NUMBER = 12
ROWS = {
    "caption": lambda i: {"image": f"{i}.png", "caption": "a red star"},
    "vqa": lambda i: {"image": f"{i}.png", "question": "a star ?", "answer": ("red", "star")[i % 2]},
    "nlvr": lambda i: {"image_a": f"{i}.png", "image_b": f"{i}.png", "sentence": "a red star", "label": ("True", "False")[i % 2]},
}
ROWS |= {"retrieval": ROWS["caption"], "retrieval_clip": ROWS["caption"]}


def write(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", encoding="utf-8", newline="") as out:
        if file.suffix == ".jsonl":
            out.writelines(json.dumps(row) + "\n" for row in rows)
        else:
            table = csv.DictWriter(out, list(rows[0]), delimiter="\t" if file.suffix == ".tsv" else ",")
            table.writeheader()
            table.writerows(rows)
    return file


def part(table: Path, split: str = "train", task: str = "caption", shares=SHARES, seed: int = 0) -> TablePart:
    return TablePart(table, split, task, shares, seed)


def refusal(table: Path, task: str = "caption", split: str = "train") -> str:
    with pytest.raises(UserError) as error:
        read_part(part(table, split, task))
    assert "\n" not in str(error.value)
    return str(error.value).removeprefix(f"{table}: ")


def config_of(folder: Path, task: str, suffix: str = "csv", **keys):
    """The config of a tiny model on a table whose pictures lie in `folder`; it names neither files nor folders of data."""
    text = MODELS[task].replace(VQA, "k_test: 2\n").replace("dataset: flickr\n", "")
    (folder / "vocab.txt").write_text("\n".join((*WORDS, "?")) + "\n")
    (folder / "run.yaml").write_text(
        f"task: {task}\ntable: {folder}/data.{suffix}\ntokenizer: {folder}/vocab.txt\noutput_dir: {folder}/out\np: 0\n"
        "image_size: 32\nkeep: instance\nbatch_size_train: 2\nbatch_size_test: 3\nnum_workers: 0\ndevice: cpu\nmax_epoch: 1\n"
        f"{text}"
    )
    return load_any_config(folder / "run.yaml", keys)


def write_pictures(folder: Path) -> None:
    for index in range(NUMBER):
        Image.new("RGB", (32, 32), (index * 20, 9, 200 - index * 10)).save(folder / f"{index}.png")


@pytest.mark.parametrize("task", TASKS)
def test_a_run_of_every_task_trains_on_a_table(task, tmp_path):
    """Its config names the table alone."""
    write_pictures(tmp_path)
    splits = ["train"] * 6 + ["val"] * 3 + ["test"] * 3
    write(tmp_path / "data.csv", [{**ROWS[task](i), "split": split} for i, split in enumerate(splits)])
    config_of(tmp_path, task)
    script = Path(TASKS[task].config_class.script).stem
    run_here(script, ["--config", str(tmp_path / "run.yaml")])
    assert json.loads((tmp_path / "out/result.json").read_text())["metrics"]["test"]
    saved = load_any_config(tmp_path / "out/config.yaml")
    assert saved.table == tmp_path / "data.csv" and saved.train_files == ["train"] and saved.test_file == "test"


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_every_kind_of_table_reaches_the_loaders(task, suffix, tmp_path):
    write_pictures(tmp_path)
    write(tmp_path / f"data.{suffix}", [ROWS[task](i) for i in range(NUMBER)])
    config = config_of(tmp_path, task, suffix, split_shares=[0.5, 0.25, 0.25], evaluate=True)
    loaders = TASKS[task](config, Run(torch.device("cpu"))).loaders()
    names = {"nlvr": "ids", "vqa": "ids"}.get(task, "image_ids")
    assert next(iter(loaders["calibration"]))[names] is not None
    whole = [
        split if isinstance(split, torch.utils.data.DataLoader) else split.images for split in (loaders["val"], loaders["test"])
    ]
    assert [len(loader.dataset) for loader in whole] == [3, 3] and len(loaders["calibration"].dataset) == 6


@pytest.mark.parametrize("task", ["caption", "nlvr"])
def test_no_picture_is_in_two_splits_and_the_shares_are_met(task, tmp_path):
    rows = [ROWS[task](i % 100) for i in range(300)]
    if task == "nlvr":  # some pairs share one picture with another pair
        rows += [{**ROWS[task](i), "image_b": f"{i + 1}.png"} for i in range(0, 100, 4)]
    table = write(tmp_path / "x.csv", rows)
    pictures, numbers = {}, {}
    for split in SPLITS:
        entries = [entry for _, entry in read_part(part(table, split, task, (0.7, 0.2, 0.1)))]
        pictures[split] = {name for entry in entries for name in entry.get("images") or [entry["image"]]}
        numbers[split] = len(entries)
    assert sum(map(len, pictures.values())) == len(set.union(*pictures.values())) == 100 and sum(numbers.values()) == len(rows)
    assert abs(len(pictures["train"]) - 70) <= 1 and abs(len(pictures["val"]) - 20) <= 1


def test_the_drawn_splits_depend_on_the_seed_and_not_on_the_order_of_the_rows(tmp_path):
    rows = [ROWS["caption"](i) for i in range(60)]
    tables = [write(tmp_path / "a.csv", rows), write(tmp_path / "b.csv", rows[::-1])]

    def drawn(table: Path, seed: int) -> set[str]:
        return {entry["image"] for _, entry in read_part(part(table, "test", seed=seed))}

    assert drawn(tables[0], 0) == drawn(tables[1], 0) != drawn(tables[0], 1)


def test_captions_of_a_picture_belong_together(tmp_path):
    rows = [
        {"image": f"{i}.png", "caption": f"{word} star", "split": split} for split, i in (("train", 0), ("val", 1)) for word in "ab"
    ]
    table = write(tmp_path / "x.csv", rows)
    assert [entry["image_id"] for _, entry in read_part(part(table))] == ["0.png", "0.png"]
    assert read_captioned(part(table, "val")) == [{"image": "1.png", "caption": ["a star", "b star"]}]


def test_answers_of_several_annotators_are_joined(tmp_path):
    asked = {"image": "0.png", "question": "what ?", "split": "train"}
    table = write(
        tmp_path / "x.jsonl",
        [asked | {"answer": "red"}, asked | {"answer": ["red", "blue"]}, asked | {"question": "a", "answer": "a"}],
    )
    first, second = (entry for _, entry in read_part(part(table, task="vqa")))
    assert first["answer"] == ["red", "red", "blue"] and first["question_id"] == 1 and second["question_id"] == 3


def test_candidates_are_the_answers_trained_on_and_test_questions_need_none(tmp_path):
    rows = [
        {"image": f"{i}.png", "question": "a", "answer": word, "split": "train"} for i, word in enumerate(("red", "blue", "red"))
    ]
    rows += [
        {"image": "8.png", "question": "a", "answer": "green", "split": "val"},
        {"image": "9.png", "question": "a", "answer": "", "split": "test"},
    ]
    write(tmp_path / "data.csv", rows)
    config = config_of(tmp_path, "vqa")
    assert read_answer_list(config) == ["red", "blue"]
    assert "answer" not in read_test_questions(config)[0] and config.vqa_root == tmp_path


def test_a_list_of_candidates_may_be_named(tmp_path):
    write(tmp_path / "data.csv", [ROWS["vqa"](i) for i in range(NUMBER)])
    (tmp_path / "mine.json").write_text(json.dumps(["green"]))
    assert read_answer_list(config_of(tmp_path, "vqa", answer_list="mine", ann_root=str(tmp_path))) == ["green"]


def test_labels_and_paths_may_be_spelt_as_in_annotation_files(tmp_path):
    rows = [
        {"image_a": "a\\0.png", "image_b": "b.png", "sentence": "a", "label": label, "split": "train"}
        for label in (True, "false", 1)
    ]
    entries = read_statements(part(write(tmp_path / "x.jsonl", rows), task="nlvr"))
    assert [entry["label"] for entry in entries] == ["True", "False", "True"] and entries[0]["images"] == ["a/0.png", "b.png"]


def test_a_quoted_text_may_have_commas_and_lines_and_lines_are_counted_on(tmp_path):
    (tmp_path / "x.csv").write_text('image,caption,split\n0.png,"a, b\nc",train\n\n1.png,,train\n')
    assert refusal(tmp_path / "x.csv") == "line 5 has no 'caption' that is text; correct the line"
    (tmp_path / "x.csv").write_text('image,caption,split\n0.png,"a, b\nc",train\n')
    assert read_part(part(tmp_path / "x.csv"))[0][1]["caption"] == "a, b\nc"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("x.txt", b"", "not a table; set the key 'table' to a file that ends in .csv, .tsv or .jsonl"),
        ("x.csv", b"", "line 1 has no column 'image', only none; name the columns image, caption there"),
        ("x.csv", b"image,text\n", "line 1 has no column 'caption', only image, text; name the columns image, caption there"),
        ("x.csv", b"image,caption\n0.png,a,b\n", "line 2 has 3 cells for 2 columns; quote texts that hold commas"),
        ("x.csv", b"image,caption\n,a\n", "line 2 has no 'image' that is a path; correct the line"),
        ("x.csv", b"image,caption,split\n0.png,a,dev\n", "line 2 has the split 'dev', not train, val, test; correct the line, or"),
        ("x.csv", b"image,caption,split\n0.png,a,val\n", "has no rows of the split 'train'; give it some rows"),
        ("x.csv", b'image,caption\n0.png,"a\n', "not valid CSV ("),
        ("x.csv", b"image,caption\n0.png,\xff\n", "not text in UTF-8; save it as CSV in UTF-8"),
        ("x.jsonl", b'{"image": "0.png", "caption": "a"}\n[1]\n', "line 2 is not a JSON object; write one on each line"),
        ("x.jsonl", b'{"image": "0.png"}\n', "line 1 has no 'caption' that is text; correct the line"),
        ("x.jsonl", b'{"image": "0.png", "caption": []}\n', "line 1 has no 'caption' that is text; correct the line"),
        ("x.jsonl", b'{"image": 3, "caption": "a"}\n', "line 1 has no 'image' that is a path; correct the line"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    assert refusal(tmp_path / name).startswith(said)


def test_a_table_that_is_missing_or_lacks_a_split_says_what_to_do(tmp_path):
    assert refusal(tmp_path / "x.csv") == "No such file or directory; set the key 'table' to a CSV or JSONL file"
    table = write(tmp_path / "x.csv", [ROWS["caption"](0)])
    assert refusal(table, split="test") == "has no rows of the split 'test'; set the key 'split_shares', or add pictures"


def test_a_label_that_is_none_is_named_with_its_line(tmp_path):
    table = write(tmp_path / "x.csv", [ROWS["nlvr"](0) | {"label": "maybe", "split": "train"}])
    with pytest.raises(UserError, match="x.csv: line 2 has the 'label' 'maybe'.*; correct the line"):
        read_statements(part(table, task="nlvr"))


def test_pictures_that_are_trained_on_and_evaluated_are_warned_of(tmp_path, caplog):
    table = write(tmp_path / "x.csv", [ROWS["caption"](0) | {"split": split} for split in SPLITS])
    read_entries(part(table, "test"), lambda entry: None)
    assert "1 pictures are trained on and evaluated, the first 0.png" in caplog.text


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"train_files": ["vqa_train"]}, "its splits are train, val and test, but train_files is ['vqa_train']"),
        ({"val_file": "train"}, "its splits are train, val and test, but val_file is 'train'"),
        ({"split_shares": [0.5, 0.1, 0.1]}, "split_shares must be three numbers from 0 that sum to 1"),
        ({"split_shares": 0.5}, "key 'split_shares' must be a list of numbers, got 0.5"),
    ],
)
def test_keys_that_do_not_fit_a_table_are_refused(tmp_path, keys, said):
    with pytest.raises(UserError) as error:
        config_of(tmp_path, "vqa", **keys)
    assert said in str(error.value)


def test_folders_of_pictures_may_be_set_and_a_saved_config_is_read_again(tmp_path):
    config = config_of(tmp_path, "retrieval", image_root="elsewhere")
    assert config.image_root == Path("elsewhere") and config.train_files == ["train"]
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(type(config), tmp_path / "saved.yaml") == config
