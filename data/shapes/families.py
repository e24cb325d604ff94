"""Retrieval: families of similar pictures, and captions that tell them apart.

Pictures drawn independently would be too easy to tell apart, by their colours alone, and a short
caption would be true of many of them. Here a picture has siblings that hold nearly the same things,
and its captions name the differences.
"""

import numpy as np

from data.shapes.statements import Description
from data.shapes.tasks import counted, describe
from data.shapes.world import (
    COLOURS,
    LATTICE,
    MOST,
    SHAPES,
    SIZES,
    Kind,
    Scene,
    place,
    random_scene,
)

FAMILY = 5  # pictures in a family
FEWEST = 4  # things in a picture; with fewer, too many pictures would be alike and siblings would share too little
CHANGES = 2  # number of changes between each picture and the family's base picture, which is never shown
MENTIONS = 2  # things that a caption counts
ATTEMPTS = 20  # captions tried; about one in twenty still fits a sibling

ANYTHING = Description(None, None, None)

Cell = tuple[int, int]


def draw_family(rng: np.random.Generator, most: int = MOST) -> list[Scene]:
    """Draws FAMILY different scenes, each made by CHANGES changes to the same base scene."""
    base = random_scene(rng, max(most, FEWEST), FEWEST)
    family: dict[frozenset, Scene] = {}
    while len(family) < FAMILY:
        scene = base
        for _ in range(CHANGES):
            scene = vary(rng, scene)
        family.setdefault(frozenset((t.kind, t.row, t.column) for t in scene), scene)
    return list(family.values())


def vary(rng: np.random.Generator, scene: Scene) -> Scene:
    """Makes one random change to a scene: moves a thing, changes an attribute of it, or exchanges one with another thing."""
    things = {(thing.row, thing.column): thing for thing in scene}
    kinds = {cell: thing.kind for cell, thing in things.items()}
    one, other = (list(kinds)[i] for i in rng.permutation(len(kinds))[:2])
    (move, change, exchange)[rng.integers(3)](rng, kinds, one, other)
    return tuple(things[c] if c in things and things[c].kind == k else place(rng, k, c) for c, k in kinds.items())


def move(rng: np.random.Generator, kinds: dict[Cell, Kind], one: Cell, other: Cell) -> None:
    """Moves a thing to a random cell. If another thing is there, the two change places."""
    row, column = rng.integers(0, LATTICE, 2).tolist()
    kind = kinds.pop(one)
    if (row, column) in kinds:
        kinds[one] = kinds[row, column]
    kinds[row, column] = kind


def change(rng: np.random.Generator, kinds: dict[Cell, Kind], one: Cell, other: Cell) -> None:
    attribute = int(rng.integers(3))
    words = [word for word in (SIZES, COLOURS, SHAPES)[attribute] if word != kinds[one][attribute]]
    kinds[one] = with_word(kinds[one], attribute, words[rng.integers(len(words))])


def exchange(rng: np.random.Generator, kinds: dict[Cell, Kind], one: Cell, other: Cell) -> None:
    attribute = int(rng.integers(3))
    words = kinds[one][attribute], kinds[other][attribute]
    kinds[one], kinds[other] = with_word(kinds[one], attribute, words[1]), with_word(kinds[other], attribute, words[0])


def with_word(kind: Kind, attribute: int, word: str) -> Kind:
    return kind._replace(**{Kind._fields[attribute]: word})


def distinctive_caption(rng: np.random.Generator, scene: Scene, siblings: list[Scene]) -> str:
    """Draws a caption of a relation, some counts and the total number of things.

    The caption is true of the scene and, unless all ATTEMPTS fail, false of every sibling.
    """
    for _ in range(ATTEMPTS):
        parts = [*describe(rng, scene, MENTIONS), counted(ANYTHING, scene)]
        if not any(all(part.holds(sibling) for part in parts) for sibling in siblings):
            break
    return " and ".join(part.text() for part in parts) + " in total"
