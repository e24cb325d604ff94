"""Accuracy of visual question answering: texts in, percent out.

The official evaluation of VQA v2 (visualqa.org/evaluation.html; vqaEval.py of GT-Vision-Lab/VQA) in its current form: where the
annotators of a question do not all give the same answer, their answers and the prediction are normalised. Where they do, the
prediction has to be that very answer, capitals and all: so that text read in a picture stays as it is (issue 14 there). An older
form normalises the prediction always, and of the answers the punctuation alone: nothing then agrees with ten times "two".
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

ENOUGH = 3  # annotators who say the same make an answer right

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_A_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}
_DIGITS |= {"eight": "8", "nine": "9", "ten": "10"}
# Words that get back an apostrophe that they lack: any one of them, where there are several. The ambiguous are not among them
# ("its", "well", "shed"), nor those with "I", which lower case has made another word.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's how'd
how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at
shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas
wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've
why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
_APOSTROPHES = {
    word[:place] + word[place + 1 :]: word for word in _CONTRACTED for place, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}  # the published table has this one the wrong way round


def accuracy(predictions: Mapping[int | str, str], answers: Mapping[int | str, Sequence[str]]) -> float:
    """Percent: the mean of `agreement` over the questions. Both map a question's id, `answers` to the ten of the annotators.

    Raises:
        ValueError: when there is no question, or one has no prediction or no answers.
    """
    if not predictions or predictions.keys() != answers.keys():
        raise ValueError("accuracy is of questions that have a prediction and answers each, and of one at least")
    return 100 * sum(agreement(text, answers[question]) for question, text in predictions.items()) / len(predictions)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """How right a prediction is, 0 to 1: min(annotators who say the same / 3, 1), the mean over leaving out one of them each."""
    prediction, *answers = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(normalise, (prediction, *answers))
    same = answers.count(prediction)
    one_of_them_left_out, another_left_out = min((same - 1) / ENOUGH, 1), min(same / ENOUGH, 1)
    return (same * one_of_them_left_out + (len(answers) - same) * another_left_out) / len(answers)


@lru_cache(2**17)
def normalise(answer: str) -> str:
    """Lower case, no articles, digits for number words up to ten, apostrophes in contractions, and no punctuation.

    A sign becomes a space, or nothing: where the answer has it beside a space, and all signs where it has a comma between
    digits. Periods go, but before a digit.
    """
    closed = _COMMA_IN_A_NUMBER.search(answer) is not None
    plain = answer
    for sign in _SIGNS:
        beside_space = f"{sign} " in answer or f" {sign}" in answer
        plain = plain.replace(sign, "" if closed or beside_space else " ")
    words = (_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)
