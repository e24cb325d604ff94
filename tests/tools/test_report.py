"""The report: what its table says, and that it stands alone."""

import html
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from tests.tiny_run import log_of, result_of
from tools.report import Picture, ReportedRun, scale_by_factors, table, text_table, write_report


def fake_run(p: float, epochs: int = 0, task: str = "nlvr") -> ReportedRun:
    result = result_of(task, p)
    tokens = {"image": np.full((4, 3), 17), "text": np.full((2, 2), 9)}
    return ReportedRun(result, log_of(result, epochs), 100 * (1 + p), tokens)


def test_the_table_compares_with_the_first_run() -> None:
    header, dense, half = table([fake_run(0), fake_run(0.5, 2)])
    named = dict(zip(header, half, strict=True))
    assert named["model"] == "p = 0.5" and named["accuracy, % (test)"] == "81.25" and named["fewer"] == "50.0 %"
    assert named["images/s"] == "150" and named["speed-up"] == "1.50x" and named["temperature"] == "6.37 from block 2"
    assert dense[0] == "uncompressed" and dense[header.index("temperature")] == "-"
    assert not any("deployment" in words for words in header)  # where it is what p counts
    lines = text_table([header, dense, half]).splitlines()
    assert len({len(line) for line in lines}) == 1


def test_retrieval_has_its_recalls_and_what_a_pair_costs_in_deployment() -> None:
    header, _, half = table([fake_run(p, 1, "retrieval") for p in (0.0, 0.5)])
    named = dict(zip(header, half, strict=True))
    assert header[1:5] == ["mean recall, % (test)", "mean recall, % (val)", "text R@1 / 5 / 10 (test)", "image R@1 / 5 / 10 (test)"]
    assert half[1:5] == ["81.25", "80.00", "82.2 / 83.2 / 84.2", "85.2 / 86.2 / 87.2"]
    assert named["GFLOPs (deployment)"] == "0.7000" and named["fewer (deployment)"] == "30.0 %" and named["fewer"] == "50.0 %"


def test_the_report_needs_nothing_beside_it(tmp_path: Path) -> None:
    runs = [fake_run(0), fake_run(0.5, 3), fake_run(0.8, 1)]
    path = tmp_path / "report.html"
    write_report(path, "Title & more", runs, ["a note"], 2, [Picture("a < b", b"png")], ["python x.py --p 0.5"])
    page = path.read_text()
    assert "://" not in page and "<script" not in page and "<link" not in page
    assert page.count("<img ") == page.count('src="data:image/') == 3
    for text in ("Title & more", "p = 0.8", "81.25", "a note", "a < b", "python x.py --p 0.5"):
        assert html.escape(text) in page


class Shown(HTMLParser):
    """Collects the texts of a page, the names of its elements, and the names and values of their attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.texts: list[str] = []
        self.elements: set[str] = set()
        self.attributes: dict[str, list[str | None]] = {}
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.elements.add(tag)
        for name, value in attrs:
            self.attributes.setdefault(name, []).append(value)

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_markup_in_a_caption_or_a_note_shows_as_text(tmp_path: Path) -> None:
    evil = """a <script>alert(1)</script> "><i onclick='x'> &amp; dog"""
    path = tmp_path / "report.html"
    write_report(path, evil, [fake_run(0), fake_run(0.5, 2)], [evil], 2, [Picture(evil, b"png")], [f"python x.py --text '{evil}'"])
    shown = Shown(path.read_text())
    assert not {"script", "i"} & shown.elements and "onclick" not in shown.attributes
    assert shown.texts.count(evil) == 4 and evil in shown.attributes["alt"]  # title, heading, note, caption; and the picture's
    assert f"python x.py --text '{evil}'" in shown.texts


@pytest.mark.parametrize(("low", "high"), [(0.74, 0.99), (0.9, 3.1), (6.0, 9.0), (0.02, 3.0), (0.001, 400.0), (3.0, 3.0)])
def test_the_labels_of_a_temperature_do_not_overlap(low: float, high: float) -> None:
    figure = Figure(figsize=(4.6, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.plot([1, 2], [low, high])
    scale_by_factors(axes)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    below, above = axes.get_ylim()
    shown = [label for label in axes.yaxis.get_ticklabels(which="both") if label.get_text()]
    boxes = [label.get_window_extent(canvas.get_renderer()) for label in shown if below <= label.get_position()[1] <= above]
    assert 1 <= len(boxes) < 12
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_a_number_and_its_percent_sign_stay_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write_report(path, "t", [fake_run(0), fake_run(0.5, 2)], [], 2, [], [])
    cells = [text for text in Shown(path.read_text()).texts if text.endswith("%")]
    assert "50.0\N{NO-BREAK SPACE}%" in cells and not any(" %" in cell for cell in cells)
