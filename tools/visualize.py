"""Draws the patches and words that a compressed model keeps, block by block (like Fig. 4 of the paper).

    python tools/visualize.py --config output/demo/nlvr_p0.5/config.yaml --checkpoint output/demo/nlvr_p0.5/checkpoint_best.pth

There is a row per image and a column per block; pruned patches fade. Below is the text after each text layer, with pruned words
grey and struck out, and then the prediction. Each sample is written to <out>/<id>.png. If --out ends in .png, all samples are drawn
on one sheet.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from engine.restore import saved_rule
from models.weights.reading import read_checkpoint
from tasks.registry import TASKS, load_any_config, open_view
from tasks.view import Sample, spread
from utils import UserError, home_expanded, run_main, user_path

# Sizes (in inches), font sizes (in points) and colours of a drawing.
CELL, COUNT, MARGIN, LABEL, LINE, HEAD = 1.1, 0.13, 0.08, 0.75, 0.17, 0.28
FONT, SMALL, GLYPH = 9, 7, 0.602  # GLYPH: width of a monospaced letter relative to its font size
DPI = 110
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
VEIL, FADE = (0.91, 0.92, 0.97), 0.85  # colour and opacity over a pruned patch; this pale blue is rare in images
BLACK, GREY = "#1a1a1a", "#b4b4b4"


def draw(samples: Sequence[Sample]) -> Figure:
    """Draws all samples on one sheet, one below the other."""
    columns = 1 + max((alive.shape[0] for sample in samples for _, _, alive in sample.pictures), default=0)
    width = LABEL + columns * CELL + MARGIN
    heights = [_height(sample) for sample in samples]
    figure = Figure(figsize=(width, sum(heights)), facecolor="white")
    top = sum(heights)
    for sample, height in zip(samples, heights, strict=True):
        _draw_sample(figure, sample, width, top)
        top -= height
    return figure


def _height(sample: Sample) -> float:
    lines = sum(1.5 + len(alive) for _, alive in sample.texts) + (0.5 + len(sample.said) if sample.said else 0)
    return HEAD + LINE + len(sample.pictures) * (CELL + COUNT) + lines * LINE + 2 * MARGIN


def _draw_sample(figure: Figure, sample: Sample, width: float, top: float) -> None:
    """Draws a sample downwards from `top`. Positions are in inches from the lower left corner of the sheet."""
    page = figure.get_size_inches()

    def axes(x: float, y: float, w: float, h: float):
        area = figure.add_axes((x / page[0], y / page[1], w / page[0], h / page[1]))
        area.axis("off")
        return area

    def write(x: float, y: float, text: str, **style) -> None:
        style = {"fontsize": FONT, "color": BLACK, "va": "center", **style}
        figure.text(x / page[0], y / page[1], text, parse_math=False, **style)  # $ in a sentence is a dollar

    write(MARGIN, top - HEAD / 2, sample.heading, fontweight="bold")
    y = top - HEAD - LINE
    for number, (label, picture, alive) in enumerate(sample.pictures):
        y -= CELL + COUNT
        write(MARGIN, y + COUNT + CELL / 2, label)
        for column in range(1 + len(alive)):
            shown = picture if column == 0 else fade(picture, alive[column - 1])
            area = axes(LABEL + column * CELL, y + COUNT, CELL - MARGIN, CELL - MARGIN)
            area.imshow(shown, interpolation="nearest" if min(picture.shape[:2]) < DPI else "antialiased")
            middle = LABEL + (column + 0.5) * CELL - MARGIN / 2
            count = alive[0].size if column == 0 else int(alive[column - 1].sum())
            write(middle, y + COUNT / 2, str(count), ha="center", fontsize=SMALL)
            if number == 0:
                write(middle, y + CELL + COUNT + 0.02, f"block {column}" if column else "input", ha="center")
    for words, alive in sample.texts:
        y -= LINE / 2
        letters = sum(len(word) + 1 for word in words)
        size = min(FONT, (width - LABEL - MARGIN) * 72 / (letters * GLYPH))
        for layer in range(1 + len(alive)):
            y -= LINE
            write(MARGIN, y, f"layer {layer}" if layer else "text")
            x = LABEL
            for place, word in enumerate(words):
                pruned = layer > 0 and not alive[layer - 1][place]
                length = len(word) * GLYPH * size / 72
                write(x, y, word, family="monospace", fontsize=size, color=GREY if pruned else BLACK)
                if pruned:
                    ends = ((x / page[0], (x + length) / page[0]), (y / page[1], y / page[1]))
                    figure.add_artist(Line2D(*ends, color=GREY, linewidth=0.8))
                x += length + GLYPH * size / 72
    y -= LINE / 2
    for label, text in sample.said:
        y -= LINE
        write(MARGIN, y, label)
        write(LABEL, y, text)


def fade(picture: np.ndarray, alive: np.ndarray) -> np.ndarray:
    """Fades the pruned patches of an image. (H, W, 3), (rows, columns) bool -> (H, W, 3)."""
    rows, columns = (side // patches for side, patches in zip(picture.shape[:2], alive.shape, strict=True))
    pruned = ~np.kron(alive, np.ones((rows, columns), dtype=bool)).astype(bool)
    return np.where(pruned[..., None], FADE * np.array(VEIL) + (1 - FADE) * picture, picture)


def _file_name(sample: str) -> str:
    path = PurePosixPath(sample)
    path = path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path
    return f"{'_'.join(path.relative_to(path.anchor).parts)}.png"


def write_drawings(samples: Sequence[Sample], out: Path) -> list[Path]:
    """Writes a PNG file per sample to the folder `out`, or all on one sheet if `out` ends in .png. Returns the paths.

    An id may be the path of an image; the file is then named by that path, so that no two images share a name.
    """
    sheets = [(out / _file_name(sample.id), [sample]) for sample in samples]
    if out.suffix == ".png":
        sheets = [(out, list(samples))]
    for path, shown in sheets:
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(shown).savefig(path, dpi=DPI)
    return [path for path, _ in sheets]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=home_expanded, required=True, metavar="FILE", help="config.yaml of the run")
    parser.add_argument("--checkpoint", type=home_expanded, required=True, metavar="FILE", help="checkpoint of the run")
    parser.add_argument("--task", choices=TASKS, help="the task, if the config has no key 'task'")
    parser.add_argument("--temperature", type=float, help="prune at this temperature instead of the checkpoint's")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--samples", type=int, default=6, metavar="N", help="draw N test samples, evenly spaced")
    chosen.add_argument("--ids", nargs="+", metavar="ID", help="draw these test samples; retrieval: the paths of their images")
    parser.add_argument("--out", type=user_path, default=Path("output/visualize"), help="a folder, or a .png file for one sheet")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda if available")
    args = parser.parse_args()
    if args.samples < 1:
        raise UserError(f"--samples must be at least 1, got {args.samples}")
    saved = read_checkpoint(args.checkpoint)
    view = open_view(load_any_config(args.config, saved_rule(saved), args.task), args.checkpoint, args.device, args.temperature)
    ids = args.ids or spread(view.ids, args.samples)
    samples = [sample for batch in view.batches(ids) for sample in view.samples(batch)]
    for path in write_drawings(samples, args.out):
        print(path)


if __name__ == "__main__":
    run_main(main)
