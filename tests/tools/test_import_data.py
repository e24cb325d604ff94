"""Official annotation files, in miniature, become those that the loaders read; what is wrong with one is said in one line."""

import json
from pathlib import Path

import pytest

from configs.schema import VqaConfig
from data.captions import CaptionPairs, read_captioned
from data.nlvr import NlvrDataset, read_statements
from data.vqa import build_datasets, read_answer_list
from tests.data.test_table import write_pictures
from tools import import_data
from transform.images import eval_transform
from utils import UserError

COCO = {
    "info": {"year": 2014},
    "images": [
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg"},
        {"id": 25, "file_name": "COCO_train2014_000000000025.jpg"},
    ],
    "licenses": [],
    "annotations": [
        {"image_id": 25, "id": 1, "caption": "A giraffe."},
        {"image_id": 9, "id": 2, "caption": "A plate."},
        {"image_id": 25, "id": 3, "caption": "Two giraffes."},
    ],
}
KARPATHY = {
    "dataset": "coco",
    "images": [
        {
            "filepath": folder, "filename": f"COCO_{folder}_{number:012d}.jpg", "split": split, "imgid": number, "cocoid": number,
            "sentids": [1, 2],
            "sentences": [{"tokens": ["a"], "raw": f"A {word} {number}.", "imgid": 0, "sentid": 1} for word in ("cat", "dog")],
        }
        for number, (folder, split) in enumerate(
            [("train2014", "train"), ("val2014", "restval"), ("val2014", "val"), ("val2014", "test")], start=1
        )
    ],
}  # fmt: skip
FLICKR = {
    "dataset": "flickr30k",
    "images": [
        {
            "filename": f"{number}.jpg",
            "split": split,
            "imgid": number,
            "sentids": [1],
            "sentences": [{"raw": "A man .", "tokens": []}],
        }
        for number, split in enumerate(("train", "val", "test"))
    ],
}


