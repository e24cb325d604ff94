"""The world of Shapes: the content of a picture, and its drawing.

A picture is 96x96 px on a lattice of 6x6 cells of 16 px (2x2 patches of 8 px). Every thing has a
kind (size, colour, shape) and a cell of its own. Positions are in quarter pixels, so that few
different alpha masks exist and all can be cached.
"""

import io
import math
from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIZES = ("small", "large")
COLOURS = ("red", "green", "blue", "yellow", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross")
PICTURE = 96  # px
CELL = 16  # px
LATTICE = PICTURE // CELL
FEWEST, MOST = 1, 12  # things in a picture
FULLNESS = 2.0  # at 1 the number of things is log-uniform; above 1, full pictures are rarer
JPEG = {"format": "JPEG", "quality": 92, "subsampling": 0}

RGB = {
    "red": (226, 36, 40),
    "green": (40, 190, 60),
    "blue": (52, 92, 250),
    "yellow": (250, 216, 32),
    "white": (246, 246, 246),
}
RADIUS = {"small": 4.0, "large": 7.0}  # px
SUPERSAMPLING = 8
TILE = CELL + 2  # px; fits the largest thing with its jitter and a rim of one pixel


class Kind(NamedTuple):
    """The attributes of a thing, without its position."""

    size: str
    colour: str
    shape: str


class Thing(NamedTuple):
    """A thing in a scene: `y`, `x` is its centre in quarter pixels, `light` its brightness."""

    kind: Kind
    row: int
    column: int
    y: int
    x: int
    light: float


Scene = tuple[Thing, ...]
KINDS = tuple(Kind(s, c, f) for s in SIZES for c in COLOURS for f in SHAPES)


def draw_number(rng: np.random.Generator, most: int = MOST, fewest: int = FEWEST) -> int:
    """Draws the number of things in a picture, from `fewest` to `most`. Few are more likely than many (see FULLNESS)."""
    return int(fewest * ((most + 1) / fewest) ** (rng.random() ** FULLNESS))


def place(rng: np.random.Generator, kind: Kind, cell: tuple[int, int]) -> Thing:
    """Places a thing in a cell: a large one in its middle, a small one in one of its four patches, with some jitter."""
    light = float(rng.uniform(0.86, 1.0))
    if kind.size == "large":
        y, x = rng.integers(28, 37, 2)  # 8 px, give or take one
    else:
        y, x = 16 + 32 * rng.integers(0, 2, 2) + rng.integers(-2, 3, 2)  # 4 or 12 px, +-0.5
    row, column = cell
    return Thing(kind, row, column, int(y) + 4 * CELL * row, int(x) + 4 * CELL * column, light)


def arrange(rng: np.random.Generator, fixed: list[tuple[Kind, int, int]], others: list[Kind]) -> Scene:
    """Builds a scene from things at given (row, column) cells and others in random free cells."""
    taken = {(row, column) for _, row, column in fixed}
    free = [(i // LATTICE, i % LATTICE) for i in rng.permutation(LATTICE * LATTICE).tolist()]
    cells = (cell for cell in free if cell not in taken)
    things = [place(rng, kind, (row, column)) for kind, row, column in fixed]
    things += [place(rng, kind, cell) for kind, cell in zip(others, cells, strict=False)]
    return tuple(things)


def random_scene(rng: np.random.Generator, most: int = MOST, fewest: int = FEWEST) -> Scene:
    """Draws a scene of independent things."""
    number = draw_number(rng, most, fewest)
    return arrange(rng, [], [KINDS[i] for i in rng.integers(0, len(KINDS), number)])


def outline(shape: str, radius: float) -> list[tuple[float, float]]:
    """Returns the corners (x, y) of a shape around the origin. `radius` is about half its width."""
    if shape == "square":
        side = 0.86 * radius
        return [(-side, -side), (side, -side), (side, side), (-side, side)]
    if shape == "triangle":
        return [(0, -radius), (radius, 0.85 * radius), (-radius, 0.85 * radius)]
    if shape == "star":
        reach = [1.12 * radius if i % 2 == 0 else 0.42 * radius for i in range(10)]
        turns = [math.pi * i / 5 for i in range(10)]
        return [(r * math.sin(t), -r * math.cos(t)) for r, t in zip(reach, turns, strict=True)]
    arm = 0.3 * radius  # a cross
    corners = [(-arm, -radius), (arm, -radius), (arm, -arm)]
    turned = list(corners)
    for _ in range(3):
        corners = [(-y, x) for x, y in corners]
        turned += corners
    return turned


@cache
def alpha_mask(size: str, shape: str, y: int, x: int) -> np.ndarray:
    """Draws the coverage mask (TILE, TILE, 1) in 0..1 of a thing `y`, `x` quarter pixels off the centre of the tile."""
    scale = SUPERSAMPLING
    centre_y, centre_x = (scale * (TILE / 2 + offset / 4) for offset in (y, x))
    radius = scale * RADIUS[size]
    tile = Image.new("L", (TILE * scale, TILE * scale))
    pen = ImageDraw.Draw(tile)
    if shape == "circle":
        box = (centre_x - radius, centre_y - radius, centre_x + radius, centre_y + radius)
        pen.ellipse(box, fill=255)
    else:
        pen.polygon([(centre_x + a, centre_y + b) for a, b in outline(shape, radius)], fill=255)
    fine = np.asarray(tile, dtype=np.float32) / 255
    return fine.reshape(TILE, scale, TILE, scale).mean(axis=(1, 3))[..., None]


@cache
def pixel_grid() -> tuple[np.ndarray, np.ndarray]:
    """Returns the rows (PICTURE, 1) and columns (1, PICTURE) of all pixels."""
    line = np.arange(PICTURE, dtype=np.float32)
    return line[:, None], line[None, :]


def draw_clutter(rng: np.random.Generator) -> np.ndarray:
    """Draws faint strokes and specks, too thin to be things, as brightness to add (PICTURE, PICTURE)."""
    layer = Image.new("L", (PICTURE, PICTURE), 128)
    pen = ImageDraw.Draw(layer)
    strokes = rng.integers(2, 9)
    starts = rng.integers(0, PICTURE, (strokes, 2))
    ends = starts + rng.integers(-22, 23, (strokes, 2))
    shades = 128 + rng.integers(10, 24, strokes) * rng.choice((-1, 1), strokes)
    for start, end, shade in zip(starts.tolist(), ends.tolist(), shades.tolist(), strict=True):
        pen.line((*start, *end), fill=shade)
    clutter = np.asarray(layer, dtype=np.float32) - 128
    specks = rng.integers(0, PICTURE, (2, rng.integers(10, 60)))
    clutter[specks[0], specks[1]] += rng.uniform(-22, 22, specks.shape[1])
    return clutter


def draw_ground(rng: np.random.Generator) -> np.ndarray:
    """Draws a muted textured background (PICTURE, PICTURE, 3), brightness 0..255."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (6, 6)).astype(np.float32))
    hills = np.asarray(coarse.resize((PICTURE, PICTURE), Image.Resampling.BICUBIC))
    grain = rng.standard_normal((PICTURE, PICTURE), dtype=np.float32)
    angle, wave, phase = rng.uniform((0, 0.25, 0), (math.pi, 0.9, 6.28))
    rows, columns = pixel_grid()
    stripes = np.sin(wave * (math.cos(angle) * rows + math.sin(angle) * columns) + phase)
    level, hill, grit, stripe = rng.uniform((62, 6, 2, 1), (104, 16, 5, 6))
    grey = level + hill * hills + grit * grain + stripe * stripes + draw_clutter(rng)
    tint = 1 + rng.uniform(-0.09, 0.09, 3)
    return grey[..., None].astype(np.float32) * tint.astype(np.float32)


def draw(rng: np.random.Generator, scene: Scene) -> Image.Image:
    """Draws a scene. `rng` determines the background only; the scene determines everything else."""
    margin = TILE // 2  # padding, so that tiles may reach over the edge of the picture
    canvas = np.pad(draw_ground(rng), ((margin, margin), (margin, margin), (0, 0)))
    for kind, _, _, y, x, light in scene:
        top, left = (y + 2) // 4, (x + 2) // 4
        mask = alpha_mask(kind.size, kind.shape, y - 4 * top, x - 4 * left)
        corner_y, corner_x = top - TILE // 2 + margin, left - TILE // 2 + margin
        window = canvas[corner_y : corner_y + TILE, corner_x : corner_x + TILE]
        window += mask * (np.float32(light) * np.array(RGB[kind.colour], np.float32) - window)
    inner = canvas[margin:-margin, margin:-margin]
    return Image.fromarray(np.clip(inner, 0, 255).astype(np.uint8))


def encode(picture: Image.Image) -> bytes:
    """Encodes a picture as the bytes of a JPEG file."""
    buffer = io.BytesIO()
    picture.save(buffer, **JPEG)
    return buffer.getvalue()
