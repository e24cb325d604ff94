"""The page of a scale's figures: one HTML file that needs nothing beside it, and each plot as a file of its own."""

import html
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tools.report import escaped, image
from tools.tables.figures import Illustration, Panel, accuracy, forest
from tools.tables.measured import illustrations, pairs_of
from tools.tables.plan import Table
from tools.tables.render import Entries

LIMIT = 1_000_000  # bytes; drawings that would make the page larger are left to their files


class Part(NamedTuple):
    """The figures of a table."""

    table: str
    title: str
    figures: Sequence[Illustration]


def parts_of(tables: Mapping[str, Table], found: Mapping[str, Mapping[str, Entries]]) -> Iterator[Part]:
    """Yields the figures of each table that has any.

    Those that read the runs' folders are made for one table, the first that compares methods at one reduce ratio.

    Args:
        found: table -> row -> entries of its completed runs.
    """
    first = next((name for name, table in tables.items() if pairs_of(table)), None)
    for name, table in tables.items():
        figures = [accuracy(name, table, found[name])] if any(row.ratio is not None for row in table.rows) else []
        figures += [forest(name, table, found[name])] if any(row.against for row in table.rows) else []
        figures += illustrations(table, found[name]) if name == first else []
        if figures:
            yield Part(name, table.title, figures)


def write_page(path: Path, title: str, parts: Sequence[Part], origin: str) -> None:
    """Writes the page, and its plots to a folder beside it that has the page's name. Plots of an earlier page are removed.

    Args:
        path: the HTML file.
        origin: where the numbers come from, for the end of the page.
    """
    folder = path.with_name(f"{path.stem}_figures")
    folder.mkdir(parents=True, exist_ok=True)
    for old in (*folder.glob("*.svg"), *folder.glob("*.png")):
        old.unlink()
    body, room = [], LIMIT
    for part in parts:
        body.append(f"<h2>Table {html.escape(part.table)}: {html.escape(part.title)}</h2>")
        stem = re.sub(r"[^\w.-]+", "_", part.table)
        for figure in part.figures:
            shown, used = _figure(figure, folder, stem, room)
            body.append(shown)
            room -= used
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>\n<body>\n'
        f"<h1>{html.escape(title)}</h1>\n" + "\n".join(body) + f"\n<p class=origin>{html.escape(origin)}</p>\n</body></html>\n"
    )
    path.write_text(page, encoding="utf-8")


def _figure(figure: Illustration, folder: Path, stem: str, room: int) -> tuple[str, int]:
    """Writes a figure's files. Returns its HTML, which embeds what fits into `room` bytes, and how many it took."""
    title = f"<h3>{html.escape(figure.title)}</h3>"
    if figure.missing:
        return f"<section>{title}<p class=missing>Missing: {html.escape(figure.missing)}.</p></section>", 0
    shown, used = [], 0
    for number, panel in enumerate(figure.panels, 1):
        ending = f"_{number}" if len(figure.panels) > 1 else ""
        file = folder / f"{stem}_{figure.name}{ending}.{panel.kind}"
        file.write_bytes(panel.content)
        embedded = _embedded(panel)
        if used + len(embedded) > room:
            embedded = f"<p class=missing>Left out of this page for its size: {html.escape(f'{folder.name}/{file.name}')}.</p>"
        shown.append(embedded)
        used += len(embedded)
    caption = f"<figcaption>{escaped(figure.caption)}</figcaption>"
    return f"<section>{title}<figure><div class=panels>{''.join(shown)}</div>{caption}</figure></section>", used


def _embedded(panel: Panel) -> str:
    shown = image("svg+xml" if panel.kind == "svg" else panel.kind, panel.content, panel.description)
    return f"<div class={'wide' if panel.wide else 'panel'}>{shown}</div>"


STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; }
body { max-width: 1100px; margin: 1.5rem auto; padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.15rem; margin-top: 2.6rem; border-top: 1px solid #e5e7eb; padding-top: 1rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; } figure { margin: 0; }
.panels { display: flex; flex-wrap: wrap; gap: .8rem; } .panel { flex: 1 1 300px; max-width: 520px; }
.panel img { width: 100%; } .wide { flex: 1 1 100%; overflow-x: auto; } .wide img { width: 100%; min-width: 760px; }
figcaption, .origin { color: #4b5563; font-size: .9rem; } .missing { color: #92400e; font-size: .9rem; }
"""