def vqa(subset: str, numbers: range, answered: bool = True) -> dict[str, dict]:
    """The two official files of a subset of VQA."""
    shared = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": subset}
    questions = [{"image_id": number // 2, "question": "Is it red?", "question_id": number} for number in numbers]
    annotations = [
        {
            "question_type": "is it", "multiple_choice_answer": "yes" if number % 3 else "no", "answer_type": "yes/no",
            "image_id": number // 2, "question_id": number,
            "answers": [{"answer": "yes", "answer_confidence": "maybe", "answer_id": place} for place in range(1, 11)],
        }
        for number in numbers
    ]  # fmt: skip
    files = {f"v2_OpenEnded_mscoco_{subset}_questions": {**shared, "task_type": "Open-Ended", "questions": questions}}
    return files | ({f"v2_mscoco_{subset}_annotations": {**shared, "annotations": annotations}} if answered else {})


def nlvr(split: str, **more: object) -> dict:
    return {
        "sentence": "There is a dog in the left image.", "label": "True", "identifier": f"{split}-3-1-0", "left_url": "http://x/a.png",
        "right_url": "http://x/b.png", "synset": "dog", "query": "dogs", **more,
    }  # fmt: skip


def write(folder: Path, content: dict[str, object]) -> list[Path]:
    for name, value in content.items():
        lines = isinstance(value, list)
        text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value)
        (folder / f"{name}.json").write_text(text + "\n" * lines)
    return [folder / f"{name}.json" for name in content]


@pytest.fixture
def imported(monkeypatch, capsys, tmp_path):
    """(kind, files, flags) -> the lines that are printed; the annotation files lie in `out`."""

    def run(kind: str, files: list[Path], *flags: object) -> list[str]:
        argv = ["--from", kind, "--files", *files, "--out", tmp_path / "out", *flags]
        monkeypatch.setattr("sys.argv", ["import_data.py", *map(str, argv)])
        import_data.main()
        return capsys.readouterr().out.replace(f"{tmp_path}/out/", "").splitlines()

    return run


def pictures(folder: Path, *names: str) -> Path:
    write_pictures(folder)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes((folder / "0.png").read_bytes())
    return folder


def test_cocos_captions_become_pairs_and_groups(imported, tmp_path):
    validation = {
        **COCO,
        "images": [{**image, "file_name": image["file_name"].replace("train", "val")} for image in COCO["images"]],
    }
    images = pictures(tmp_path, *(f"{s}2014/COCO_{s}2014_{n:012d}.jpg" for s in ("train", "val") for n in (9, 25)))
    files = write(tmp_path, {"captions_train2014": COCO, "captions_val2014": validation})
    said = imported("coco", files, "--images", images)
    assert said == ["coco_train.json: 3 entries, 2 pictures", "coco_val.json: 2 entries, 2 pictures"]
    pairs = CaptionPairs([tmp_path / "out/coco_train.json"], images, eval_transform(32))
    assert [(pair["caption"], pair["image_id"]) for pair in pairs] == [("a plate", 0), ("a giraffe", 1), ("two giraffes", 1)]
    grouped = read_captioned(tmp_path / "out/coco_val.json")
    assert {entry["image"]: entry["caption"] for entry in grouped} == {
        "val2014/COCO_val2014_000000000009.jpg": ["A plate."],
        "val2014/COCO_val2014_000000000025.jpg": ["A giraffe.", "Two giraffes."],
    }


def test_karpathys_splits_are_blips(imported, tmp_path):
    """restval is trained on, and image ids are those of BLIP's files."""
    said = imported("karpathy", write(tmp_path, {"dataset_coco": KARPATHY}))
    assert said == [
        "coco_karpathy_train.json: 4 entries, 2 pictures",
        "coco_karpathy_val.json: 1 entries, 1 pictures",
        "coco_karpathy_test.json: 1 entries, 1 pictures",
    ]
    train = json.loads((tmp_path / "out/coco_karpathy_train.json").read_text())
    second = {"image": "val2014/COCO_val2014_000000000002.jpg", "caption": "A cat 2.", "image_id": "coco_2"}
    assert train[2] == second
    held = {"image": "val2014/COCO_val2014_000000000004.jpg", "caption": ["A cat 4.", "A dog 4."]}
    assert read_captioned(tmp_path / "out/coco_karpathy_test.json") == [held]


def test_flickrs_pictures_lie_in_its_folder(imported, tmp_path):
    said = imported("karpathy", write(tmp_path, {"dataset_flickr30k": FLICKR}))
    assert said == [f"flickr30k_{split}.json: 1 entries, 1 pictures" for split in ("train", "val", "test")]
    assert json.loads((tmp_path / "out/flickr30k_train.json").read_text())[0]["image"] == "flickr30k-images/0.jpg"


def test_vqas_questions_meet_their_answers(imported, tmp_path):
    files = write(tmp_path, vqa("train2014", range(20)) | vqa("val2014", range(20, 26)) | vqa("test2015", range(26, 30), False))
    names = [f"{s}/COCO_{s}_{n:012d}.jpg" for s, r in (("train2014", range(10)), ("val2014", range(10, 13))) for n in r]
    names += [f"test2015/COCO_test2015_{n:012d}.jpg" for n in (13, 14)]
    images = pictures(tmp_path, *names)
    said = imported("vqa", files[::-1], "--images", images)
    assert sorted(said) == [
        "answer_list.json: 2 entries",
        "vqa_test.json: 4 entries, 2 pictures",
        "vqa_train.json: 20 entries, 10 pictures",
        "vqa_val.json: 6 entries, 3 pictures",
    ]
    first = json.loads((tmp_path / "out/vqa_train.json").read_text())[0]
    assert first == {
        "question_id": 0, "question": "Is it red?", "dataset": "vqa", "image": "train2014/COCO_train2014_000000000000.jpg",
        "answer": ["yes"] * 10,
    }  # fmt: skip
    files = {
        "train_files": ["vqa_train"],
        "val_file": "vqa_val",
        "ann_root": tmp_path / "out",
        "vqa_root": images,
        "image_size": 32,
    }
    config = VqaConfig(**files, vit={"patch_size": 8, "embed_dim": 8, "depth": 2, "num_heads": 2})
    assert [len(dataset) for dataset in build_datasets(config).values()] == [20, 20, 6, 4]
    assert read_answer_list(config) == ["yes", "no"]  # of 17 questions and of 9


def test_nlvrs_statements_name_their_pictures(imported, tmp_path):
    content = {"train": [nlvr("train", directory=34)], "dev": [nlvr("dev", validation={"1": "True"})], "test1": [nlvr("test1")]}
    images = pictures(
        tmp_path, *(f"images/train/34/train-3-1-img{n}.png" for n in (0, 1)), *(f"dev/dev-3-1-img{n}.png" for n in (0, 1))
    )
    pictures(images, *(f"images/test1/test1-3-1-img{n}.png" for n in (0, 1)))
    said = imported("nlvr", write(tmp_path, content), "--images", images)
    assert said == [f"nlvr_{split}.json: 1 entries, 2 pictures" for split in ("train", "dev", "test")]
    for split in ("train", "dev", "test"):
        statements = read_statements(tmp_path / f"out/nlvr_{split}.json")
        item = NlvrDataset(statements, images, eval_transform(32))[0]
        assert item["labels"] == [1] and item["sentences"] == ["there is a dog in the left image"]


def test_a_missing_picture_is_named_and_nothing_is_written(imported, tmp_path):
    images = pictures(tmp_path, "train2014/COCO_train2014_000000000009.jpg")
    with pytest.raises(
        UserError, match="1 of 2 pictures of coco_train are missing, the first train2014/COCO_train2014_000000000025.jpg"
    ):
        imported("coco", write(tmp_path, {"captions_train2014": COCO}), "--images", images)
    assert not (tmp_path / "out").exists()


def test_files_that_are_there_are_kept(imported, tmp_path):
    files = write(tmp_path, {"dataset_flickr30k": FLICKR})
    imported("karpathy", files)
    with pytest.raises(UserError, match="flickr30k_train.json: is there already; give another folder"):
        imported("karpathy", files)


ASKED = vqa("train2014", range(4))
FIRST, SECOND = ASKED


def changed(**change: object) -> dict:
    return {**KARPATHY, "images": [{**KARPATHY["images"][0], **change}]}


@pytest.mark.parametrize(
    ("kind", "content", "said"),
    [
        ("coco", {"captions": COCO}, "its name holds no split"),
        ("coco", {"captions_val2014": {"images": []}}, "has no 'annotations', as the official file has"),
        ("coco", {"captions_val2014": {**COCO, "images": []}}, "annotation 0 is of image 25, which is not among its images"),
        ("karpathy", {"x": {**KARPATHY, "dataset": "flickr8k"}}, "is of the data set 'flickr8k'; give dataset_coco.json or"),
        ("karpathy", {"x": changed(split="dev")}, "image 0 has the split 'dev', not one of train, restval, val, test"),
        ("karpathy", {"x": changed(sentences=[{}])}, "an entry has no 'raw', as the official file has"),
        ("vqa", {"x": COCO}, "is of the split None, not one of train2014"),
        ("vqa", {"x": {"data_subtype": "train2014"}}, "holds neither questions nor annotations"),
        ("vqa", {"x": {**ASKED[FIRST], "data_subtype": "train2017"}}, "is of the split 'train2017', not one of"),
        ("vqa", {FIRST: ASKED[FIRST]}, "the annotations of train2014 are not given; add their file"),
        ("vqa", {SECOND: ASKED[SECOND]}, "the questions of train2014 are not given; add their file"),
        ("vqa", {**vqa("train2014", range(5)), SECOND: ASKED[SECOND]}, "question 4 has no annotation"),
        ("vqa", {**vqa("train2014", range(5)), FIRST: ASKED[FIRST]}, "question 4 has an annotation and is not among the questions"),
        ("nlvr", {"x": [nlvr("train"), nlvr("balanced")]}, "line 2 has the identifier 'balanced-3-1-0', of none of the splits"),
        ("nlvr", {"x": [nlvr("dev", label="maybe")]}, "line 1 has no 'sentence' with the 'label' True or False"),
        ("nlvr", {"x": [["a"]]}, "line 1 is not a JSON object, as NLVR2's lines are"),
    ],
)
def test_what_is_wrong_with_an_official_file_is_said(imported, tmp_path, kind, content, said):
    with pytest.raises(UserError) as error:
        imported(kind, write(tmp_path, content))
    assert said in str(error.value) and "\n" not in str(error.value) and not (tmp_path / "out").exists()
