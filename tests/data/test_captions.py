"""Files of pictures with captions to batches for retrieval."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from configs.schema import Augment, Config
from data.captions import (
    CaptionImages,
    CaptionPairs,
    CaptionTexts,
    PairCollate,
    TextCollate,
    build_datasets,
    collate_images,
    read_captioned,
    read_coco_truth,
)
from data.text import load_tokenizer
from transform.images import eval_transform, train_transform
from utils import UserError

SIZE = 8
PICTURES = [f"single/{index}.png" for index in range(4)]
TRAIN = [
    {"image": PICTURES[0], "caption": 'A "red" dog.', "image_id": "coco_7"},
    {"image": PICTURES[1], "caption": "dog left of the dog", "image_id": "coco_3"},
    {"image": PICTURES[0], "caption": "the dog is red", "image_id": "coco_7"},
]
MORE = [
    {"image": PICTURES[2], "caption": "...", "image_id": 3},
    {"image": PICTURES[1], "caption": "the dog", "image_id": "coco_3"},
]
TEST = [{"image": PICTURES[1], "caption": ["A dog!", "red"]}, {"image": PICTURES[3], "caption": ["the dog is red"]}]


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """Four pictures, white on the right half and of a brightness of their own on the left, with two training files."""
    (tmp_path / "single").mkdir()
    for index, name in enumerate(PICTURES):
        picture = Image.new("RGB", (SIZE, SIZE), (255, 255, 255))
        picture.paste((50 * index,) * 3, (0, 0, SIZE // 2, SIZE))
        picture.save(tmp_path / name)
    for name, entries in (("train", TRAIN), ("more", MORE), ("val", TEST), ("test", TEST)):
        (tmp_path / f"{name}.json").write_text(json.dumps(entries))
    (tmp_path / "vocab.txt").write_text("\n".join("[PAD] [UNK] [CLS] [SEP] [MASK] a the dog is red".split()))
    return tmp_path


def pairs_of(world: Path, *files: str, **settings: Any) -> CaptionPairs:
    return CaptionPairs([world / f"{file}.json" for file in files], world, eval_transform(SIZE), **settings)


def picture(world: Path, index: int) -> torch.Tensor:
    return eval_transform(SIZE)(Image.open(world / PICTURES[index]))


def test_captions_of_one_picture_share_its_number_across_files(world: Path) -> None:
    pairs = pairs_of(world, "train", "more")
    items = [pairs[index] for index in range(len(pairs))]
    assert [item["image_id"] for item in items] == [0, 1, 0, 2, 1]
    assert [item["caption"] for item in items] == ["a red dog", "dog left of the dog", "the dog is red", "", "the dog"]
    assert torch.equal(items[3]["image"], picture(world, 2))


def test_a_caption_is_cut_and_gets_its_prompt(world: Path) -> None:
    pairs = pairs_of(world, "train", prompt="a picture of ")
    pairs.entries[2] = {**pairs.entries[2], "caption": "dog " * 40}
    assert pairs[2]["caption"] == "a picture of" + " dog" * 30


def test_a_caption_that_names_a_side_keeps_its_picture_as_it_is(world: Path) -> None:
    transform = train_transform(SIZE, Augment(crop_scale=(1, 1), flip=True, randaugment=False))
    pairs = CaptionPairs([world / "train.json"], world, transform)
    mirrored = [[bool(pairs[index]["image"][0, 0, 0] > 1) for _ in range(30)] for index in (0, 1)]
    assert any(mirrored[0]) and not all(mirrored[0]) and not any(mirrored[1])


def test_an_evaluation_file_becomes_pictures_and_captions(world: Path) -> None:
    entries = read_captioned(world / "test.json")
    images, texts = CaptionImages(entries, world, eval_transform(SIZE)), CaptionTexts(entries)
    assert [images[index]["id"] for index in range(len(images))] == [PICTURES[1], PICTURES[3]]
    assert torch.equal(images[1]["image"], picture(world, 3))
    assert [texts[index] for index in range(len(texts))] == [
        {"caption": "a dog"},
        {"caption": "red"},
        {"caption": "the dog is red"},
    ]
    assert texts.image_of_text == [0, 0, 1]


def test_entries_of_one_picture_are_grouped_and_the_log_says_so(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "madtp")
    single = [{"image": entry["image"], "caption": [caption]} for entry in TEST for caption in entry["caption"]]
    (world / "val.json").write_text(json.dumps([single[0], single[2], single[1]]))
    assert read_captioned(world / "val.json") == TEST
    assert caplog.messages == [f"{world}/val.json: 3 entries of 2 images, grouped by image"]
    assert read_captioned(world / "test.json") == TEST and len(caplog.messages) == 1


def test_one_id_for_two_pictures_is_named_also_across_files(world: Path) -> None:
    (world / "more.json").write_text(json.dumps([MORE[0], {**MORE[1], "image_id": "coco_7"}]))
    said = f"entry 1 has the image_id 'coco_7' of another image, {PICTURES[0]}; give each image its own"
    with pytest.raises(UserError, match=rf"\A{world}/more.json: {said}\Z"):
        pairs_of(world, "train", "more")


def test_a_picture_under_two_ids_is_no_negative_of_itself(world: Path) -> None:
    (world / "more.json").write_text(json.dumps([MORE[0], {**MORE[1], "image_id": 11}]))
    assert pairs_of(world, "train", "more").image_ids == [0, 1, 0, 2, 1]


def test_batches_have_the_documented_shapes(world: Path) -> None:
    tokenizer, pairs = load_tokenizer(world), pairs_of(world, "train", "more")
    batch = PairCollate(tokenizer, 35)([pairs[0], pairs[3]])
    assert batch.keys() == {"image", "input_ids", "attention_mask", "image_ids"}
    assert batch["image"].shape == (2, 3, SIZE, SIZE)
    assert batch["input_ids"].tolist() == [[2, 5, 9, 7, 3], [2, 3, 0, 0, 0]]
    assert batch["attention_mask"].sum(1).tolist() == [5, 2]
    assert batch["image_ids"].tolist() == [0, 2] and batch["image_ids"].dtype == torch.long
    entries = read_captioned(world / "test.json")
    texts, images = CaptionTexts(entries), CaptionImages(entries, world, eval_transform(SIZE))
    batch = TextCollate(tokenizer, 4)([texts[1], texts[2]])
    assert batch["input_ids"].tolist() == [[2, 9, 3, 0], [2, 6, 7, 3]]
    batch = collate_images([images[0], images[1]])
    assert batch["image"].shape == (2, 3, SIZE, SIZE) and batch["ids"] == [PICTURES[1], PICTURES[3]]


def test_a_first_token_replaces_the_tokenizers(world: Path) -> None:
    batch = TextCollate(load_tokenizer(world), 35, first_token_id=11)([{"caption": "dog"}])
    assert batch["input_ids"].tolist() == [[11, 7, 3]]


def test_a_config_becomes_its_datasets(world: Path) -> None:
    files = {"train_files": ["train", "more"], "val_file": "val", "test_file": "test"}
    config = Config(image_root=world, ann_root=world, image_size=16, calibration_size=3, **files)
    datasets = build_datasets(config)
    assert {name: len(datasets[name]) for name in ("train", "calibration")} == {"train": 5, "calibration": 3}
    assert [len(part) for part in datasets["val"] + datasets["test"]] == [2, 3, 2, 3]
    assert datasets["train"][0]["image"].shape == (3, 16, 16) and datasets["train"][0]["image"].any()
    assert all(torch.equal(datasets["calibration"][0]["image"], datasets["calibration"][0]["image"]) for _ in range(5))


def test_pictures_may_be_blanked(world: Path) -> None:
    files = {"train_files": ["train"], "val_file": "val", "test_file": "test"}
    datasets = build_datasets(Config(image_root=world, ann_root=world, image_size=16, text_only=True, **files))
    assert not any(part[0]["image"].any() for part in (datasets["train"], datasets["calibration"], datasets["test"][0]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": 5}, "entry 1 has no 'caption' that is text"),
        ({"caption": ["a dog"]}, "entry 1 has no 'caption' that is text"),
        ({"image_id": None}, "entry 1 has no 'image_id' that is text or a whole number"),
        ({"image": 3}, "entry 1 has no 'image' that is a path"),
        ({"image": ""}, "entry 1 has no 'image' that is a path"),
    ],
)
def test_a_foreign_training_entry_is_named(world: Path, change: dict, message: str) -> None:
    (world / "train.json").write_text(json.dumps([TRAIN[0], {**TRAIN[1], **change}]))
    with pytest.raises(UserError, match=rf"\A{world}/train.json: {message}.*; write the file again\Z"):
        pairs_of(world, "train")


@pytest.mark.parametrize("caption", ["a dog", [], ["a dog", 5], None])
def test_a_foreign_evaluation_entry_is_named(world: Path, caption: object) -> None:
    (world / "val.json").write_text(json.dumps([TEST[0], {**TEST[1], "caption": caption}]))
    with pytest.raises(UserError, match=r"val.json: entry 1 has no 'caption' that is a list of texts"):
        read_captioned(world / "val.json")


@pytest.mark.parametrize("content", ["{}", "[]", '[["a dog"]]', '[{"image": "a.png", "cap'])
def test_a_file_of_another_form_is_named(world: Path, content: str) -> None:
    (world / "val.json").write_text(content)
    with pytest.raises(UserError, match=r"val.json: (must be a list|entry 0 is not an object|not valid JSON at line 1)"):
        read_captioned(world / "val.json")


def test_missing_and_broken_pictures_are_named(world: Path) -> None:
    (world / PICTURES[2]).write_bytes(b"not a picture")
    pairs = pairs_of(world, "train", "more")
    with pytest.raises(UserError, match="2.png: not a readable picture"):
        pairs[3]
    (world / PICTURES[3]).unlink()
    with pytest.raises(UserError, match="3.png: no such picture; set the key 'image_root'"):
        CaptionImages(read_captioned(world / "val.json"), world, eval_transform(SIZE))
    with pytest.raises(UserError, match="0.png: no such picture; set the key 'image_root'"):
        CaptionPairs([world / "train.json"], world / "nowhere", eval_transform(SIZE))
    with pytest.raises(UserError, match="none.json: No such file"):
        read_captioned(world / "none.json")


def test_cocos_ground_truth_takes_the_place_of_the_captions(world: Path) -> None:
    names = ["val2014/COCO_val2014_000000000042.jpg", "val2014/COCO_val2014_000000000007.jpg"]
    annotations = [{"image_id": 7, "caption": "a"}, {"image_id": 42, "caption": "b"}, {"image_id": 7, "caption": "c"}]
    (world / "x_gt.json").write_text(json.dumps({"images": [], "annotations": annotations}))
    assert read_coco_truth(world / "x_gt.json", names) == {names[0]: ["b"], names[1]: ["a", "c"]}
    with pytest.raises(UserError, match="has no captions of 3.jpg and 0 other images; is it of another split"):
        read_coco_truth(world / "x_gt.json", [*names, "3.jpg"])


@pytest.mark.parametrize(
    ("content", "message"),
    [([], "has no list 'annotations'"), ({"annotations": [{"image_id": 1}]}, "annotation 0 has no 'image_id' or no 'caption'")],
)
def test_foreign_ground_truth_is_named(world: Path, content: object, message: str) -> None:
    (world / "x_gt.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        read_coco_truth(world / "x_gt.json", [])
