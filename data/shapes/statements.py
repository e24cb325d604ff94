"""NLVR2 statements about two pictures of the Shapes world, with scenes built to fit them.

A cell is the pair (evidence in the left picture, evidence in the right picture). Depending on the
template, evidence is the presence of a thing (0 or 1), the number of things, or a lattice row. The
draws come in a fixed order: the statement, the label, the cell, and the scenes last. This way the
text is independent of the answer.
"""

from functools import cache
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np

from data.shapes.world import (
    COLOURS,
    KINDS,
    LATTICE,
    MOST,
    SHAPES,
    SIZES,
    Kind,
    Scene,
    arrange,
    draw_number,
)

MIXTURE = {
    "both": 0.14,
    "one": 0.18,
    "pair": 0.12,
    "more": 0.16,
    "total": 0.10,
    "higher": 0.13,
    "above": 0.09,
    "things": 0.08,
}
NUMBERS = ("zero", "one", "two", "three", "four")
# Each template has two forms: paraphrases, or the two directions of a comparison.
FORMS = {
    "both": ("there is a {0} in both images", "each image contains a {0}"),
    "one": ("exactly one image contains a {0}", "there is a {0} in only one image"),
    "pair": (
        "the left image has a {0} and the right image has a {1}",
        "there is a {0} on the left and a {1} on the right",
    ),
    "more": (
        "the left image has more {0} than the right image",
        "the left image has fewer {0} than the right image",
    ),
    "total": ("there {be} {number} {0} in total", "the images contain {number} {0} in total"),
    "higher": (
        "the {0} is higher in the left image than in the right image",
        "the {0} is lower in the left image than in the right image",
    ),
    "above": (
        "the {0} is above the {1} in both images",
        "the {0} is left of the {1} in both images",
    ),
    "things": (
        "the left image has more things than the right image",
        "the left image has fewer things than the right image",
    ),
}
# The share of descriptions that name these attributes: (size, colour, shape).
SPECIFICITY = {
    (0, 0, 1): 0.06,
    (0, 1, 0): 0.06,
    (1, 0, 0): 0.03,
    (0, 1, 1): 0.28,
    (1, 0, 1): 0.11,
    (1, 1, 0): 0.11,
    (1, 1, 1): 0.35,
}
NEAR_MISSES = 3  # things per picture that differ from a description in one attribute

Cell = tuple[int, int]


class Description(NamedTuple):
    """The attributes named by a noun phrase; None leaves an attribute open."""

    size: str | None
    colour: str | None
    shape: str | None

    def fits(self, kind: Kind) -> bool:
        return all(mine is None or mine == its for mine, its in zip(self, kind, strict=True))

    def phrase(self, plural: bool = False) -> str:
        noun = self.shape or "thing"
        if plural:
            noun += "es" if noun.endswith("s") else "s"
        return " ".join([word for word in (self.size, self.colour) if word] + [noun])


class Statement(NamedTuple):
    """The parts of a sentence: `form` indexes FORMS[template]; `number` is used by "total" only."""

    template: str
    form: int
    first: Description | None = None
    second: Description | None = None
    number: int = 0

    def text(self) -> str:
        plural = self.template == "more" or (self.template == "total" and self.number != 1)
        names = [d.phrase(plural) for d in (self.first, self.second) if d]
        be = "is" if self.number == 1 else "are"
        form = FORMS[self.template][self.form]
        return form.format(*names, number=NUMBERS[self.number], be=be)


DESCRIPTIONS = tuple(Description(*choice) for choice in product((None, *SIZES), (None, *COLOURS), (None, *SHAPES)) if any(choice))


def pick(rng: np.random.Generator, weights: dict):
    """Draws a key of `weights` with probability proportional to its value."""
    total = sum(weights.values())
    point = rng.random() * total
    for key, weight in weights.items():
        point -= weight
        if point < 0:
            return key
    return key  # rounding errors can leave the point past the last key


def draw_description(rng: np.random.Generator) -> Description:
    """Draws a description with one to three attributes."""
    kind = KINDS[rng.integers(len(KINDS))]
    named = pick(rng, SPECIFICITY)
    return Description(*(word if keep else None for word, keep in zip(kind, named, strict=True)))


def disjoint(one: Description, other: Description) -> bool:
    """Tells whether no thing can fit both descriptions."""
    return any(a and b and a != b for a, b in zip(one, other, strict=True))


def draw_other(rng: np.random.Generator, first: Description) -> Description:
    """Draws a second description that no thing of the first fits. Half the time they differ in a single attribute."""
    if rng.random() < 0.5:
        named = [i for i in range(3) if first[i]]
        changed = named[rng.integers(len(named))]
        words = [word for word in (SIZES, COLOURS, SHAPES)[changed] if word != first[changed]]
        word = words[rng.integers(len(words))]
        return Description(*(word if i == changed else first[i] for i in range(3)))
    second = draw_description(rng)
    while not disjoint(first, second):
        second = draw_description(rng)
    return second


