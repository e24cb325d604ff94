"""Captions of Shapes for retrieval, checked by their words alone, without the generator's own classes."""

import re
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch

from data.shapes.families import FAMILY, FEWEST, distinctive_caption, draw_family
from data.shapes.tasks import vocabulary
from data.shapes.world import COLOURS, MOST, SHAPES, SIZES, Scene
from metrics.retrieval import CUTS, recalls

CAPTIONS = 5
NUMBERS = {"a": 1, "two": 2, "three": 3, "four": 4, "many": 5}
PLURALS = {shape + ("es" if shape == "cross" else "s"): shape for shape in SHAPES}
STEPS = {"above": (1, 0), "below": (-1, 0), "left of": (0, 1), "right of": (0, -1)}


@pytest.fixture(scope="module")
def families() -> list[list[Scene]]:
    rng = np.random.default_rng(0)
    return [draw_family(rng) for _ in range(24)]


@pytest.fixture(scope="module")
def told(families) -> list[tuple[Scene, str]]:
    """Every picture with each of its captions."""
    rng = np.random.default_rng(1)
    found = []
    for family in families:
        for scene in family:
            siblings = [other for other in family if other is not scene]
            found += [(scene, distinctive_caption(rng, scene, siblings)) for _ in range(CAPTIONS)]
    return found


@cache
def words_of(phrase: str) -> set[str]:
    """The attributes that a phrase names."""
    return {PLURALS.get(word, word) for word in phrase.split()} & {*SIZES, *COLOURS, *SHAPES}


def fitting(phrase: str, scene: Scene) -> list:
    return [thing for thing in scene if words_of(phrase) <= set(thing.kind)]


def holds(part: str, scene: Scene) -> bool:
    """Tells whether a part of a caption is true of a picture."""
    relation = re.fullmatch(r"a (.+) (above|below|left of|right of) a (.+)", part)
    if not relation:
        number, phrase = part.removesuffix(" in total").split(" ", 1)
        return min(len(fitting(phrase, scene)), 5) == NUMBERS[number]
    down, across = STEPS[relation[2]]
    for one in fitting(relation[1], scene):
        for other in fitting(relation[3], scene):
            rows, columns = other.row - one.row, other.column - one.column
            forward, sideways = rows * down + columns * across, rows * across + columns * down
            if forward > 0 and forward >= abs(sideways):
                return True
    return False


def satisfied(caption: str, scene: Scene) -> float:
    """The share of a caption's parts that are true of a picture."""
    parts = caption.split(" and ")
    return sum(holds(part, scene) for part in parts) / len(parts)


def shared_colours(caption: str, scene: Scene) -> float:
    """Scores from 0 to 1 how well the colours and counts in a caption agree with those of a picture."""
    named = Counter()
    for number, phrase in re.findall(rf"({'|'.join(NUMBERS)}) ((?:\w+ )*?(?:{'|'.join(SHAPES)}))", caption):
        named.update({colour: NUMBERS[number] for colour in words_of(phrase) & set(COLOURS)})
    seen = Counter(thing.kind.colour for thing in scene)
    return (named & seen).total() / (named | seen).total()


def mean_recall(scores: torch.Tensor) -> float:
    """Returns the mean recall of scores (captions, pictures); ties are broken at random."""
    scores = scores + 1e-4 * torch.rand(scores.shape, generator=torch.Generator().manual_seed(0))
    pictures = torch.arange(scores.shape[1])
    owners = pictures.repeat_interleave(CAPTIONS)
    texts, images = (part.argsort(dim=1, descending=True)[:, : max(CUTS)] for part in (scores.T, scores))
    return recalls(texts, images, owners)["r_mean"]


def test_a_family_is_the_same_number_of_things_in_different_scenes(families):
    for family in families:
        assert len(family) == FAMILY
        assert len({len(scene) for scene in family}) == 1 and FEWEST <= len(family[0]) <= MOST
        assert len({frozenset((thing.kind, thing.row, thing.column) for thing in scene) for scene in family}) == FAMILY
        assert all(len({(thing.row, thing.column) for thing in scene}) == len(scene) for scene in family)


def test_siblings_have_most_things_in_common(families):
    alike = [len(set(one) & set(other)) / len(one) for family in families for one, other in zip(family, family[1:], strict=False)]
    assert 0.3 < np.mean(alike) < 0.9


def test_captions_are_true_and_within_what_a_model_reads(told):
    words = set(vocabulary())
    for scene, caption in told:
        assert satisfied(caption, scene) == 1, caption
        assert set(caption.split()) <= words and len(caption.split()) <= 30


def test_captions_tell_siblings_apart(families, told):
    family_of = {id(scene): family for family in families for scene in family}
    alike = [sum(satisfied(caption, sibling) == 1 for sibling in family_of[id(scene)]) - 1 for scene, caption in told]
    assert np.mean(np.array(alike) > 0) < 0.1


def test_colours_alone_find_little_of_what_the_captions_tell(families, told):
    scenes = [scene for family in families for scene in family]
    full, colours = (
        mean_recall(torch.tensor([[score(caption, scene) for scene in scenes] for _, caption in told]))
        for score in (satisfied, shared_colours)
    )
    assert full > 95
    assert colours < 60
