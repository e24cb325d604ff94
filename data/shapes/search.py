"""Balanced NLVR2 annotations: every sentence is true of one pair of pictures and false of another.

The same sentence comes as a couple, once with each label, so that the text alone does not reveal
the answer. The scenes of a pair are built for its first statement. Further statements are added by
a search among the pairs of a chunk. It places the two statements of a couple on pairs with similar
numbers of things, so that these numbers do not reveal the answer either.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.shapes.statements import (
    DESCRIPTIONS,
    MIXTURE,
    Cell,
    Description,
    Statement,
    cell_weights,
    construct,
    draw_statement,
    pick,
)
from data.shapes.world import KINDS, MOST, Scene, draw_number

PAIRS_PER_CHUNK = 500
ATTEMPTS = 60  # descriptions tried before a couple is given up
RAREST_FIRST = ("above", "higher", "more", "things", "total", "pair", "one", "both")
NEARNESS = 0.7  # largest distance within a couple: differences of the log numbers of things, summed over both pictures

FITS = np.array([[d.fits(kind) for d in DESCRIPTIONS] for kind in KINDS], dtype=np.int64)
INDEX = {description: i for i, description in enumerate(DESCRIPTIONS)}


class Level(NamedTuple):
    """The difficulty of the data: the maximum number of things in a picture, and the statement templates in use."""

    most: int = MOST
    templates: tuple[str, ...] = tuple(MIXTURE)


FULL = Level()


def spread_templates(rng: np.random.Generator, number: int, level: Level) -> Iterator[str]:
    """Yields `number` templates whose counts match the shares in MIXTURE as closely as whole numbers allow."""
    names = list(level.templates)
    bounds = np.cumsum([MIXTURE[name] for name in names])
    points = (np.arange(number) + rng.random()) / number * bounds[-1]
    for i in np.searchsorted(bounds, points, side="right"):
        yield names[min(i, len(names) - 1)]


def plan_couples(rng: np.random.Generator, number: int, level: Level) -> list[tuple[Statement, bool]]:
    """Draws `number` labelled statements in random order. Each sentence comes once with each label.

    For an odd `number`, one sentence comes with one label only.
    """
    plan = []
    for template in spread_templates(rng, (number + 1) // 2, level):
        statement = draw_statement(rng, template)
        plan += [(statement, True), (statement, False)]
    return [plan[i] for i in rng.permutation(len(plan))[:number]]


def tally(scenes: list[Scene]) -> np.ndarray:
    """Tabulates the things that fit each description in each scene: (3, scenes, descriptions).

    The three layers are the number of things, the sum of their rows and the sum of their columns.
    """
    position = {kind: i for i, kind in enumerate(KINDS)}
    kinds = np.zeros((3, len(scenes), len(KINDS)), dtype=np.int64)
    for i, scene in enumerate(scenes):
        for thing in scene:
            kinds[:, i, position[thing.kind]] += (1, thing.row, thing.column)
    return kinds @ FITS


class Evidence:
    """The evidence for statements in all P pairs of a chunk, computed for all pairs at once."""

    def __init__(self, pairs: list[tuple[Scene, Scene]]):
        self.sides = [tally([pair[side] for pair in pairs]) for side in (0, 1)]
        self.numbers = np.array([[len(scene) for scene in pair] for pair in pairs]).T  # (2, P)

    def of(self, statement: Statement) -> np.ndarray:
        """Returns the cells (2, P) of the pairs; -1 where something that the statement presupposes is missing."""
        template, form, first, second, _ = statement
        if template == "things":
            return self.numbers
        return np.stack([self.on_side(side, template, form, first, second) for side in (0, 1)])

    def on_side(
        self,
        side: int,
        template: str,
        form: int,
        first: Description,
        second: Description | None,
    ) -> np.ndarray:
        one = self.sides[side][:, :, INDEX[first]]  # (3, P)
        other = self.sides[side][:, :, INDEX[second]] if second else one
        if template == "pair":
            return ((one, other)[side][0] > 0).astype(int)
        if template in ("both", "one"):
            return (one[0] > 0).astype(int)
        if template in ("more", "total"):
            return one[0]
        if template == "higher":
            return np.where(one[0] == 1, one[1], -1)
        axis = form + 1  # above compares rows, left of compares columns
        clear = (one[0] == 1) & (other[0] == 1) & (one[axis] != other[axis])
        return np.where(clear, one[axis] < other[axis], -1)


class Search:
    """Adds statements to the pairs of a chunk, at most `room` per pair.

    `told` holds the statements that each pair has already, with their labels. The search extends it in place.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        pairs: list[tuple[Scene, Scene]],
        told: list[list[tuple[Statement, bool]]],
        room: int,
        level: Level = FULL,
    ):
        self.rng, self.level = rng, level
        self.told = told
        self.evidence = Evidence(pairs)
        self.logs = np.log(self.evidence.numbers)
        self.room = np.full(len(pairs), room)

    def nearest(self, statement: Statement, cell: Cell, target: np.ndarray) -> int | None:
        """Finds the pair in the given cell whose log numbers of things are closest to `target` (2,), with some random noise."""
        cells = self.evidence.of(statement)
        fit = np.flatnonzero((cells[0] == cell[0]) & (cells[1] == cell[1]) & (self.room > 0))
        if not fit.size:
            return None
        distance = np.abs(self.logs[:, fit] - target[:, None]).sum(axis=0)
        distance += 0.2 * self.rng.random(fit.size)
        return int(fit[distance.argmin()])

    def place(self, statement: Statement, cells: dict[bool, Cell]) -> bool:
        """Adds a statement to a pair in its true cell and to one in its false cell. Tells whether both were found."""
        label = bool(self.rng.integers(2))
        drawn = np.log([draw_number(self.rng, self.level.most) for _ in range(2)])
        one = self.nearest(statement, cells[label], drawn)
        if one is None:
            return False
        other = self.nearest(statement, cells[not label], self.logs[:, one])
        if other is None:
            return False
        apart = np.abs(self.logs[:, one] - self.logs[:, other]).sum()
        if statement.template != "things" and apart > NEARNESS:
            return False
        if (statement, label) in self.told[one] or (statement, not label) in self.told[other]:
            return False
        for pair, truth in ((one, label), (other, not label)):
            self.told[pair].append((statement, truth))
            self.room[pair] -= 1
        return True

    def find_couple(self, template: str) -> None:
        """Draws the cells first and then searches for a description that fits, so that rare cells keep their share."""
        statement = draw_statement(self.rng, template)
        cells = {told: pick(self.rng, cell_weights(statement, told)) for told in (True, False)}
        for _ in range(ATTEMPTS):
            if self.place(statement, cells):
                return
            new = draw_statement(self.rng, template)
            statement = statement._replace(first=new.first, second=new.second)

    def run(self) -> None:
        """Finds statements for all pairs. A few pairs may get fewer than `room`."""
        templates = spread_templates(self.rng, int(self.room.sum()) // 2, self.level)
        for template in sorted(templates, key=RAREST_FIRST.index):
            self.find_couple(template)


def make_chunk(
    rng: np.random.Generator, pairs: int, statements_per_pair: int, level: Level = FULL
) -> list[tuple[Scene, Scene, list[tuple[Statement, bool]]]]:
    """Builds the pairs of a chunk, each with its statements and their labels."""
    plan = plan_couples(rng, pairs, level)
    scenes = [construct(rng, statement, label, level.most) for statement, label in plan]
    told = [[entry] for entry in plan]
    if statements_per_pair > 1:
        Search(rng, scenes, told, statements_per_pair - 1, level).run()
    return [(left, right, entries) for (left, right), entries in zip(scenes, told, strict=True)]
