"""The tables' figures: accuracy against cost, paired differences, tokens by complexity, and curves, as plots of completed runs."""

import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from tools.report import BAND, scale_by_factors
from tools.tables.plan import Row, Table, figure
from tools.tables.render import Entries, compare

SIZE = (4.4, 3.3)  # inches: at the width of a phone its letters are still legible
GREY, COLOURS = "#6b7280", ("#2563a8", "#c2570c", "#2f7d4f", "#8b4a9c", "#a87b00", "#0e7490")
MARKERS = "osD^vP"
NORMAL_95 = 1.96  # half the 95 % interval of a normal distribution, in standard errors
FEWEST_SAMPLES = 5  # behind a point of tokens by complexity
UNCOMPRESSED, COST = "uncompressed", "gflops.measured"


@dataclass(frozen=True)
class Panel:
    """A plot or a drawing.

    kind: svg or png
    description: for those who do not see it
    wide: it is wider than a phone, where it scrolls
    """

    kind: str
    content: bytes
    description: str
    wide: bool = False


@dataclass(frozen=True)
class Illustration:
    """A figure with its caption. Where its data are missing, `missing` says what, and there are no panels.

    name: of its files, without their ending
    """

    name: str
    title: str
    caption: str = ""
    panels: Sequence[Panel] = ()
    missing: str = ""


@dataclass(frozen=True)
class Point:
    """A row in the plane of cost and accuracy. The errors are standard deviations over seeds; None for one seed."""

    row: str
    cost: float
    accuracy: float
    error: float | None = None
    seeds: int = 0


@dataclass(frozen=True)
class Interval:
    """A compared row: the difference in percent points and its 95 % interval over the test samples."""

    row: str
    against: str
    difference: float
    low: float
    high: float
    seeds: int


def main_column(table: Table) -> str:
    """Returns the heading of a table's first figure of the test split."""
    return next((name for name, place in table.columns.items() if place.startswith("metrics.test")), "")


def cost_column(table: Table) -> str:
    """Returns the heading of a table's GFLOPs; empty if it has none."""
    return next((name for name, place in table.columns.items() if place == COST), "")


def method_of(row: Row) -> str:
    """Returns the name of a row without its reduce ratio."""
    return row.name.removesuffix(f" {row.ratio:g}") if row.ratio is not None else row.name


def methods_of(table: Table) -> list[str]:
    """Returns the methods of rows with a reduce ratio: those that are compared with another come first."""
    rows = [row for row in table.rows if row.ratio is not None]
    return list(dict.fromkeys(method_of(row) for row in sorted(rows, key=lambda row: not row.against)))


def looks(table: Table) -> dict[str, dict[str, str]]:
    """Returns the colour and marker of each method of a table, the same in all its figures."""
    return {
        method: {"color": COLOURS[i % len(COLOURS)], "marker": MARKERS[i % len(MARKERS)]}
        for i, method in enumerate(methods_of(table))
    }


def measured_points(table: Table, found: Mapping[str, Entries]) -> list[Point]:
    """Returns the points of the rows with completed runs."""
    points = []
    for row in table.rows:
        pairs = [
            (figure(e["result"], COST), figure(e["result"], table.columns[main_column(table)])) for e in found.get(row.name, [])
        ]
        known = [(cost, score) for cost, score in pairs if cost is not None and score is not None]
        if known:
            costs, scores = zip(*known, strict=True)
            error = statistics.stdev(scores) if len(scores) > 1 else None
            points.append(Point(row.name, statistics.fmean(costs), statistics.fmean(scores), error, len(scores)))
    return points


def published_points(table: Table) -> list[Point]:
    """Returns the paper's points relative to its uncompressed model: percent of the GFLOPs, and the difference in accuracy."""
    names = list(table.columns)
    places = names.index(cost_column(table)), names.index(main_column(table))
    figures = {
        row.name: [(row.paper or row.published)[place] for place in places] for row in table.rows if row.paper or row.published
    }
    whole = next((pair for name, pair in figures.items() if name.casefold() == UNCOMPRESSED), None)
    if whole is None or None in whole:
        return []
    return [
        Point(name, 100 * cost / whole[0], score - whole[1]) for name, (cost, score) in figures.items() if None not in (cost, score)
    ]


