"""Accuracy of visual question answering, in percent.

This is the current official evaluation of VQA v2 (visualqa.org/evaluation.html; vqaEval.py of GT-Vision-Lab/VQA). If the
annotators of a question give different answers, their answers and the prediction are normalised. If they all give the same
answer, the prediction must equal it exactly, including capitals, so that text read in an image stays as it is. An older version
always normalises the prediction, but only the punctuation of the answers: no prediction then agrees with ten answers "two".

The official accuracy is defined for ten answers. Here fewer are scored by the same formula, except that with one, two or three of
them as many have to agree as are left when one is left out, and that a single answer is not left out: answers that are all the
same are then fully right, as they are with ten.
"""

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache

ENOUGH = 3  # number of annotators who must give an answer for it to count as fully right

_SIGNS = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_A_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ARTICLES = {"a", "an", "the"}
_DIGITS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6", "seven": "7"}
_DIGITS |= {"eight": "8", "nine": "9", "ten": "10"}
# Words whose missing apostrophe is restored (any one of them, if there are several). Ambiguous words are not in the list ("its",
# "well", "shed"), nor words with "I": in lower case they are other words.
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
} | {"somebody'd": "somebodyd"}  # the published table has this entry the wrong way round


def accuracy(predictions: Mapping[int | str, str], answers: Mapping[int | str, Sequence[str]]) -> float:
    """Computes the accuracy in percent: the mean of `agreement` over the questions.

    Args:
        predictions: question id -> predicted answer.
        answers: question id -> answers of the (ten) annotators.

    Raises:
        ValueError: when there is no question, or a question has no prediction or no answers.
    """
    if not predictions or predictions.keys() != answers.keys():
        raise ValueError("accuracy needs at least one question, and a prediction and answers for each question")
    return 100 * sum(agreement(text, answers[question]) for question, text in predictions.items()) / len(predictions)


def agreement(prediction: str, answers: Sequence[str]) -> float:
    """Scores a prediction from 0 to 1: min(matching annotators / 3, 1), averaged over leaving out each annotator in turn.

    With n < 4 annotators, n - 1 stands for 3. A single answer is right or wrong.
    """
    prediction, *answers = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = map(normalise, (prediction, *answers))
    same = answers.count(prediction)
    if len(answers) == 1:
        return float(same)
    enough = min(ENOUGH, len(answers) - 1)
    # Leaving out a matching annotator leaves same - 1 matches; leaving out any other leaves `same`.
    one_of_them_left_out, another_left_out = min((same - 1) / enough, 1), min(same / enough, 1)
    return (same * one_of_them_left_out + (len(answers) - same) * another_left_out) / len(answers)


@lru_cache(2**17)
def normalise(answer: str) -> str:
    """Normalises an answer: lower case, no articles, digits for number words up to ten, apostrophes in contractions, no signs.

    A sign is deleted if it occurs next to a space, or if the answer has a comma between digits; otherwise it becomes a space.
    Periods are deleted unless a digit follows.
    """
    closed = _COMMA_IN_A_NUMBER.search(answer) is not None
    plain = answer
    for sign in _SIGNS:
        beside_space = f"{sign} " in answer or f" {sign}" in answer
        plain = plain.replace(sign, "" if closed or beside_space else " ")
    words = (_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split())
    return " ".join(_APOSTROPHES.get(word, word) for word in words if word not in _ARTICLES)
