"""The demo's report: a self-contained HTML file, the same for every task.

Numbers come from the runs' result.json and log.txt. Curves are embedded as SVG, pictures as PNG.
"""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, ScalarFormatter

from tasks.registry import TASKS

DENSE, COLOURS = "#6b7280", ("#2563a8", "#c2570c", "#2f7d4f", "#8b4a9c")
BAND = (10, 90)  # percentiles of the shaded range
NO_BREAK = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class ReportedRun:
    """The data of a run for the report.

    result: the content of result.json
    log: the entries of log.txt; empty for a run that only evaluated
    images_per_second: measured on this machine
    tokens: tower -> (samples, 1 + blocks) number of tokens that enter the first block and that leave each block
    """

    result: Mapping
    log: Sequence[Mapping]
    images_per_second: float
    tokens: Mapping[str, np.ndarray]

    @property
    def compressed(self) -> bool:
        return self.result["reduce_ratio"] > 0

    @property
    def label(self) -> str:
        return f"p = {self.result['reduce_ratio']:g}" if self.compressed else "uncompressed"


@dataclass(frozen=True)
class Picture:
    caption: str
    png: bytes


def table(runs: Sequence[ReportedRun]) -> list[list[str]]:
    """Returns the rows of the comparison, the header first. The other runs are compared with the first run."""
    rows = [_cells(run, runs[0]) for run in runs]
    return [list(rows[0]), *(list(row.values()) for row in rows)]


def _cells(run: ReportedRun, first: ReportedRun) -> dict[str, str]:
    """Returns the cells of a run by column title. The cost in deployment is shown if it differs from the one that p counts."""
    gflops, whole = run.result["gflops"], first.result["gflops"]
    cells = {"model": run.label}
    for number, (words, names) in enumerate(TASKS[run.result["task"]].columns.items()):
        for split in ("test", "val") if number == 0 else ("test",):
            scores = [run.result["metrics"][split][name] for name in names]
            cells[f"{words} ({split})"] = " / ".join(f"{score:.{2 if len(names) == 1 else 1}f}" for score in scores)
    cells["GFLOPs"] = f"{gflops['measured']:.4f}"
    cells["fewer"] = _fewer(gflops["measured"], gflops["uncompressed"])
    cells["GFLOPs (test)"] = f"{gflops['test']:.4f}"
    if whole["deployment"] != whole["measured"]:
        cells["GFLOPs (deployment)"] = f"{gflops['deployment']:.4f}"
        cells["fewer (deployment)"] = _fewer(gflops["deployment"], whole["deployment"])
    cells["temperature"] = _strength(run)
    cells["parameters, M"] = f"{run.result['params']['total'] / 1e6:.2f}"
    cells["images/s"] = f"{run.images_per_second:.0f}"
    cells["speed-up"] = f"{run.images_per_second / first.images_per_second:.2f}x"
    return cells


def _fewer(gflops: float, whole: float) -> str:
    return f"{100 * (1 - gflops / whole):.1f} %"


