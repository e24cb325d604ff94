"""The tables' figures that read the runs' folders: the tokens that survive, tokens by complexity, the epochs, the batch size."""

import io
import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from PIL import Image

from engine.train import move
from tasks.registry import load_any_config, open_view
from tasks.view import Sample, View, spread
from tools.benchmarks.runs import open_run
from tools.demo import read_log
from tools.report import BAND
from tools.tables.complexity import things_by_sample
from tools.tables.figures import (
    Illustration,
    Panel,
    by_things,
    curves,
    gflops_by_batch,
    looks,
    method_of,
    new_figure,
    rank_correlation,
)
from tools.tables.plan import Row, Table
from tools.tables.render import Entries
from tools.visualize import DPI, draw, fade
from utils import UserError

CHECKPOINT, PREDICTIONS, LOG = "checkpoint_best.pth", "predictions_test.json", "log.txt"
DRAWN = (0.0, 0.5, 1.0)  # the samples are sorted by tokens kept, and those at these ranks are drawn
BATCHED = 128  # samples behind a point of GFLOPs by batch size
CELL, LINE, GAP = 1.3, 0.13, 0.08  # inches, of pictures side by side
Found = Mapping[str, Entries]  # row -> entries of its completed runs


def pairs_of(table: Table) -> list[tuple[Row, Row]]:
    """Returns the rows that are compared with another method at their own reduce ratio, with that other row, strongest first."""
    rows = {row.name: row for row in table.rows}
    pairs = [(row, rows[row.against]) for row in table.rows if row.ratio is not None and row.against]
    pairs = [(one, other) for one, other in pairs if other.ratio == one.ratio and method_of(one) != method_of(other)]
    return sorted(pairs, key=lambda pair: -(pair[0].ratio or 0))


def folder_with(file: str, entries: Entries) -> Path | None:
    """Returns the folder of the first run that has this file here; None where there is none."""
    folders = (Path(entry["folder"]) for entry in entries if entry.get("folder"))
    return next((folder for folder in folders if (folder / file).is_file()), None)


def illustrations(table: Table, found: Found) -> Iterator[Illustration]:
    """Yields a table's figures. Where something is missing, a figure says what."""
    parts = (
        ("beside", "The same pictures under both methods", beside),
        ("by_block", "Surviving patches and words by block", by_block),
        ("complexity", "Tokens kept by the number of things", complexity),
        ("epochs", "GFLOPs and temperature over the epochs", epochs),
        ("batch_size", "GFLOPs by batch size under max-keep", batch_size),
    )
    for file, title, make in parts:
        try:
            caption, panels = make(table, found)
            yield Illustration(file, title, caption, panels)
        except (UserError, OSError, ValueError, KeyError) as error:
            problem = f"lacks {error}" if isinstance(error, KeyError) else str(error)
            yield Illustration(file, title, missing=problem)


def beside(table: Table, found: Found) -> tuple[str, list[Panel]]:
    """Draws pictures after the last block of two methods, side by side (the paper's Fig. 3)."""
    for pair in pairs_of(table):
        folders = [folder_with(CHECKPOINT, found.get(row.name, [])) for row in pair]
        if all(folders):
            break
    else:
        raise UserError("no two methods at the same reduce ratio have their checkpoints here")
    ours, other = (open_run(folder) for folder in folders if folder)
    chosen, order = examples(ours, folders[0])
    drawn = {row.name: drawings(view, chosen) for row, view in ((pair[1], other), (pair[0], ours))}
    panels = [
        as_picture(side_by_side({name: samples[sample] for name, samples in drawn.items()}), 150, f"{sample} under both methods")
        for sample in chosen
    ]
    return f"What is left after the last block at reduce ratio {pair[0].ratio:g}; pale patches are pruned. {order}", panels


def by_block(table: Table, found: Found) -> tuple[str, list[Panel]]:
    """Draws the patches and words that survive each block (the paper's Fig. 4)."""
    row, folder = strongest(table, found, CHECKPOINT)
    view = open_run(folder)
    chosen, order = examples(view, folder)
    samples = drawings(view, chosen)
    panels = [as_picture(draw([samples[sample]]), DPI, f"{sample} by block", wide=True) for sample in chosen]
    return f"{row.name}: pale patches and struck-out words are pruned; below a picture is the number of patches. {order}", panels


