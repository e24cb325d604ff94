"""Captions and questions about a single picture of the Shapes world."""

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np

from data.shapes.statements import (
    DESCRIPTIONS,
    FORMS,
    NUMBERS,
    Description,
    Statement,
    draw_description,
)
from data.shapes.world import COLOURS, SHAPES, Scene, Thing

ATTEMPTS = 30  # descriptions tried before another kind of question is asked
ANSWERS = 10  # per question, as in VQA v2
MANY = len(NUMBERS)  # from this number on, captions say "many"
MENTION_LARGE = 3.0  # how much more often captions mention a large thing than a small one
CAPTIONED = 3  # things that a caption names
PROMPT = "a picture of"
QUESTIONS = {
    "exists": "is there a {}",
    "count": "how many {} are there",
    "colour": "what colour is the {}",
    "shape": "what shape is the {}",
}
ANSWERS_TO = {
    "exists": ("yes", "no"),
    "count": NUMBERS,
    "colour": COLOURS,
    "shape": SHAPES,
}
RELATIONS = ("above", "below", "left of", "right of")


def count(description: Description, scene: Scene) -> int:
    return sum(description.fits(thing.kind) for thing in scene)


def name(rng: np.random.Generator, thing: Thing) -> Description:
    """Describes a thing, in three of ten cases without its size."""
    size, colour, shape = thing.kind
    return Description(size if rng.random() < 0.7 else None, colour, shape)


def directions(one: Thing, other: Thing) -> tuple[str, ...]:
    """Returns the direction of one thing as seen from another. On an exact diagonal there are two."""
    down, across = one.row - other.row, one.column - other.column
    vertical, horizontal = "above" if down < 0 else "below", "left of" if across < 0 else "right of"
    if abs(down) == abs(across):
        return vertical, horizontal
    return (vertical,) if abs(down) > abs(across) else (horizontal,)


def relate(rng: np.random.Generator, one: Thing, other: Thing) -> str:
    """Draws one of the directions."""
    ways = directions(one, other)
    return ways[0] if len(ways) == 1 or rng.random() < 0.5 else ways[1]


class Related(NamedTuple):
    """A part of a caption: one thing is `where` (above, below, left of, right of) of another."""

    first: Description
    where: str
    second: Description

    def text(self) -> str:
        return f"a {self.first.phrase()} {self.where} a {self.second.phrase()}"

    def holds(self, scene: Scene) -> bool:
        return any(
            self.first.fits(one.kind) and self.second.fits(other.kind) and self.where in directions(one, other)
            for one, other in permutations(scene, 2)
        )


class Counted(NamedTuple):
    """A part of a caption: the number of things that fit a description, from zero to four, or MANY."""

    number: int
    description: Description

    def text(self) -> str:
        if self.number == 1:
            return f"a {self.description.phrase()}"
        word = NUMBERS[self.number] if self.number < MANY else "many"
        return f"{word} {self.description.phrase(plural=True)}"

    def holds(self, scene: Scene) -> bool:
        return counted(self.description, scene) == self


def counted(description: Description, scene: Scene) -> Counted:
    return Counted(min(count(description, scene), MANY), description)


def tell(rng: np.random.Generator, things: Sequence[Thing], scene: Scene) -> list[Related | Counted]:
    """Describes some things: the direction from the second to the first, then a count for each other thing.

    A single thing gets a count only.
    """
    if len(things) == 1:
        return [counted(name(rng, things[0]), scene)]
    one, other, *rest = things
    relation = Related(name(rng, one), relate(rng, one, other), name(rng, other))
    return [relation, *(counted(name(rng, thing), scene) for thing in rest)]


def describe(rng: np.random.Generator, scene: Scene, mentions: int) -> list[Related | Counted]:
    """Draws a relation between two things, then counts for up to `mentions` others. The scene needs at least two things."""
    salience = np.array([MENTION_LARGE if t.kind.size == "large" else 1.0 for t in scene])
    chosen = min(2 + mentions, len(scene))
    order = rng.choice(len(scene), chosen, replace=False, p=salience / salience.sum())
    return tell(rng, [scene[i] for i in order], scene)


