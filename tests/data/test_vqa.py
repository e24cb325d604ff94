"""VQA's files to batches: roots, answers and their weights, the images held out."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs.schema import Augment, VqaConfig
from data.text import load_tokenizer
from data.vqa import (
    AnsweredCollate,
    QuestionCollate,
    VqaDataset,
    build_datasets,
    encode_answers,
    held_out,
    read_answer_list,
)
from transform.images import eval_transform, train_transform
from utils import UserError

SIZE = 16
COCO = "val2014/COCO_val2014_000000000042.jpg"
TEN = ["red"] * 4 + ["a dog"] * 5 + ["Red"]
ASKED = {"question_id": 7, "question": 'What "is" it?', "answer": TEN, "image": "a.png", "dataset": "vqa"}
OF_VG = {"question_id": 7, "question": "what is left", "answer": "the dog", "image": "a.png", "dataset": "vg"}
WITHOUT_ANSWER = {key: value for key, value in ASKED.items() if key != "answer"}


def entries(number: int, **change: Any) -> list[dict]:
    return [{**ASKED, "question_id": index, "image": f"{index}.png", **change} for index in range(number)]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A picture white on the right half: VQA's black on the left, Visual Genome's grey; files of annotations."""
    for folder, grey in (("coco", 0), ("genome", 100)):
        (tmp_path / folder).mkdir()
        picture = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
        picture.paste((grey,) * 3, (0, 0, SIZE // 2, SIZE))
        for name in ("a.png", *(f"{index}.png" for index in range(200))):
            picture.save(tmp_path / folder / name)
    files = {"train": entries(200), "more": [OF_VG, *entries(200, dataset="vg", answer="red")], "val": [ASKED]}
    for name, content in {**files, "test": [WITHOUT_ANSWER], "answer_list": ["red", "a dog"]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a the dog is red what it left ?".split()))
    return tmp_path


def dataset_of(world: Path, *shown: dict, answers: str = "weighted") -> VqaDataset:
    return VqaDataset(list(shown), world / "coco", world / "genome", eval_transform(SIZE), answers)


def config_of(world: Path, **settings: Any) -> VqaConfig:
    roots = {"vqa_root": world / "coco", "vg_root": world / "genome", "ann_root": world}
    files = {"train_files": ["train", "more"], "val_file": "val", "test_file": "test"}
    return VqaConfig(**{**roots, **files, "image_size": SIZE, "calibration_size": 8, **settings})


def left(picture: torch.Tensor) -> float:
    return float(picture[0, 0, 0])


def test_training_weighs_each_answer_by_its_share(world: Path) -> None:
    item = dataset_of(world, ASKED)[0]
    assert item["question"] == "what is it?" and item["id"] == 7
    assert item["answers"] == ["red", "a dog", "Red"]
    assert item["weights"] == pytest.approx([0.4, 0.5, 0.1])


def test_an_answer_of_visual_genome_weighs_as_published(world: Path) -> None:
    item = dataset_of(world, OF_VG)[0]
    assert item["answers"] == ["the dog"] and item["weights"] == [0.2]


def test_calibration_takes_the_likeliest_answer_and_evaluation_all(world: Path) -> None:
    even = {**ASKED, "answer": ["it", "red", "red", "it"]}
    likeliest = [dataset_of(world, entry, answers="likeliest")[0] for entry in (ASKED, OF_VG, even)]
    assert [(item["answers"], item["weights"]) for item in likeliest] == [(["a dog"], [1]), (["the dog"], [1]), (["it"], [1])]
    given = dataset_of(world, ASKED, WITHOUT_ANSWER, answers="given")
    assert [item["answers"] for item in given] == [TEN, None] and "weights" not in given[0]


def test_pictures_come_from_the_folder_of_their_data_set(world: Path) -> None:
    dataset = dataset_of(world, ASKED, OF_VG)
    assert left(dataset[0]["image"]) < left(dataset[1]["image"]) < 1
    (world / "genome/a.png").unlink()
    with pytest.raises(UserError, match="genome/a.png: no such picture; set the key 'vg_root'"):
        dataset[1]
    with pytest.raises(UserError, match="genome/a.png: no such picture; set the key 'vg_root'"):
        dataset_of(world, *entries(9), OF_VG)
    (world / "coco/a.png").write_bytes(b"not a picture")
    with pytest.raises(UserError, match="coco/a.png: not a readable picture"):
        dataset[0]


@pytest.mark.parametrize(("entry", "may"), [(ASKED, True), (OF_VG, False), ({**ASKED, "answer": ["red"] * 9 + ["left"]}, False)])
def test_a_question_or_answer_that_names_a_side_keeps_its_picture_as_it_is(world: Path, entry: dict, may: bool) -> None:
    transform = train_transform(SIZE, Augment(crop_scale=(1, 1), flip=True, randaugment=False))
    dataset = VqaDataset([entry], world / "coco", world / "genome", transform, "weighted")
    mirrored = [left(dataset[0]["image"]) > 1 for _ in range(30)]
    assert any(mirrored) == may and not all(mirrored)


def test_batches_have_the_documented_shapes(world: Path) -> None:
    tokenizer = load_tokenizer(world)
    dec, enc = 14, 15
    dataset = dataset_of(world, ASKED, OF_VG)
    batch = AnsweredCollate(tokenizer)([dataset[0], dataset[1]])
    assert batch["images"].shape == (2, 3, SIZE, SIZE) and batch["ids"] == [7, 7]
    assert batch["question_ids"].tolist() == [[enc, 10, 8, 11, 13, 3], [enc, 10, 8, 12, 3, 0]]
    assert batch["question_mask"].sum(1).tolist() == [6, 5]
    assert batch["answer_ids"].tolist() == [[dec, 9, 3, 0], [dec, 5, 7, 3], [dec, 9, 3, 0], [dec, 6, 7, 3]]
    assert batch["answer_mask"].sum(1).tolist() == [3, 4, 3, 4]
    assert batch["answer_counts"].tolist() == [3, 1]
    assert batch["answer_weights"].tolist() == pytest.approx([0.4, 0.5, 0.1, 0.2])
    given = dataset_of(world, ASKED, WITHOUT_ANSWER, answers="given")
    evaluated = QuestionCollate(tokenizer)([given[0], given[1]])
    assert evaluated.keys() == {"images", "question_ids", "question_mask", "ids", "answers"}
    assert evaluated["answers"] == [TEN, None] and torch.equal(evaluated["images"][0], batch["images"][0])


def test_long_questions_are_cut(world: Path) -> None:
    long = dataset_of(world, {**ASKED, "question": " ".join(["dog"] * 60)}, answers="given")[0]
    assert long["question"] == " ".join(["dog"] * 50)
    batch = QuestionCollate(load_tokenizer(world))([long])
    assert batch["question_ids"].shape == (1, 35) and batch["question_ids"][0, -1] == 3
    assert encode_answers(load_tokenizer(world), ["red red red"], 4)["input_ids"].tolist() == [[14, 9, 9, 3]]
    read = AnsweredCollate(load_tokenizer(world), positions=6)([{**long, "answers": ["red " * 9], "weights": [1.0]}])
    assert read["question_ids"].shape[1] == read["answer_ids"].shape[1] == 6  # a model with fewer positions


def test_all_questions_about_an_image_fall_on_one_side() -> None:
    kept, held = held_out(entries(5000) + entries(5000, dataset="vg"), share=0.1)
    sides = [{entry["image"] for entry in part} for part in (kept, held)]
    assert len(kept) + len(held) == 10000 and len(sides[0] | sides[1]) == 5000 and not sides[0] & sides[1]
    assert len(sides[1]) / 5000 == pytest.approx(0.1, abs=0.015)


def test_a_larger_share_holds_out_the_same_images_and_more() -> None:
    few, more = ({entry["image"] for entry in held_out(entries(2000), share)[1]} for share in (0.02, 0.1))
    assert few < more


def test_what_is_held_out_never_changes() -> None:
    # Of 0.png to 149.png, those whose SHA-256 begins with less than 2 % of ffff, by the command sha256sum.
    assert [entry["image"] for entry in held_out(entries(150))[1]] == ["68.png", "124.png"]


def test_a_picture_of_coco_is_known_by_its_id_and_others_by_their_path() -> None:
    def side(image: str) -> float:
        """Returns the smallest share, in percent, that holds the image out."""
        return next(percent for percent in range(101) if held_out([{"image": image}], percent / 100)[1])

    assert side(COCO) == side("000000000042.jpg") == side("VG_100K/000000000042.png")
    numbered = {side(f"VG_100K/{number}.jpg") for number in range(42, 48)} | {side("VG_100K_2/42.jpg")}
    assert len(numbered) == 7 and side(COCO) not in numbered


def test_a_config_becomes_its_datasets(world: Path) -> None:
    datasets = build_datasets(config_of(world))
    assert {name: len(dataset) for name, dataset in datasets.items()} == {"train": 401, "calibration": 8, "val": 1, "test": 1}
    assert datasets["val"][0]["answers"] == TEN and datasets["test"][0]["answers"] is None
    assert datasets["calibration"][0]["weights"] == [1] and len(datasets["train"][0]["weights"]) == 3
    assert all(torch.equal(datasets["calibration"][0]["image"], datasets["calibration"][0]["image"]) for _ in range(5))


def test_pictures_may_be_blanked(world: Path) -> None:
    assert build_datasets(config_of(world))["train"][0]["image"].any()
    assert not any(dataset[0]["image"].any() for dataset in build_datasets(config_of(world, text_only=True)).values())


def test_without_a_validation_file_some_images_are_never_trained_on(world: Path) -> None:
    datasets = build_datasets(config_of(world, val_file=""))
    kept, held = held_out(entries(200))
    assert [entry["image"] for entry in datasets["val"].entries] == [entry["image"] for entry in held]
    assert all(entry["dataset"] == "vqa" for entry in datasets["val"].entries)
    trained = {
        entry["image"] for name in ("train", "calibration") for entry in getattr(datasets[name], "dataset", datasets[name]).entries
    }
    assert trained == {"a.png", *(entry["image"] for entry in kept)}
    assert datasets["val"][0]["answers"] == TEN


def test_nothing_to_select_by_is_the_users_to_mend(world: Path) -> None:
    with pytest.raises(UserError, match=r"\Amore: too few images to hold 2% of them out for selection; set the key 'val_file'\Z"):
        build_datasets(config_of(world, train_files=["more"], val_file=""))
    with pytest.raises(UserError, match="val_file: train.json is among the train_files; leave it empty"):
        build_datasets(config_of(world, val_file="train.json"))


def test_what_is_trained_on_is_no_test(world: Path) -> None:
    with pytest.raises(UserError, match="test_file: train is among the train_files"):
        build_datasets(config_of(world, train_files=["train"], test_file="train"))
    build_datasets(config_of(world, train_files=["train"], test_file="train", evaluate=True))


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("train", {"question": None}, "has no 'question' that is text"),
        ("train", {"question_id": None}, "has no 'question_id' that is text or a whole number"),
        ("train", {"image": ""}, "has no 'image' that is a path"),
        ("train", {"dataset": "gqa"}, "has the 'dataset' 'gqa', not 'vqa' or 'vg'"),
        ("train", {"answer": None}, "has no 'answer' that is a list of texts"),
        ("train", {"answer": []}, "has no 'answer' that is a list of texts"),
        ("train", {"answer": "red"}, "has no 'answer' that is a list of texts"),
        ("train", {"answer": [5] * 10}, "has no 'answer' that is a list of texts"),
        ("train", {"dataset": "vg"}, "has no 'answer' that is text, as one of 'vg' has"),
        ("val", {"answer": None}, "has no 'answer' that is a list of texts"),
        ("val", {"dataset": "vg", "answer": "red"}, "has the 'dataset' 'vg', not 'vqa'"),
        ("test", {"answer": "red"}, "has no 'answer' that is a list of texts"),
    ],
)
def test_a_foreign_entry_is_named(world: Path, file: str, change: dict, message: str) -> None:
    (world / f"{file}.json").write_text(json.dumps([ASKED, {**ASKED, **change}]))
    with pytest.raises(UserError, match=rf"\A{world}/{file}.json: entry 1 {message}; write the file again\Z"):
        build_datasets(config_of(world))


def test_an_entry_may_leave_out_its_data_set_and_give_answers_as_objects(world: Path) -> None:
    official = {**ASKED, "image": "a.png", "answer": [{"answer": text, "answer_id": place} for place, text in enumerate(TEN)]}
    del official["dataset"]
    (world / "val.json").write_text(json.dumps([official]))
    assert build_datasets(config_of(world))["val"].entries == [ASKED]


@pytest.mark.parametrize("file", ["val", "test"])
@pytest.mark.parametrize("again", [7, "7"])
def test_a_question_id_that_is_not_the_only_one_is_named(world: Path, file: str, again: int | str) -> None:
    (world / f"{file}.json").write_text(json.dumps([ASKED, {**ASKED, "question_id": 8}, {**ASKED, "question_id": again}]))
    with pytest.raises(UserError, match=rf"\A{file}: the questions 0 and 2 share the question_id {again!r}; give each its own\Z"):
        build_datasets(config_of(world))


def test_questions_with_few_answers_are_counted_in_the_log(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "madtp")
    build_datasets(config_of(world))
    assert not caplog.messages
    (world / "val.json").write_text(json.dumps([{**ASKED, "answer": ["red"]}, {**ASKED, "question_id": 8}]))
    build_datasets(config_of(world))
    assert caplog.messages == ["val: 1 of 2 questions have fewer than 10 answers; docs/data.md says how they are scored"]


def test_the_answer_list_is_read_and_a_foreign_one_named(world: Path) -> None:
    assert read_answer_list(config_of(world)) == ["red", "a dog"]
    for content in ("{}", "[]", '["red", 5]', '["red", ""]'):
        (world / "answer_list.json").write_text(content)
        with pytest.raises(
            UserError, match="answer_list.json: must be a list of texts, and not empty; set the key 'answer_list'"
        ):
            read_answer_list(config_of(world))
    with pytest.raises(UserError, match="none.json: No such file"):
        read_answer_list(config_of(world, answer_list="none"))