def complexity(table: Table, found: Found) -> tuple[str, list[Panel]]:
    """Plots tokens kept and GFLOPs against the number of things in a sample's pictures, of all methods at the strongest ratio."""
    row, folder = strongest(table, found, PREDICTIONS)
    things = things_by_sample(load_any_config(folder / "config.yaml"))
    kept, cost, said = {}, {}, []
    for each in (other for other in table.rows if other.ratio == row.ratio):
        runs = [Path(entry["folder"]) for entry in found.get(each.name, []) if entry.get("folder")]
        rows = [predictions_of(run) for run in runs if (run / PREDICTIONS).is_file()]
        samples = [(things[sample], value) for run in rows for sample, value in run.items()]
        if samples:
            tokens = kept[method_of(each)] = [(number, value["tokens_kept"]) for number, value in samples]
            gflops = cost[method_of(each)] = [(number, value["gflops"]) for number, value in samples]
            seeds = f"{len(rows)} seed{'s' * (len(rows) > 1)}"
            said.append(f"{each.name}: {correlation(tokens)} and {correlation(gflops)} ({seeds})")
    caption = (
        f"Tokens left after the last block of all towers, and GFLOPs, at reduce ratio {row.ratio:g} on the test split: mean, and"
        f" the range from the {BAND[0]}th to the {BAND[1]}th percentile. Spearman's rank correlation over samples, of the tokens"
        f" and of the GFLOPs with the number of things: {'; '.join(said)}. The length of the text moves the numbers of every"
        " method, and a static one has no other reason to vary."
    )
    look = looks(table)
    return caption, [by_things(kept, look, "tokens kept"), by_things(cost, look, "GFLOPs per sample")]


def correlation(samples: Sequence[tuple[int, float]]) -> str:
    value = rank_correlation(*zip(*samples, strict=True))
    return "none (constant)" if value is None else f"{round(value, 2) + 0.0:+.2f}"


def epochs(table: Table, found: Found) -> tuple[str, list[Panel]]:
    """Plots GFLOPs and temperature over the epochs of the runs that are compared, one per reduce ratio."""
    logs, whole = {}, None
    for row, _ in reversed(pairs_of(table)):
        if (folder := folder_with(LOG, found.get(row.name, []))) is not None:
            logs[row.name] = read_log(folder)
            whole = found[row.name][0]["result"]["gflops"]["uncompressed"]
    if whole is None:
        raise UserError("no log.txt of a dynamic method's run at a reduce ratio is here")
    caption = (
        "Dashed: the target of each epoch; points: what the calibration subset measured at the calibrated temperature. Hollow:"
        " pruning began at a later block, where the target was still easy to meet. One run of each reduce ratio."
    )
    return caption, curves(logs, whole)


def batch_size(table: Table, found: Found) -> tuple[str, list[Panel]]:
    """Plots the GFLOPs of one checkpoint at its temperature against the batch size where a batch keeps the most that one needs."""
    row, folder = strongest(table, found, CHECKPOINT)
    measured, alone = gflops_by_batch_size(folder)
    caption = (
        f"{row.name}, one checkpoint at its own temperature, on the first {BATCHED} samples of the test split (or all, if there"
        " are fewer), GFLOPs in deployment: under max-keep a batch keeps as many tokens as its neediest sample, so larger batches"
        " cost more. No point is at p: the temperature was found for samples that each keep their own number of tokens (grey)."
    )
    return caption, [gflops_by_batch(measured, alone)]