def _strength(run: ReportedRun) -> str:
    temperature, first_block = run.result["temperature"], run.result["prune_from"]
    text = "-" if temperature is None else f"{temperature:.4g}"
    return f"{text} from block {first_block + 1}" if first_block else text


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows as a text table. The first column is left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        first, *others = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        lines.append("  ".join([first.strip().ljust(widths[0]), *others]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def budget_figure(runs: Sequence[ReportedRun]) -> Figure:
    """Plots the GFLOPs with their target, and the temperature, over the epochs."""
    figure = Figure(figsize=(9.2, 3.1), layout="constrained")
    gflops, temperature = figure.subplots(1, 2)
    gflops.axhline(runs[0].result["gflops"]["uncompressed"], color=DENSE, linewidth=1.2, label="uncompressed")
    for run, colour in _coloured(runs):
        epochs = [entry["epoch"] + 1 for entry in run.log]
        measured = [entry["gflops"]["measured"] for entry in run.log]
        targets = [entry["gflops"]["target"] for entry in run.log]
        strengths = [entry["temperature"] for entry in run.log]
        gflops.step(epochs, targets, where="mid", color=colour, linewidth=1, linestyle="--", label=f"{run.label}, target")
        gflops.plot(epochs, measured, color=colour, marker="o", markersize=5, linestyle="none", label=f"{run.label}, measured")
        temperature.plot(epochs, strengths, color=colour, marker="o", markersize=4, label=run.label)
    gflops.set(xlabel="epoch", ylabel="GFLOPs per sample")
    gflops.set_ylim(bottom=0)
    temperature.set(xlabel="epoch", ylabel="temperature T")
    scale_by_factors(temperature)
    for axes in (gflops, temperature):
        style(axes)
    return figure


def tokens_figure(runs: Sequence[ReportedRun]) -> Figure:
    """Plots the tokens after each block: the mean over samples, and the range between the percentiles BAND."""
    towers = list(runs[0].tokens)
    figure = Figure(figsize=(9.2, 3.1), layout="constrained")
    for axes, tower in zip(np.atleast_1d(figure.subplots(1, len(towers))), towers, strict=True):
        for run, colour in [(run, DENSE) for run in runs if not run.compressed] + _coloured(runs):
            tokens = run.tokens[tower]
            blocks = range(tokens.shape[1])
            if run.compressed:
                axes.fill_between(blocks, *np.percentile(tokens, BAND, axis=0), color=colour, alpha=0.18, linewidth=0)
            axes.plot(blocks, tokens.mean(axis=0), color=colour, marker="o", markersize=3.5, label=run.label)
        axes.set(xlabel="block (0: what enters the first)", ylabel="tokens", title=f"{tower} tower")
        axes.set_ylim(bottom=0)
        style(axes)
    return figure


def _coloured(runs: Sequence[ReportedRun]) -> list[tuple[ReportedRun, str]]:
    compressed = [run for run in runs if run.compressed]
    return [(run, COLOURS[i % len(COLOURS)]) for i, run in enumerate(compressed)]


def scale_by_factors(axes) -> None:
    """Gives the y axis a logarithmic scale whose labels do not overlap, whether it spans a small factor or decades."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    narrow, wide = 5, 100
    axes.yaxis.set_major_locator(
        MaxNLocator(5) if high / low < narrow else LogLocator(subs=(1, 2, 5) if high / low < wide else (1,), numticks=6)
    )
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())


def style(axes) -> None:
    """Gives axes with a whole number along x the look of the report."""
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e7eb", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, fontsize=8)


def write_report(
    path: Path,
    title: str,
    runs: Sequence[ReportedRun],
    notes: Sequence[str],
    samples: int,
    pictures: Sequence[Picture],
    commands: Sequence[str],
) -> None:
    """Writes the report.

    Args:
        path: the HTML file.
        title: the heading.
        runs: the uncompressed run first.
        notes: sentences that explain the numbers of the table.
        samples: number of test samples in the plot of tokens.
        pictures: drawings of single samples.
        commands: the commands that made the runs, for the reader to repeat.
    """
    header, *rows = table(runs)
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        "<h2>Uncompressed and compressed</h2>",
        _html_table(header, rows),
        "<ul class=notes>" + "".join(f"<li>{html.escape(note)}</li>" for note in notes) + "</ul>",
        "<h2>The GFLOPs budget, epoch by epoch</h2>",
        _svg(budget_figure(runs), "GFLOPs and temperature per epoch"),
        "<p>After each epoch the temperature is calibrated again, so that the calibration subset meets the target."
        " The target falls over the first epochs. The uncompressed model is only evaluated.</p>",
        "<h2>Tokens kept, block by block</h2>",
        _svg(tokens_figure(runs), "tokens kept per block"),
        f"<p>Mean over {samples} test samples; the band is the range from the {BAND[0]}th to the {BAND[1]}th percentile."
        " The class token and the merged token are counted, padding is not.</p>",
        "<h2>Which patches and words survive</h2>",
        "<p>Pale patches and struck-out words are pruned. The number below an image is the number of patches kept."
        " A token in brackets begins or ends a text. The GFLOPs above are the cost of the sample in deployment.</p>",
        *map(_figure, pictures),
        "<h2>Commands</h2>",
        f"<pre>{html.escape(chr(10).join(commands))}</pre>",
    ]
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{escaped(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<div class=wide><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def escaped(text: str) -> str:
    """Returns a text for HTML, in which a number and its % stay on one line."""
    return html.escape(text.replace(" %", f"{NO_BREAK}%"))


def _figure(picture: Picture) -> str:
    shown = image("png", picture.png, picture.caption)
    return f"<figure><figcaption>{html.escape(picture.caption)}</figcaption>{shown}</figure>"


def _svg(figure: Figure, description: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return image("svg+xml", buffer.getvalue(), description, "plot")


def image(kind: str, content: bytes, description: str, name: str = "") -> str:
    """Returns an element of HTML that holds a picture.

    Args:
        kind: svg+xml or png.
        description: for those who do not see it.
        name: of its class, for the style.
    """
    shown = f'class="{name}" ' if name else ""
    return f'<img {shown}src="data:image/{kind};base64,{base64.b64encode(content).decode()}" alt="{html.escape(description)}">'


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { max-width: 1180px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; width: 100%; }
th, td { padding: .35rem .7rem; text-align: right; border-bottom: 1px solid #e5e7eb; }
td { white-space: nowrap; }
th { font-weight: 600; font-size: .85rem; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
.wide { overflow-x: auto; } .notes { color: #4b5563; font-size: .9rem; }
img { max-width: 100%; } .plot { width: 100%; } figure { margin: 1.4rem 0; } figcaption { font-weight: 600; margin-bottom: .3rem; }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; font-size: .85rem; }
"""
