"""Tables from completed runs, as Markdown and CSV: in the paper's layout, with its figures beside ours and nothing filled in."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tools.tables.plan import Row, Table, figure
from tools.tables.run import DIGITS, STEPS

Entries = Sequence[Mapping[str, Any]]  # of one row in a ledger, by seed
NOT_RUN, OUT_OF_REACH = "not run", "out of reach"


@dataclass(frozen=True)
class Comparison:
    """The difference of two rows' test scores in percent points, over the seeds that both have.

    difference: mean over samples and seeds
    sample_error: standard error over samples of the mean over seeds
    seed_error: standard deviation of the difference between seeds; None for one seed
    """

    difference: float
    sample_error: float
    seed_error: float | None
    seeds: int

    @property
    def p_value(self) -> float:
        """Two-sided, of a paired test over the samples (normal approximation: there are hundreds)."""
        if self.sample_error == 0:
            return 0.0 if self.difference else 1.0
        return math.erfc(abs(self.difference) / self.sample_error / math.sqrt(2))


def compare(ours: Entries, others: Entries) -> Comparison | None:
    """Compares two rows sample by sample; None without samples that both have scored."""
    by_seed = {entry["result"]["seed"]: entry["scores"] for entry in others}
    pairs = [(entry["scores"], by_seed.get(entry["result"]["seed"], "")) for entry in ours]
    pairs = [(one, other) for one, other in pairs if one and len(one) == len(other)]
    if not pairs:
        return None
    values = {digit: 100 * place / STEPS for place, digit in enumerate(DIGITS)}
    differences = [[values[a] - values[b] for a, b in zip(one, other, strict=True)] for one, other in pairs]
    samples = [statistics.fmean(column) for column in zip(*differences, strict=True)]
    seeds = [statistics.fmean(each) for each in differences]
    return Comparison(
        statistics.fmean(samples),
        statistics.stdev(samples) / math.sqrt(len(samples)) if len(samples) > 1 else 0.0,
        statistics.stdev(seeds) if len(seeds) > 1 else None,
        len(seeds),
    )


def header(table: Table) -> list[str]:
    """Returns the headings: ours, and behind them the paper's where the table has any."""
    ratio = ["reduce ratio"] if any(row.ratio is not None for row in table.rows) else []
    paper = [f"{name} (paper)" for name in table.columns] if any(row.paper or row.published for row in table.rows) else []
    return ["approach", *ratio, *table.columns, "seeds", *paper]


def cells(table: Table, row: Row, entries: Entries, refused: str = "") -> list[str]:
    """Returns the cells of a row. `refused` says why its reduce ratio is out of reach."""
    ratio = [f"{row.ratio:g}" if row.ratio is not None else ""] if "reduce ratio" in header(table) else []
    if entries:
        own = [spread([figure(entry["result"], place) for entry in entries], place) for place in table.columns.values()]
        own.append(str(len(entries)))
    elif refused:
        own = [OUT_OF_REACH, *[""] * len(table.columns)]
    else:
        own = [NOT_RUN if row.run is not None else ""] * (len(table.columns) + 1)
    theirs: list[str] = []
    if any(each.paper or each.published for each in table.rows):
        figures = row.paper or row.published
        theirs = ["" if value is None else f"{value:g}" for value in figures] or [""] * len(table.columns)
    return [row.name + (" (published)" if row.published else ""), *ratio, *own, *theirs]


def spread(values: Sequence[float | None], place: str) -> str:
    """Formats the mean and the standard deviation; the number of digits follows from the kind of figure."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    digits = 4 if place.startswith("gflops") else 2
    text = f"{statistics.fmean(known):.{digits}f}"
    deviates = len(known) > 1 and not place.startswith("gflops")
    return f"{text} ± {statistics.stdev(known):.{digits}f}" if deviates else text


def markdown(
    name: str, table: Table, found: Mapping[str, Entries], command: str, versions: Sequence[str], refused: Mapping[str, str]
) -> str:
    """Returns the table with its comparisons, notes and provenance.

    Args:
        found: row -> entries of its completed runs.
        command: that makes the table.
        versions: of code, libraries and machine.
        refused: row -> why its reduce ratio is out of reach.
    """
    rows = [cells(table, row, found.get(row.name, []), refused.get(row.name, "")) for row in table.rows]
    parts = [f"# Table {name}: {table.title}", _markdown_table(header(table), rows)]
    compared = comparisons(table, found)
    if compared:
        parts.append(
            "Differences on the test split, in percent points, over the same samples and seeds. The error over samples is the"
            " standard error of a paired test, whose p-value follows; the deviation over seeds is that of single runs."
        )
        parts.append(_markdown_table(list(compared[0]), [list(row.values()) for row in compared]))
    without = [row.name for row in table.rows if row.run is not None and not found.get(row.name)]
    if missing := [name for name in without if not refused.get(name)]:
        parts.append(f"Not run yet: {'; '.join(missing)}.")
    parts += [f"{name}: {refused[name]}." for name in without if refused.get(name)]
    parts += [f"{row.name}: {row.note}" for row in table.rows if row.note]
    parts.append(f"Made by `{command}`. {' '.join(versions)}")
    return "\n\n".join(parts) + "\n"


def comparisons(table: Table, found: Mapping[str, Entries]) -> list[dict[str, str]]:
    """Returns the rows of the comparisons that the table asks for and the completed runs allow."""
    rows = []
    for row in table.rows:
        result = compare(found.get(row.name, []), found.get(row.against, [])) if row.against else None
        if result is not None:
            rows.append({
                "approach": row.name,
                "compared with": row.against,
                "difference": f"{result.difference:+.2f}",
                "error over samples": f"{result.sample_error:.2f}",
                "p-value": f"{result.p_value:.3f}" if result.p_value >= 0.001 else "< 0.001",
                "deviation over seeds": "" if result.seed_error is None else f"{result.seed_error:.2f}",
                "seeds": str(result.seeds),
            })  # fmt: skip
    return rows


def as_csv(table: Table, found: Mapping[str, Entries], refused: Mapping[str, str]) -> str:
    """Returns the table as comma-separated values."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(header(table))
    writer.writerows(cells(table, row, found.get(row.name, []), refused.get(row.name, "")) for row in table.rows)
    return out.getvalue()


def _markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