def accuracy(name: str, table: Table, found: Mapping[str, Entries]) -> Illustration:
    """Plots accuracy against GFLOPs, and the paper's figures beside it (the paper's Fig. 1)."""
    title, label = "Accuracy against GFLOPs", main_column(table)
    if not label or not cost_column(table):
        return Illustration("accuracy", title, missing=f"Table {name} has no column of the test split, or none of {COST}")
    ours = measured_points(table, found)
    rows = {row.name: row for row in table.rows}
    if not any(rows[point.row].ratio is not None for point in ours):
        return Illustration("accuracy", title, missing=f"no row of Table {name} at a reduce ratio has a completed run")
    panels = [as_panel(_plane(table, ours, "GFLOPs per sample", label), f"{label} against GFLOPs, measured")]
    seeds = sorted({point.seeds for point in ours})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    caption = (
        f"Measured here, on the test split ({table.title}): mean over {number} seed{'s' * (seeds[-1] > 1)};"
        " the bars are standard deviations over seeds, where there are several. GFLOPs are those of the calibration subset."
    )
    if theirs := published_points(table):
        drawn = _plane(table, theirs, "GFLOPs, % of the uncompressed model", "difference to it, points")
        drawn.suptitle("published, on other data and models", fontsize=9)
        panels.append(as_panel(drawn, f"{label} against GFLOPs, published"))
        caption += (
            " On axes of their own: the paper's figures, relative to its uncompressed model, on the real data. They are no runs of"
            " this code."
        )
    missing = [row.name for row in table.rows if row.ratio is not None and row.run is not None and not found.get(row.name)]
    caption += f" Not run yet: {'; '.join(missing)}." if missing else ""
    return Illustration("accuracy", title, caption, panels)


def _plane(table: Table, points: Sequence[Point], xlabel: str, ylabel: str) -> Figure:
    """Plots points by method, one line each; the uncompressed model is a cross."""
    drawn, rows, shown = new_figure(), {row.name: row for row in table.rows}, looks(table)
    axes = drawn.subplots()
    for method, look in shown.items():
        mine = [p for p in points if rows[p.row].ratio is not None and method_of(rows[p.row]) == method]
        mine.sort(key=lambda point: point.cost)
        if mine:
            errors = [point.error or 0.0 for point in mine] if any(point.error for point in mine) else None
            axes.errorbar(
                [point.cost for point in mine], [point.accuracy for point in mine], errors,
                capsize=3, markersize=4.5, linewidth=1.3, label=plain(method), **look,
            )  # fmt: skip
    for point in points:
        if point.row.casefold() == UNCOMPRESSED:
            axes.plot([point.cost], [point.accuracy], "X", color=GREY, markersize=7, label=UNCOMPRESSED)
    axes.set(xlabel=xlabel, ylabel=plain(ylabel))
    axes.set_xlim(left=0)
    finish(axes)
    return drawn


def intervals(table: Table, found: Mapping[str, Entries]) -> list[Interval]:
    """Returns the compared rows whose samples both have been scored."""
    shown = []
    for row in table.rows:
        result = compare(found.get(row.name, []), found.get(row.against, [])) if row.against else None
        if result is not None:
            half = NORMAL_95 * result.sample_error
            mean = result.difference
            shown.append(Interval(row.name, row.against, mean, mean - half, mean + half, result.seeds))
    return shown


def forest(name: str, table: Table, found: Mapping[str, Entries]) -> Illustration:
    """Plots the difference of each compared row with its interval."""
    title, shown = "Paired differences", intervals(table, found)
    if not shown:
        problem = "no row has runs scored sample by sample, and the row that it is compared with the same seeds"
        return Illustration("differences", title, missing=f"in Table {name} {problem}")
    drawn = new_figure((SIZE[0], 0.7 + 0.42 * len(shown)))
    axes = drawn.subplots()
    axes.axvline(0, color=GREY, linewidth=1)
    for place, each in enumerate(shown):
        clear = each.low > 0 or each.high < 0
        colour = COLOURS[0] if clear else GREY
        axes.plot([each.low, each.high], [-place, -place], color=colour, linewidth=1.6, solid_capstyle="butt")
        axes.plot([each.difference], [-place], "o", color=colour, markersize=5)
        words = f"{each.row} against {each.against} ({each.seeds} seed{'s' * (each.seeds > 1)})"
        axes.annotate(
            plain(words), (0, -place), (0, 5), xycoords=("axes fraction", "data"), textcoords="offset points", fontsize=7,
            bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 0.5},
        )  # fmt: skip
    axes.set(xlabel="difference on the test split, percent points", ylim=(0.4 - len(shown), 0.75), yticks=[])
    axes.spines[["top", "right", "left"]].set_visible(False)
    caption = (
        "Difference of each row's test scores to those of the row that it is compared with, sample by sample over the seeds that"
        " both have, and its 95 % interval over the test samples (blue: without 0). The interval says how much other samples"
        " might change the difference, not how much other seeds would, and is not corrected for the number of rows."
    )
    return Illustration("differences", title, caption, [as_panel(drawn, "differences with their intervals")])


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Returns Spearman's rank correlation; None where one of the two does not vary."""
    ranks = np.array([_ranks(np.asarray(values, dtype=float)) for values in (one, other)])
    ranks -= ranks.mean(axis=1, keepdims=True)
    scale = math.sqrt((ranks[0] ** 2).sum() * (ranks[1] ** 2).sum())
    return float((ranks[0] * ranks[1]).sum() / scale) if scale else None