def draw_statement(rng: np.random.Generator, template: str) -> Statement:
    """Draws a statement of a template. Its label is drawn later."""
    form = int(rng.integers(2))
    if template == "things":
        return Statement(template, form)
    first = draw_description(rng)
    while template == "above" and not (first.colour or first.shape):
        first = draw_description(rng)  # "the small thing above the large thing" would allow no third thing
    second = draw_other(rng, first) if template in ("pair", "above") else None
    number = pick(rng, {1: 1, 2: 1.2, 3: 1, 4: 0.6}) if template == "total" else 0
    return Statement(template, form, first, second, number)


def steps(values: int, weights: dict[int, float]) -> dict[Cell, float]:
    """Weights all cells (a, a + step) within range(values). The cells of a step share its weight equally."""
    cells = {}
    for step, weight in weights.items():
        starts = values - step
        cells.update({(a, a + step): weight / starts for a in range(starts)})
    return cells


# Small steps dominate: with large ones the count or the row in one picture would reveal the answer.
FEWER = steps(5, {1: 0.92, 2: 0.08})
HIGHER = steps(LATTICE, {1: 0.86, 2: 0.12, 3: 0.02})
# Steps along these chains cover the whole range of numbers, by factors of at least 1.5, so that one number alone reveals little.
CHAINS = ((1, 2, 3, 5, 8, 12), (1, 2, 4, 7, 11))
FEWER_THINGS = {step: 1.0 for chain in CHAINS for step in pairwise(chain)}
# True and false totals have the same distribution of counts in each picture, so that one picture alone reveals nothing.
TOTALS = {
    1: ({(0, 1): 1, (1, 0): 1}, {(0, 0): 1, (1, 1): 1}),
    2: ({(0, 2): 1, (1, 1): 2, (2, 0): 1}, {(0, 1): 1, (1, 0): 1, (1, 2): 1, (2, 1): 1}),
    3: (
        {(0, 3): 1, (1, 2): 1, (2, 1): 1, (3, 0): 1},
        {(0, 2): 1, (2, 0): 1, (1, 3): 1, (3, 1): 1},
    ),
    4: (
        {(0, 4): 3, (1, 3): 5, (2, 2): 4, (3, 1): 5, (4, 0): 3},
        {
            **{(0, 3): 3, (3, 0): 3, (1, 4): 3, (4, 1): 3},
            **{(1, 2): 2, (2, 1): 2, (2, 3): 2, (3, 2): 2},
        },
    ),
}


def cell_weights(statement: Statement, label: bool) -> dict[Cell, float]:
    """Returns the cells in which a statement has the given label, with their weights."""
    template = statement.template
    if template == "one":
        return {(1, 0): 1, (0, 1): 1} if label else {(1, 1): 1, (0, 0): 1}
    if template in ("both", "pair", "above"):
        return {(1, 1): 1} if label else {(1, 0): 1, (0, 1): 1}
    if template == "total":
        return TOTALS[statement.number][0 if label else 1]
    rising = {"more": FEWER, "things": FEWER_THINGS, "higher": HIGHER}[template]
    # "fewer" and "higher" (a smaller row) are true where the left value is the smaller one.
    wants_rising = (statement.form == 0) == (template == "higher")
    if wants_rising == label:
        return rising
    return {(b, a): weight for (a, b), weight in rising.items()}


def one_sided_accuracy(statement: Statement) -> float:
    """Returns the accuracy of the best guess from the evidence in the left picture alone."""
    shares: dict[int, list[float]] = {}
    for label in (True, False):
        weights = cell_weights(statement, label)
        for (left, _), weight in weights.items():
            shares.setdefault(left, [0.0, 0.0])[label] += 0.5 * weight / sum(weights.values())
    return sum(max(pair) for pair in shares.values())


def evidence(statement: Statement, left: Scene, right: Scene) -> Cell | None:
    """Returns the cell of two scenes, or None if something that the statement presupposes is missing."""
    template, _, first, second, _ = statement
    found = [[t for t in scene if first is None or first.fits(t.kind)] for scene in (left, right)]
    if template in ("both", "one"):
        return int(bool(found[0])), int(bool(found[1]))
    if template == "pair":
        return int(bool(found[0])), int(any(second.fits(t.kind) for t in right))
    if template in ("more", "total", "things"):
        return len(found[0]), len(found[1])
    if any(len(things) != 1 for things in found):
        return None
    (one,), (other,) = found
    if template == "higher":
        return one.row, other.row
    holds = []
    for thing, scene in ((one, left), (other, right)):
        partners = [t for t in scene if second.fits(t.kind)]
        axis = "row" if statement.form == 0 else "column"
        if len(partners) != 1 or getattr(thing, axis) == getattr(partners[0], axis):
            return None
        holds.append(int(getattr(thing, axis) < getattr(partners[0], axis)))
    return holds[0], holds[1]