@torch.no_grad()
def gflops_by_batch_size(folder: Path, samples: int = BATCHED) -> tuple[dict[int, float], float]:
    """Runs a run's selected checkpoint on the first test samples under max-keep in batches of 1, 2, 4, ...

    Args:
        samples: at most so many; the largest power of two among them is taken, so that all batches are full.
    Returns:
        batch size -> GFLOPs per sample in deployment, and those where each sample keeps its own number of tokens
    """
    found: dict[str, dict[int, float]] = {}
    for keep in ("max", "instance"):
        view = open_view(load_any_config(folder / "config.yaml", {"keep": keep}), folder / CHECKPOINT)
        number = 1 << (min(samples, len(view.ids)).bit_length() - 1)
        largest = min(number, view.config.batch_size_test)
        sizes = [1 << power for power in range(largest.bit_length())] if keep == "max" else [largest]
        items = [view.dataset[index] for index in range(number)]
        found[keep] = {}
        for size in sizes:
            costs = []
            for start in range(0, number, size):
                batch = move(view.collate(items[start : start + size]), view.run.device)
                with view.precision.autocast():
                    costs += view.gflops(batch, view.compute(batch)).tolist()
            found[keep][size] = sum(costs) / len(costs)
    return found["max"], next(iter(found["instance"].values()))


def strongest(table: Table, found: Found, file: str) -> tuple[Row, Path]:
    """Returns the compared row of the highest reduce ratio with this file in a run's folder here, and the folder."""
    for row, _ in pairs_of(table):
        if (folder := folder_with(file, found.get(row.name, []))) is not None:
            return row, folder
    raise UserError(f"no {file} of a dynamic method's run at a reduce ratio is here")


def examples(view: View, folder: Path | None) -> tuple[list[str], str]:
    """Returns the ids of a few test samples, and how they were chosen."""
    kept = predictions_of(folder) if folder and (folder / PREDICTIONS).is_file() else {}
    known = [sample for sample in view.ids if "tokens_kept" in kept.get(sample, {})]
    if not known:
        return spread(view.ids, len(DRAWN)), "The samples are evenly spaced in the test split."
    known.sort(key=lambda sample: kept[sample]["tokens_kept"])
    chosen = [known[round(rank * (len(known) - 1))] for rank in DRAWN]
    return list(dict.fromkeys(chosen)), "The test samples of which it keeps the fewest, a middling number and the most tokens."


def predictions_of(folder: Path) -> dict[str, dict]:
    return json.loads((folder / PREDICTIONS).read_text(encoding="utf-8"))


def drawings(view: View, ids: Sequence[str]) -> dict[str, Sample]:
    return {sample.id: sample for batch in view.batches(ids) for sample in view.samples(batch)}


def side_by_side(samples: Mapping[str, Sample]) -> Figure:
    """Draws one sample after the last block: a row per picture, in columns the picture and each method.

    samples: method -> the sample under it
    """
    first = next(iter(samples.values()))
    words = [" ".join(words) for words, _ in first.texts] + [f"{name}: {each.heading}" for name, each in samples.items()]
    lines = [line for text in words for line in textwrap.wrap(text, 66)]
    width = (1 + len(samples)) * CELL + GAP
    height = len(first.pictures) * (CELL + LINE) + LINE * (len(lines) + 2)
    drawn = new_figure((width, height))
    drawn.set_layout_engine("none")

    def write(x: float, y: float, text: str, **look) -> None:
        drawn.text(x / width, y / height, text, fontsize=7, parse_math=False, va="center", **look)

    for place, (label, picture, _) in enumerate(first.pictures):
        below = height - LINE - (place + 1) * (CELL + LINE)
        columns = [(label, picture, None)]
        columns += [
            (name, fade(picture, each.pictures[place][2][-1]), each.pictures[place][2][-1]) for name, each in samples.items()
        ]
        for column, (heading, shown, alive) in enumerate(columns):
            left = GAP + column * CELL
            axes = drawn.add_axes((left / width, (below + LINE) / height, (CELL - GAP) / width, (CELL - GAP) / height))
            axes.axis("off")
            axes.imshow(shown, interpolation="nearest")
            number = "" if alive is None else f": {int(alive.sum())} of {alive.size}"
            write(left + (CELL - GAP) / 2, below + LINE / 2, f"{heading}{number}", ha="center")
    for place, line in enumerate(lines):
        write(GAP, LINE * (len(lines) - place), line)
    return drawn


def as_picture(drawn: Figure, dpi: int, description: str, wide: bool = False) -> Panel:
    """Returns a drawing as PNG with a palette: half the bytes. The palette covers rare colours too, such as a yellow star's."""
    buffer, small = io.BytesIO(), io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=dpi)
    picture = Image.open(buffer).convert("RGB")
    picture.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=2, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return Panel("png", small.getvalue(), description, wide)