def _ranks(values: np.ndarray) -> np.ndarray:
    """Returns the rank of each value; equal ones share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[where]


def by_things(samples: Mapping[str, Sequence[tuple[int, float]]], shown: Mapping[str, dict[str, str]], ylabel: str) -> Panel:
    """Plots a figure of samples against their number of things, by method: the mean, and the range between the percentiles BAND.

    samples: method -> things and figure of each sample
    shown: method -> its look
    """
    drawn = new_figure()
    axes = drawn.subplots()
    for method, pairs in samples.items():
        groups: dict[int, list[float]] = {}
        for things, value in pairs:
            groups.setdefault(things, []).append(value)
        places = sorted(things for things, values in groups.items() if len(values) >= FEWEST_SAMPLES)
        look = {"color": GREY, **shown.get(method, {})}
        if places:
            bands = np.array([np.percentile(groups[place], BAND) for place in places]).T
            axes.fill_between(places, *bands, color=look["color"], alpha=0.15, linewidth=0)
            means = [statistics.fmean(groups[place]) for place in places]
            axes.plot(places, means, markersize=3.5, linewidth=1.3, label=plain(method), **look)
    axes.set(xlabel="things in the sample's pictures", ylabel=ylabel)
    axes.set_ylim(bottom=0)
    finish(axes, whole=True)
    return as_panel(drawn, f"{ylabel} against the number of things")


def curves(logs: Mapping[str, Sequence[Mapping]], uncompressed: float) -> list[Panel]:
    """Plots the GFLOPs with their target, and the temperature, over the epochs.

    logs: label -> entries of log.txt
    """
    cost, heat = new_figure(), new_figure()
    gflops, temperature = cost.subplots(), heat.subplots()
    gflops.axhline(uncompressed, color=GREY, linewidth=1.2, label=UNCOMPRESSED)
    for number, (label, log) in enumerate(logs.items()):
        look = {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)], "markersize": 4}
        epochs = [entry["epoch"] + 1 for entry in log]
        gflops.step(
            epochs, [entry["gflops"]["target"] for entry in log], where="mid", color=look["color"], linestyle="--", linewidth=1
        )
        gflops.plot(epochs, [entry["gflops"]["measured"] for entry in log], linestyle="none", label=plain(label), **look)
        temperature.plot(epochs, [entry["temperature"] for entry in log], linewidth=1.3, label=plain(label), **look)
        later = [entry for entry in log if entry.get("prune_from", 0) > log[-1].get("prune_from", 0)]
        hollow = {**look, "markerfacecolor": "white", "zorder": 3}
        temperature.plot([e["epoch"] + 1 for e in later], [e["temperature"] for e in later], linestyle="none", **hollow)
    gflops.set(xlabel="epoch", ylabel="GFLOPs per sample")
    gflops.set_ylim(bottom=0)
    temperature.set(xlabel="epoch", ylabel="temperature T")
    scale_by_factors(temperature)
    for axes in (gflops, temperature):
        finish(axes, whole=True)
    return [as_panel(cost, "GFLOPs per epoch"), as_panel(heat, "temperature per epoch")]


def gflops_by_batch(measured: Mapping[int, float], alone: float) -> Panel:
    """Plots GFLOPs against the batch size under max-keep; `alone` are those where each sample keeps its own tokens."""
    drawn = new_figure()
    axes = drawn.subplots()
    axes.axhline(alone, color=GREY, linewidth=1.2, label="each sample its own")
    axes.plot(list(measured), list(measured.values()), color=COLOURS[0], marker="o", markersize=4.5, label="the most of the batch")
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(measured), [str(size) for size in measured])
    axes.minorticks_off()
    axes.set(xlabel="batch size", ylabel="GFLOPs per sample")
    axes.set_ylim(bottom=0)
    finish(axes)
    return as_panel(drawn, "GFLOPs against the batch size")


def new_figure(size: tuple[float, float] = SIZE) -> Figure:
    return Figure(figsize=size, layout="constrained", facecolor="white")


def finish(axes, whole: bool = False) -> None:
    """Gives axes the look of the page, with the legend above, where it hides nothing.

    whole: x counts something
    """
    if whole:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    place = {"loc": "lower left", "bbox_to_anchor": (-0.02, 1.0), "ncols": 3}
    axes.legend(frameon=False, fontsize=8, handlelength=1.6, columnspacing=1.2, borderaxespad=0.2, **place)


def plain(text: str) -> str:
    """Returns a text that matplotlib shows as it is: between dollars it would read a formula."""
    return text.replace("$", r"\$")


def as_panel(drawn: Figure, description: str) -> Panel:
    """Returns a plot as SVG, the same bytes each time. Its text stays text, which is small and can be searched."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "tables", "svg.fonttype": "none"}):
        drawn.savefig(buffer, format="svg", metadata={"Date": None})
    return Panel("svg", buffer.getvalue(), description)
