"""VQA accuracy against examples worked by hand and against the definition, choice by choice."""

from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metrics.vqa import accuracy, agreement, normalise


def ten(**answers: int) -> list[str]:
    """So many annotators for each answer, and "other" for the rest."""
    given = [answer for answer, number in answers.items() for _ in range(number)]
    return given + ["other"] * (10 - len(given))


@pytest.mark.parametrize(
    ("annotators", "expected"),
    [
        (0, 0),
        (1, 0.3),  # 9 of the 10 choices of nine hold him: (0 + 9 * 1/3) / 10
        (2, 0.6),  # (2 * 1/3 + 8 * 2/3) / 10
        (3, 0.9),  # (3 * 2/3 + 7 * 1) / 10
        (4, 1),
        (10, 1),
    ],
)
def test_agreement_by_hand(annotators, expected):
    assert agreement("red", ten(red=annotators)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["red"], 1),
        (["blue"], 0),
        (["red", "red"], 1),
        (["red", "blue"], 0.5),  # (0 + 1) / 2
        (["red", "red", "red"], 1),
        (["red", "red", "blue"], 2 / 3),  # (1/2 + 1/2 + 1) / 3
        (["red", "blue", "blue"], 1 / 3),  # (0 + 1/2 + 1/2) / 3
        (["red"] * 4, 1),
        (["red", "blue", "blue", "blue"], 0.25),  # the official formula: 3 * 1/3 / 4
    ],
)
def test_few_answers_that_agree_are_fully_right(answers, expected):
    assert agreement("red", answers) == pytest.approx(expected)


@given(st.lists(st.sampled_from(["red", "blue", "green"]), min_size=10, max_size=10))
@settings(max_examples=100, deadline=None)
def test_agreement_is_the_mean_over_all_choices_of_nine(answers):
    choices = list(combinations(answers, 9))
    assert agreement("red", answers) == pytest.approx(sum(min(choice.count("red") / 3, 1) for choice in choices) / len(choices))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A Red dog", "red dog"),
        ("the two dogs and an owl", "2 dogs and owl"),
        ("none", "0"),
        ("eleven", "eleven"),
        ("dont", "don't"),
        ("couldntve it's its", "couldntve it's its"),  # two apostrophes are not found; "its" may be right
        ("couldnt've", "couldn't've"),
        ("1,000", "1000"),
        ("1,000 - 2/3", "1000 23"),  # a comma in a number closes up all signs
        ("red, blue", "red blue"),
        ("red,blue", "red blue"),
        ("half-full", "half full"),
        ("5- 6-7", "5 67"),  # as the first, so the second
        ("2:30 pm", "2:30 pm"),
        ("girl's", "girl's"),
        ("3.5 lb.", "3.5 lb"),
        ("u.s.a.", "usa"),
        ("yes!", "yes"),
        ("a", ""),
    ],
)
def test_normalising_by_the_published_rules(text, expected):
    assert normalise(text) == expected


def test_differing_answers_are_normalised_and_so_is_the_prediction():
    answers = ["two", "2", "Two.", "the two", *["three"] * 6]
    for prediction in ("2", "two", "a two\n"):
        assert agreement(prediction, answers) == 1
    assert agreement("Three!", answers) == 1
    assert agreement("dont", ["don't", "dont", *["no"] * 8]) == pytest.approx(0.6)


def test_unanimous_answers_are_taken_as_they_are():
    assert agreement("two", ["two"] * 10) == 1
    assert agreement(" the end\t", ["the end"] * 10) == 1
    for prediction, answer in (("2", "two"), ("Two", "two"), ("end", "the end"), ("yes!", "yes")):
        assert agreement(prediction, [answer] * 10) == 0


def test_accuracy_is_percent_over_questions_by_their_ids():
    answers = {1: ten(red=10), "b": ten(red=3), 3: ten(blue=10)}
    predictions = {3: "red", "b": "red", 1: "red"}
    assert accuracy(predictions, answers) == pytest.approx(100 * (1 + 0.9 + 0) / 3)
    assert accuracy({**predictions, 3: "blue"}, answers) == pytest.approx(100 * (1 + 0.9 + 1) / 3)


@pytest.mark.parametrize(("predictions", "answers"), [({}, {}), ({1: "a"}, {}), ({1: "a"}, {2: ["a"]}), ({}, {1: ["a"]})])
def test_every_question_needs_a_prediction_and_answers(predictions, answers):
    with pytest.raises(ValueError, match="a prediction and answers"):
        accuracy(predictions, answers)
