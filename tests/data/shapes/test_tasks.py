"""Captions and questions of Shapes: true, and of little worth to one who does not see the picture."""

from collections import Counter, defaultdict

import numpy as np
import pytest
from pycocoevalcap.cider.cider import Cider

from data.shapes.tasks import ask, caption, ten_answers
from data.shapes.world import Kind, Thing, random_scene
from metrics.vqa import accuracy
from tests.data.shapes.test_families import satisfied

CAPTIONS = 5


def scenes(number: int, seed: int) -> list:
    return [random_scene(np.random.default_rng((seed, index))) for index in range(number)]


def cider(captions: list[str], references: list[list[str]]) -> float:
    """Percent; Shapes' captions are words with spaces between them as they are."""
    return 100 * Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(captions)})[0]


def test_captions_are_true():
    rng = np.random.default_rng(0)
    for scene in scenes(200, seed=1):
        text = caption(rng, scene)
        assert satisfied(text, scene) == 1, text


def test_a_caption_names_large_things_first_in_the_order_of_reading():
    kinds = ["small red star", "large blue cross", "large red circle", "small green square", "large white star"]
    places = [(0, 0), (3, 1), (1, 5), (0, 2), (3, 0)]
    scene = tuple(Thing(Kind(*kind.split()), *place, 0, 0, 1.0) for kind, place in zip(kinds, places, strict=True))
    rng = np.random.default_rng(0)
    told = {caption(rng, scene).replace("large ", "") for _ in range(50)}
    assert told == {"a red circle right of a white star and a blue cross"}
    assert {caption(rng, scene[:1]) for _ in range(50)} == {"a small red star", "a red star"}


def test_a_caption_of_no_picture_in_particular_scores_a_fifth_of_one_of_the_picture():
    pictures = scenes(120, seed=2)
    rng = np.random.default_rng(3)
    told = [[caption(rng, scene) for _ in range(CAPTIONS + 1)] for scene in pictures]
    references, sixth = [texts[:CAPTIONS] for texts in told], [texts[CAPTIONS] for texts in told]
    others = [cider(sixth[1:] + sixth[:1], references)]  # each picture gets that of the next one
    others += [cider([text] * len(pictures), references) for text in sixth[:12]]  # all get the same one
    assert cider(sixth, references) > 5 * max(others) > 0


@pytest.fixture(scope="module")
def questions() -> list[tuple[str, str, str, list[str]]]:
    """Type, question, right answer and the annotators' answers."""
    rng = np.random.default_rng(4)
    asked = [ask(rng, scene) for scene in scenes(4000, seed=5)]
    return [(*question, ten_answers(rng, question[0], question[2])) for question in asked]


def test_a_question_alone_gives_little_of_its_answer_away(questions):
    seen, fresh = questions[:3000], questions[3000:]
    by_text, by_type = defaultdict(Counter), defaultdict(Counter)
    for topic, text, _, answers in seen:
        by_text[text].update(answers)
        by_type[topic].update(answers)
    guesses = [(by_text.get(text) or by_type[topic]).most_common(1)[0][0] for topic, text, _, _ in fresh]
    annotators = dict(enumerate(answers for *_, answers in fresh))
    assert accuracy(dict(enumerate(guesses)), annotators) < 47
    assert accuracy(dict(enumerate(right for _, _, right, _ in fresh)), annotators) == 100
