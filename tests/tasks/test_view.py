"""The views of every task show the words and patches that the records mark as surviving."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from madtp.blocks import TowerRecord
from tasks.registry import TASKS, load_any_config, open_view
from tasks.view import View, spread
from tests.tiny_run import SENTENCES, TEMPERATURE, write_run

FIRST, LAST = {"retrieval_clip": ["[START]"]}, {"retrieval_clip": []}  # of a text's words
READING = [task for task in TASKS if task != "caption"]  # those that prune a text


def opened(folder: Path, task: str, p: float = 0.4) -> View:
    run = write_run(folder, task, p)
    return open_view(load_any_config(run / "config.yaml"), run / "checkpoint_best.pth")


@pytest.fixture(params=TASKS)
def task(request) -> str:
    return request.param


@pytest.fixture
def view(task: str, tmp_path: Path) -> View:
    return opened(tmp_path, task)


def read_plainly(record: TowerRecord, sample: int, tokens: int) -> list[list[bool]]:
    """Reads off a sample's surviving tokens block by block; None stands for a merged token."""
    standing, layers = list(range(tokens)), []
    for kept, leaving in zip(record.kept, record.leaving, strict=True):
        if kept is not None:
            standing = [token for token, stays in zip(standing, kept[sample].tolist(), strict=False) if stays]
            merged = int(leaving[sample]) - 1 - len(standing)
            standing += [None] * merged
        layers.append([token in standing for token in range(tokens)])
    return layers


def test_what_is_alive_is_what_the_records_say(view: View) -> None:
    pruned = {"patches": 0, "words": 0}
    for batch in view.batches(view.ids):
        records = view.records(view.forward(batch))
        samples = view.samples(batch)
        for i, sample in enumerate(samples):
            for place, (label, picture, alive) in enumerate(sample.pictures):
                assert label == view.labels[place] and picture.shape == (32, 32, 3) and alive.shape == (3, 4, 4)
                expected = read_plainly(records["image"], place * len(samples) + i, 16)
                assert alive.reshape(3, 16).tolist() == expected
                pruned["patches"] += 16 - alive[-1].sum()
            for words, alive in sample.texts:
                assert alive.tolist() == read_plainly(records["text"], i, len(words))
                pruned["words"] += len(words) - alive[-1].sum()
    assert pruned["patches"] > 20 and (pruned["words"] > 2) == ("text" in records)


@pytest.mark.parametrize("task", READING)
def test_words_are_those_of_the_text_in_its_order_without_padding(view: View, task: str) -> None:
    samples = [sample for batch in view.batches(view.ids) for sample in view.samples(batch)]
    assert [sample.id for sample in samples] == view.ids
    for sample, sentence in zip(samples, SENTENCES, strict=True):
        ((words, alive),) = sample.texts
        assert words == [*FIRST.get(task, []), *sentence.split(), *LAST.get(task, ["[SEP]"])]
        assert alive.shape == (2, len(words)) and alive[0].all()  # the first layer is left alone


def test_tokens_left_are_those_of_all_towers(view: View) -> None:
    (batch, *_) = view.batches(view.ids)
    output = view.forward(batch)
    tokens = view.tokens(output)
    by_hand = [
        sum(int(tokens["image"][place * 3 + i, -1]) for place in range(len(view.labels)))
        + sum(int(tokens[tower][i, -1]) for tower in tokens if tower != "image")
        for i in range(3)
    ]
    assert view.tokens_left(output).tolist() == by_hand


def test_an_uncompressed_model_keeps_everything(task: str, tmp_path: Path) -> None:
    view = opened(tmp_path, task, p=0.0)
    (batch, *_) = view.batches(view.ids[:1])
    (sample,) = view.samples(batch)
    assert "uncompressed" in sample.heading
    assert all(alive.all() for _, _, alive in sample.pictures) and all(alive.all() for _, alive in sample.texts)


@pytest.mark.parametrize(("task", "said"), [("retrieval", ("similarity ", ", match ")), ("retrieval_clip", ("similarity ",))])
def test_a_pair_is_headed_by_what_the_model_finds_of_it(view: View, said: tuple[str, ...]) -> None:
    (batch, *_) = view.batches(view.ids[1:2])
    (sample,) = view.samples(batch)
    assert sample.heading.startswith(f"1a.jpg, p = 0.4 (T = {TEMPERATURE:g}): similarity ")
    assert all(words in sample.heading for words in said) and sample.heading.count("match") == len(said) - 1
    image, text = view.forward(batch)
    assert f"similarity {float(torch.dot(image.feature[0], text.feature[0])):.2f}" in sample.heading


@pytest.mark.parametrize("task", ["caption", "vqa"])
def test_a_sample_says_what_the_model_wrote_and_what_is_true(view: View, task: str) -> None:
    (batch, *_) = view.batches(view.ids[1:2])
    (sample,) = view.samples(batch)
    (label, written), truth = sample.said
    assert label == {"caption": "written", "vqa": "answer"}[task] and written == view.compute(batch)[0][0]
    assert truth == ("truth", {"caption": SENTENCES[1], "vqa": "red"}[task])


@pytest.mark.parametrize("task", ["nlvr", "retrieval", "retrieval_clip"])
def test_a_samples_gflops_are_those_of_deployment(view: View) -> None:
    (batch, *_) = view.batches(view.ids[:1])
    _, gflops = view.model.costs(*view.inputs(batch), guidance=view.guidance)
    assert view.samples(batch)[0].heading.endswith(f" tokens left, {float(gflops):.4g} GFLOPs")


def test_samples_are_evenly_spaced() -> None:
    ids = [str(i) for i in range(10)]
    assert spread(ids, 2) == ["2", "7"]
    assert spread(ids, 99) == ids


def test_pictures_look_as_in_their_files(view: View, tmp_path: Path) -> None:
    (batch, *_) = view.batches(view.ids[:1])
    _, picture, _ = view.samples(batch)[0].pictures[0]
    np.testing.assert_allclose(picture, np.asarray(Image.open(tmp_path / "0a.jpg")) / 255, atol=1e-5)
