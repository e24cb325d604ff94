"""The Shapes generator: true labels, balance, determinism, file formats."""

import hashlib
import json
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data.shapes.search import make_chunk
from data.shapes.statements import (
    DESCRIPTIONS,
    MIXTURE,
    Description,
    Statement,
    construct,
    draw_statement,
    evaluate,
    one_sided_accuracy,
)
from data.shapes.tasks import ask, caption, vocabulary
from data.shapes.world import FEWEST, FULLNESS, KINDS, MOST, PICTURE, Kind, Thing, draw, encode, random_scene
from data.shapes.write import make_shapes
from tools import make_shapes as make_shapes_tool
from utils import UserError

STATEMENTS_PER_PAIR = 4


def thing(words: str, row: int = 0, column: int = 0) -> Thing:
    return Thing(Kind(*words.split()), row, column, 0, 0, 1.0)


@pytest.fixture(scope="module")
def chunk():
    return make_chunk(np.random.default_rng(0), 200, STATEMENTS_PER_PAIR)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("shapes")
    make_shapes(out, seed=1, size=24, statements_per_pair=3, eval_size=10, workers=1)
    return out


def read(dataset: Path, name: str):
    return json.loads((dataset / "annotations" / name).read_text())


def digests(out: Path) -> dict[str, str]:
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {str(f.relative_to(out)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


STAR = Description(None, "red", "star")
CIRCLE = Description(None, "blue", "circle")


@pytest.mark.parametrize(
    ("statement", "left", "right", "truth"),
    [
        (Statement("both", 0, STAR), ["small red star"], ["large red star"], True),
        (Statement("both", 0, STAR), ["small red star"], ["large red cross"], False),
        (Statement("one", 0, STAR), ["small red star"], ["large red cross"], True),
        (Statement("pair", 0, STAR, CIRCLE), ["small red star"], ["large blue circle"], True),
        (Statement("pair", 0, STAR, CIRCLE), ["large blue circle"], ["small red star"], False),
        (Statement("more", 0, STAR), ["small red star"], ["small blue star"], True),
        (Statement("more", 1, STAR), ["small red star"], ["small blue star"], False),
        (Statement("total", 0, STAR, None, 2), ["small red star"], ["large red star"], True),
        (Statement("total", 0, STAR, None, 3), ["small red star"], ["large red star"], False),
        (Statement("things", 1), ["small red star"], ["small red star"] * 2, True),
    ],
)
def test_evaluate_by_hand(statement, left, right, truth):
    scenes = [tuple(thing(words) for words in side) for side in (left, right)]
    assert evaluate(statement, *scenes) is truth


def test_evaluate_positions_by_hand():
    left = (thing("small red star", 1, 4), thing("large blue circle", 3, 2))
    right = (thing("small red star", 2, 1), thing("large blue circle", 5, 5))
    assert evaluate(Statement("above", 0, STAR, CIRCLE), left, right) is True
    assert evaluate(Statement("above", 1, STAR, CIRCLE), left, right) is False
    assert evaluate(Statement("higher", 0, STAR), left, right) is True
    assert evaluate(Statement("higher", 1, STAR), left, right) is False
    assert evaluate(Statement("higher", 0, STAR), left + left, right) is None


@pytest.mark.parametrize("template", MIXTURE)
def test_constructed_scenes_fit_the_label(template):
    rng = np.random.default_rng(1)
    for i in range(150):
        statement, label = draw_statement(rng, template), bool(i % 2)
        scenes = construct(rng, statement, label)
        assert evaluate(statement, *scenes) is label, statement.text()
        for scene in scenes:
            assert FEWEST <= len(scene) <= MOST
            assert len({(t.row, t.column) for t in scene}) == len(scene)


def test_searched_statements_are_true_as_labelled(chunk):
    for left, right, told in chunk:
        assert len({entry for entry in told}) == len(told)
        for statement, label in told:
            assert evaluate(statement, left, right) is label, statement.text()
    assert sum(len(told) for _, _, told in chunk) > 0.75 * STATEMENTS_PER_PAIR * len(chunk)


def test_no_sentence_gives_its_label_away(chunk):
    labels = defaultdict(Counter)
    for _, _, told in chunk:
        for statement, label in told:
            labels[statement.text()][label] += 1
    assert all(count[True] == count[False] for count in labels.values())


def test_templates_keep_their_shares(chunk):
    shares = Counter(told[0][0].template for _, _, told in chunk)
    for template, share in MIXTURE.items():
        assert shares[template] / len(chunk) == pytest.approx(share, abs=0.02)


def test_one_picture_tells_little():
    rng = np.random.default_rng(2)
    accuracy = {template: np.mean([one_sided_accuracy(draw_statement(rng, template)) for _ in range(50)]) for template in MIXTURE}
    assert sum(MIXTURE[name] * value for name, value in accuracy.items()) <= 0.64


def test_numbers_of_things_span_an_order_of_magnitude():
    rng = np.random.default_rng(3)
    numbers = np.array([len(random_scene(rng)) for _ in range(1000)])
    assert numbers.min() == FEWEST and numbers.max() == MOST
    below = [(np.log(n / FEWEST) / np.log((MOST + 1) / FEWEST)) ** (1 / FULLNESS) for n in range(FEWEST, MOST + 2)]
    expected = sum(np.log(n) * share for n, share in zip(range(FEWEST, MOST + 1), np.diff(below), strict=True))
    assert np.log(numbers).mean() == pytest.approx(expected, abs=0.1)


def test_every_kind_looks_different():
    pictures = []
    for kind in KINDS:
        size = 32 if kind.size == "large" else 16
        scene = (Thing(kind, 0, 0, size, size, 1.0),)
        pictures.append(np.asarray(draw(np.random.default_rng(0), scene), dtype=float))
    for i, one in enumerate(pictures):
        assert one.shape == (PICTURE, PICTURE, 3)
        for other in pictures[:i]:
            assert np.abs(one - other).sum() > 1500


def test_captions_and_questions_use_known_words():
    rng = np.random.default_rng(4)
    words = set(vocabulary())
    for i in range(200):
        scene = random_scene(rng)
        text = caption(rng, scene)
        _, question, answer = ask(rng, scene)
        assert set(text.split()) | set(question.split()) | {answer} <= words
        assert len(text.split()) <= 30
        statement = draw_statement(rng, list(MIXTURE)[i % len(MIXTURE)])
        assert set(statement.text().split()) <= words
        assert len(statement.text().split()) <= 17


def test_questions_are_answered_right():
    rng = np.random.default_rng(5)
    by_phrase = {d.phrase(plural): d for d in DESCRIPTIONS for plural in (False, True)}
    for _ in range(300):
        scene = random_scene(rng)
        topic, question, answer = ask(rng, scene)
        for start in ("is there a ", "how many ", "what colour is the ", "what shape is the "):
            question = question.removeprefix(start)
        description = by_phrase[question.removesuffix(" are there")]
        found = [t.kind for t in scene if description.fits(t.kind)]
        if topic == "exists":
            assert answer == ("yes" if found else "no")
        elif topic == "count":
            assert answer == ("zero", "one", "two", "three", "four")[len(found)]
        else:
            assert [answer] == [getattr(kind, topic) for kind in found]


def test_same_bytes_for_the_same_seed_whatever_the_processes(tmp_path, dataset):
    again = {"size": 24, "statements_per_pair": 3, "eval_size": 10}
    make_shapes(tmp_path / "same", seed=1, workers=2, **again)
    make_shapes(tmp_path / "other", seed=2, workers=1, **again)
    first, same, other = (digests(path) for path in (dataset, tmp_path / "same", tmp_path / "other"))
    assert first == same
    assert first.keys() == other.keys()
    constant = {name for name in first if first[name] == other[name]}
    assert constant == {"annotations/vocab.txt", "annotations/answer_list.json"}


def test_no_picture_twice(dataset):
    pictures = [d for name, d in digests(dataset).items() if name.startswith("images")]
    assert len(pictures) == 4 * (24 + 10 + 10)  # two of a pair, one of its own, one of a family
    assert len(set(pictures)) == len(pictures)


def test_nlvr_format(dataset):
    for split, entries in ((s, read(dataset, f"nlvr_{s}.json")) for s in ("train", "dev", "test")):
        pairs = Counter(tuple(entry["images"]) for entry in entries)
        assert len(pairs) == (24 if split == "train" else 10)
        assert max(pairs.values()) <= (3 if split == "train" else 1)
        runs = [tuple(e["images"]) for e in entries]
        changes = sum(one != other for one, other in pairwise(runs))
        assert changes == len(pairs) - 1  # the entries of a pair are adjacent
        for entry in entries:
            assert entry.keys() == {"sentence", "label", "images"}
            assert entry["label"] in ("True", "False")
            for image in entry["images"]:
                assert Image.open(dataset / "images" / image).size == (PICTURE, PICTURE)


def test_caption_format(dataset):
    for name in ("coco_karpathy", "flickr30k"):
        train = read(dataset, f"{name}_train.json")
        assert len(train) == 5 * 24
        assert train[0].keys() == {"image", "caption", "image_id"}
        assert isinstance(train[0]["caption"], str)
        for split in ("val", "test"):
            entries = read(dataset, f"{name}_{split}.json")
            assert len(entries) == 10
            assert all(len(entry["caption"]) == 5 for entry in entries)
            assert all((dataset / "images" / entry["image"]).is_file() for entry in entries)
    truth = read(dataset, "coco_gt/coco_karpathy_val_gt.json")
    assert len(truth["images"]) == 10 and len(truth["annotations"]) == 50
    val = read(dataset, "coco_karpathy_val.json")
    image_id = int(val[3]["image"].removesuffix(".jpg").split("_")[-1])
    captions = [a["caption"] for a in truth["annotations"] if a["image_id"] == image_id]
    assert captions == val[3]["caption"]


def test_question_format(dataset):
    answers = read(dataset, "answer_list.json")
    for split in ("train", "val", "test"):
        entries = read(dataset, f"vqa_{split}.json")
        assert len({entry["question_id"] for entry in entries}) == len(entries)
        for entry in entries:
            assert entry.keys() == {"question_id", "question", "answer", "image", "dataset"}
            assert len(entry["answer"]) == 10 and set(entry["answer"]) <= set(answers)
    assert all(e["dataset"] == "vg" and e["answer"] in answers for e in read(dataset, "vg_qa.json"))


def test_word_list(dataset):
    words = (dataset / "annotations" / "vocab.txt").read_text().splitlines()
    assert words[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert words[5:] == sorted(set(words[5:]))


def test_bad_arguments_are_named(tmp_path):
    with pytest.raises(ValueError, match="tasks"):
        make_shapes(tmp_path, seed=0, size=4, tasks=("nlvr2",))
    with pytest.raises(ValueError, match="size"):
        make_shapes(tmp_path, seed=0, size=0)


@pytest.fixture
def make(tmp_path, monkeypatch, capsys):
    """Runs the tool on tmp_path; returns what it prints."""

    def make(*arguments: str) -> str:
        small = ["--seed", "1", "--size", "2", "--eval-size", "1", "--workers", "1"]
        monkeypatch.setattr("sys.argv", ["make_shapes.py", "--out", str(tmp_path), *small, *arguments])
        make_shapes_tool.main()
        return capsys.readouterr().out

    return make


def test_the_tool_refuses_them_in_one_line_and_leaves_nothing(make, tmp_path):
    with pytest.raises(UserError, match="tasks must be some of"):
        make("--tasks", "nlvr2")
    assert list(tmp_path.iterdir()) == []


def test_the_tool_makes_the_same_data_once_and_those_of_several_tasks_side_by_side(make, tmp_path):
    for task in ("nlvr", "retrieval"):
        assert "used again" not in make("--tasks", task)
    with pytest.raises(UserError, match="must be at least 1"):
        make("--tasks", "nlvr", "--size", "0")  # takes nothing away
    assert all("used again" in make("--tasks", task) for task in ("nlvr", "retrieval"))
    before = (tmp_path / "annotations" / "nlvr_train.json").read_text()
    assert "used again" not in make("--tasks", "nlvr", "--seed", "2")
    assert (tmp_path / "annotations" / "nlvr_train.json").read_text() != before


def test_data_that_were_cut_short_or_made_by_other_code_are_made_again(make, monkeypatch):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(make_shapes_tool, "make_shapes", interrupted)
        make("--tasks", "vqa")
    assert "used again" not in make("--tasks", "vqa")
    monkeypatch.setattr(make_shapes_tool, "digest", lambda folder: "other")
    assert "used again" not in make("--tasks", "vqa")


@pytest.mark.parametrize(("task", "file"), [("nlvr", "nlvr_train.json"), ("retrieval", "flickr30k_test.json")])
def test_data_of_others_are_not_overwritten(make, tmp_path, task, file):
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / file).write_text("[]")
    with pytest.raises(UserError, match=f"{file}: this program did not make it"):
        make("--tasks", task)
    assert (tmp_path / "annotations" / file).read_text() == "[]"


def test_pictures_are_small():
    rng = np.random.default_rng(6)
    assert np.mean([len(encode(draw(rng, random_scene(rng)))) for _ in range(20)]) < 8000