def evaluate(statement: Statement, left: Scene, right: Scene) -> bool | None:
    """Tells whether a statement is true of two scenes; None if it is undecided."""
    cell = evidence(statement, left, right)
    if cell is None:
        return None
    a, b = cell
    template = statement.template
    if template in ("both", "pair", "above"):
        return bool(a and b)
    if template == "one":
        return a + b == 1
    if template == "total":
        return a + b == statement.number
    if a == b:
        return None
    smaller_first = (statement.form == 0) == (template == "higher")
    return (a < b) == smaller_first


@cache
def fitting(description: Description) -> tuple[Kind, ...]:
    """Returns the kinds that fit a description."""
    return tuple(kind for kind in KINDS if description.fits(kind))


@cache
def near_kinds(description: Description, changed: int) -> tuple[Kind, ...]:
    """Returns the kinds that fit a description except in the attribute with the index `changed`."""
    open_again = description._replace(**{description._fields[changed]: None})
    return tuple(k for k in fitting(open_again) if k[changed] != description[changed])


def draw_kind(rng: np.random.Generator, kinds: tuple[Kind, ...]) -> Kind:
    return kinds[rng.integers(len(kinds))]


def populate(
    rng: np.random.Generator,
    number: int,
    wanted: list[tuple[Kind, int | None, int | None]],
    described: tuple[Description, ...],
    lure: Description | None = None,
) -> Scene:
    """Builds a scene with the `wanted` things and no other thing that fits a description in `described`.

    The rest are near misses (for a red star, a red circle or a blue star), half the time a `lure`
    (a thing that the statement names in the other picture), and random things. The total depends on
    `number`, not on the label, so that it does not reveal the answer.
    """
    number = max(number, len(wanted))
    fixed = [thing for thing in wanted if thing[1] is not None]
    others = [kind for kind, row, _ in wanted if row is None]
    rest = number - len(wanted)
    extra = []
    if lure is not None and rng.random() < 0.5:
        extra.append(draw_kind(rng, fitting(lure)))
    named = [(d, i) for d in described for i in range(3) if d[i]]
    while named and len(extra) < min(NEAR_MISSES, rest):
        for choice in rng.permutation(len(named)):
            extra.append(draw_kind(rng, near_kinds(*named[choice])))
    extra = extra[: min(NEAR_MISSES, rest)]
    extra = [kind for kind in extra if not any(d.fits(kind) for d in described)]
    while len(extra) < rest:
        kind = draw_kind(rng, KINDS)
        if not any(d.fits(kind) for d in described):
            extra.append(kind)
    return arrange(rng, fixed, others + extra)


def place_relation(rng: np.random.Generator, statement: Statement, holds: bool) -> list[tuple[Kind, int, int]]:
    """Draws one thing for each description of an "above" statement, at cells where the relation `holds` or not."""
    step = pick(rng, {1: 0.5, 2: 0.3, 3: 0.2})
    low = int(rng.integers(LATTICE - step))
    along = (low, low + step) if holds else (low + step, low)
    across = rng.integers(0, LATTICE, 2).tolist()
    rows, columns = (along, across) if statement.form == 0 else (across, along)
    kinds = [draw_kind(rng, fitting(d)) for d in (statement.first, statement.second)]
    return list(zip(kinds, rows, columns, strict=True))


def build_side(rng: np.random.Generator, statement: Statement, side: int, value: int, number: int) -> Scene:
    """Builds a scene with the evidence `value` for one side (0 left, 1 right)."""
    template, _, first, second, _ = statement
    if template == "things":
        return populate(rng, value, [], ())
    if template == "above":
        wanted = place_relation(rng, statement, bool(value))
        return populate(rng, number, wanted, (first, second))
    if template == "higher":
        wanted = [(draw_kind(rng, fitting(first)), value, int(rng.integers(LATTICE)))]
        return populate(rng, number, wanted, (first,))
    described, lure = first, None
    if template == "pair":
        described, lure = (first, second) if side == 0 else (second, first)
    if template in ("both", "one", "pair") and value and rng.random() < 0.25:
        value = 2
    wanted = [(draw_kind(rng, fitting(described)), None, None) for _ in range(value)]
    return populate(rng, number, wanted, (described,), lure)


def construct(rng: np.random.Generator, statement: Statement, label: bool, most: int = MOST) -> tuple[Scene, Scene]:
    """Builds two scenes for a statement and its label, with at most `most` things each, unless the statement needs more."""
    numbers = draw_number(rng, most), draw_number(rng, most)
    cell = pick(rng, cell_weights(statement, label))
    left, right = (build_side(rng, statement, i, cell[i], numbers[i]) for i in (0, 1))
    return left, right