def caption(rng: np.random.Generator, scene: Scene) -> str:
    """Captions a picture: its first CAPTIONED things, large ones before small ones, in reading order.

    The fixed order makes the captions of a picture agree, so that a caption that could fit any picture scores low.
    """
    things = sorted(scene, key=lambda thing: (thing.kind.size != "large", thing.row, thing.column))
    return " and ".join(part.text() for part in tell(rng, things[:CAPTIONED], scene))


def near_or_fitting(rng: np.random.Generator, scene: Scene, fits: bool) -> Description:
    """Draws a description of a thing in the picture. If not `fits`, one attribute is redrawn."""
    kind = scene[rng.integers(len(scene))].kind
    drawn = draw_description(rng)
    words = [its if mine else None for mine, its in zip(drawn, kind, strict=True)]
    if not fits:
        named = [i for i, word in enumerate(words) if word]
        changed = named[rng.integers(len(named))]
        words[changed] = drawn[changed]
    return Description(*words)


def ask_exists(rng: np.random.Generator, scene: Scene) -> tuple[Description, str] | None:
    wanted = bool(rng.integers(2))
    for _ in range(ATTEMPTS):
        description = near_or_fitting(rng, scene, wanted)
        if bool(count(description, scene)) == wanted:
            return description, "yes" if wanted else "no"
    return None


def ask_count(rng: np.random.Generator, scene: Scene) -> tuple[Description, str] | None:
    wanted = int(rng.integers(len(NUMBERS)))
    for _ in range(ATTEMPTS):
        description = near_or_fitting(rng, scene, wanted > 0)
        if count(description, scene) == wanted:
            return description, NUMBERS[wanted]
    return None


def ask_attribute(rng: np.random.Generator, scene: Scene, attribute: str) -> tuple[Description, str] | None:
    """Asks for the colour or shape of the only thing that fits a description without that attribute."""
    for _ in range(ATTEMPTS):
        thing = scene[rng.integers(len(scene))]
        description = Description(*thing.kind)._replace(**{attribute: None})
        if rng.random() < 0.5:
            description = description._replace(size=None)
        if count(description, scene) == 1:
            return description, getattr(thing.kind, attribute)
    return None


def ask(rng: np.random.Generator, scene: Scene) -> tuple[str, str, str]:
    """Draws a question about a scene. Returns its type, its text and the answer."""
    while True:
        topic = list(QUESTIONS)[rng.integers(len(QUESTIONS))]
        if topic == "exists":
            asked = ask_exists(rng, scene)
        elif topic == "count":
            asked = ask_count(rng, scene)
        else:
            asked = ask_attribute(rng, scene, topic)
        if asked is not None:
            description, answer = asked
            return topic, QUESTIONS[topic].format(description.phrase(topic == "count")), answer


def ten_answers(rng: np.random.Generator, topic: str, answer: str) -> list[str]:
    """Simulates the answers of ten annotators, up to two of them wrong."""
    wrong = [word for word in ANSWERS_TO[topic] if word != answer]
    slips = [wrong[rng.integers(len(wrong))] for _ in range(rng.integers(3))]
    return [answer] * (ANSWERS - len(slips)) + slips


def answer_list() -> list[str]:
    """Lists all possible answers, each once."""
    return list(dict.fromkeys(word for words in ANSWERS_TO.values() for word in words))


def vocabulary() -> list[str]:
    """Returns a word list in BERT's format: the special tokens, then all words of all templates, sorted."""
    blank = Description(None, None, None)
    texts = [
        Statement(template, form, blank, blank, number).text()
        for template, forms in FORMS.items()
        for form in range(len(forms))
        for number in range(len(NUMBERS))
    ]
    texts += [d.phrase(plural) for d in DESCRIPTIONS for plural in (False, True)]
    texts += [question.format("") for question in QUESTIONS.values()]
    texts += [*answer_list(), *RELATIONS, PROMPT, "and", "many"]
    words = {word for text in texts for word in text.split()}
    return ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *sorted(words)]
