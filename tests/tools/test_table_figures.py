"""The figures of the tables: the numbers that they show, what they say when data are missing, and a page that stands alone."""

import io
import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from data.shapes.write import make_shapes
from engine.results import write_json
from tasks.registry import TASKS, load_any_config
from tasks.view import Sample
from tests.tiny_run import log_of, result_of, write_run
from tests.tools.test_report import Shown
from tools.tables import measured
from tools.tables.complexity import things_by_sample
from tools.tables.figures import (
    Illustration,
    Panel,
    accuracy,
    forest,
    intervals,
    looks,
    measured_points,
    method_of,
    methods_of,
    new_figure,
    published_points,
    rank_correlation,
)
from tools.tables.measured import gflops_by_batch_size, illustrations, pairs_of, side_by_side
from tools.tables.page import Part, parts_of, write_page
from tools.tables.plan import Row, Table, read_plan, tables_of
from utils import UserError

EVIL = '<b>$x_{</b> & "more" $5'
COLUMNS = {"dev acc": "metrics.val.acc", "test acc": "metrics.test.acc", "GFLOPs": "gflops.measured"}
ROWS = [
    Row(name="Uncompressed", run="--p 0 --evaluate", paper=[80, 90, 100]),
    Row(name="STP 0.5", ratio=0.5, run="--p 0.5 --set method=stp", paper=[70, 75, 50]),
    Row(name="STP 0.8", ratio=0.8, run="--p 0.8 --set method=stp"),
    Row(name="UPop 0.5", ratio=0.5, published=[60, 65, 40]),
    Row(name="MADTP 0.5", ratio=0.5, run="--p 0.5", against="STP 0.5", paper=[79, 88, 50]),
    Row(name="MADTP 0.8", ratio=0.8, run="--p 0.8", against="STP 0.8"),
]
TABLE = Table(title="methods", data="nlvr", columns=COLUMNS, rows=ROWS)


def entry(seed: int, score: float, gflops: float, scores: str = "", folder: Path | str = "") -> dict:
    result = {"seed": seed, "metrics": {"test": {"acc": score}}, "gflops": {"measured": gflops, "uncompressed": 2.0}}
    return {"folder": str(folder), "result": result, "scores": scores}


FOUND = {
    "Uncompressed": [entry(42, 90.0, 1.0)],
    "STP 0.5": [entry(42, 80.0, 0.5, "UU00"), entry(43, 82.0, 0.5, "UU00")],
    "MADTP 0.5": [entry(42, 86.0, 0.5, "UUUU"), entry(43, 90.0, 0.52, "UU00")],
}


def test_a_point_is_the_mean_over_seeds_and_its_bar_their_deviation():
    points = {point.row: point for point in measured_points(TABLE, FOUND)}
    assert set(points) == set(FOUND)
    mine = points["MADTP 0.5"]
    assert (mine.cost, mine.accuracy, mine.seeds) == (pytest.approx(0.51), 88.0, 2) and mine.error == pytest.approx(8**0.5)
    assert points["Uncompressed"].error is None


def test_the_papers_points_are_relative_to_its_uncompressed_model():
    points = {point.row: (point.cost, point.accuracy) for point in published_points(TABLE)}
    assert points == {"Uncompressed": (100, 0), "STP 0.5": (50, -15), "UPop 0.5": (40, -25), "MADTP 0.5": (50, -2)}
    alone = TABLE.model_copy(update={"rows": ROWS[1:]})
    assert published_points(alone) == []


def test_a_table_without_gflops_has_no_accuracy_against_them():
    table = TABLE.model_copy(update={"columns": {"test acc": "metrics.test.acc"}})
    assert "none of gflops.measured" in accuracy("9", table, FOUND).missing


def test_a_method_keeps_its_colour_and_the_compared_one_comes_first():
    assert methods_of(TABLE) == ["MADTP", "STP", "UPop"] and method_of(ROWS[0]) == "Uncompressed"
    assert len({look["color"] for look in looks(TABLE).values()}) == 3


def texts(panel: Panel) -> str:
    return " ".join(ElementTree.fromstring(panel.content).itertext())


def test_accuracy_names_the_methods_and_the_rows_that_have_not_run():
    figure = accuracy("9", TABLE, FOUND)
    ours, theirs = map(texts, figure.panels)
    assert "MADTP" in ours and "STP" in ours and "UPop" not in ours and "UPop" in theirs
    assert "Not run yet: STP 0.8; MADTP 0.8." in figure.caption and "mean over 1 to 2 seeds" in figure.caption


def test_an_interval_is_two_standard_errors_of_the_paired_samples():
    (found,) = intervals(TABLE, FOUND)  # of four samples two differ by half a point on average over the seeds
    error = ((4 * 25**2) / 3 / 4) ** 0.5
    assert (found.row, found.against, found.seeds, found.difference) == ("MADTP 0.5", "STP 0.5", 2, 25)
    assert found.low == pytest.approx(25 - 1.96 * error) and found.high == pytest.approx(25 + 1.96 * error)
    (shown,) = forest("9", TABLE, FOUND).panels
    assert "MADTP 0.5 against STP 0.5 (2 seeds)" in texts(shown)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 400], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 1 - 6 * 4 / (5 * 24)),  # without ties: 1 - 6 sum d^2 / (n (n^2 - 1))
        ([1, 1, 2, 2], [1, 2, 1, 2], 0.0),
        ([1, 1, 2], [1, 2, 3], 1.5 / 3**0.5),  # ranks 1.5 1.5 3 and 1 2 3: covariance 1.5, variances 1.5 and 2
        ([1, 2, 3], [7, 7, 7], None),
    ],
)
def test_the_rank_correlation(one, other, expected):
    assert rank_correlation(one, other) == (None if expected is None else pytest.approx(expected))


def test_only_methods_at_one_ratio_are_pairs_the_strongest_first():
    assert [(one.name, other.name) for one, other in pairs_of(TABLE)] == [("MADTP 0.8", "STP 0.8"), ("MADTP 0.5", "STP 0.5")]
    tables = tables_of(read_plan(), "shapes", "2,alignment,elastic")
    assert pairs_of(tables["2"])[0][0].name == "MADTP 0.8" and not pairs_of(tables["alignment NLVR2"])


def test_each_figure_without_its_data_is_named_and_not_drawn():
    ((name, title, figures),) = parts_of({"9": TABLE}, {"9": {}})
    assert (name, title) == ("9", "methods") and len(figures) == 7
    assert all(figure.missing and not figure.panels for figure in figures)
    gone = {name: [{**each, "folder": "no/such/folder"} for each in entries] for name, entries in FOUND.items()}
    drawn = {figure.name for figure in next(parts_of({"9": TABLE}, {"9": gone})).figures if figure.panels}
    assert drawn == {"accuracy", "differences"}


# Runs in their folders.


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, list[dict]]:
    """A dynamic run with its log, and one that stands for a static one, of tiny models on data that are no Shapes."""
    base, found = tmp_path_factory.mktemp("runs"), {}
    for name in ("MADTP 0.8", "STP 0.8"):
        folder = write_run(base / name.replace(" ", "_"), "nlvr")
        write_json(result_of("nlvr", 0.8), folder / "result.json")
        (folder / "log.txt").write_text("".join(json.dumps(each) + "\n" for each in log_of(result_of("nlvr", 0.8), 3)))
        kept = {f"nlvr_test-{i}": {"tokens_kept": 9 - 2 * i, "gflops": 0.1} for i in range(4)}
        write_json(kept, folder / "predictions_test.json")
        found[name] = [entry(42, 80.0, 0.4, folder=folder)]
    return found


def test_runs_in_their_folders_give_drawings_and_curves(runs, monkeypatch):
    monkeypatch.setattr(measured, "BATCHED", 4)
    figures = {figure.name: figure for figure in illustrations(TABLE, runs)}
    assert "did not make it" in figures.pop("complexity").missing
    assert {name: len(figure.panels) for name, figure in figures.items()} == {
        "beside": 3, "by_block": 3, "epochs": 2, "batch_size": 1,
    }  # fmt: skip
    assert [panel.description[:11] for panel in figures["by_block"].panels] == ["nlvr_test-3", "nlvr_test-1", "nlvr_test-0"]
    assert all(panel.content.startswith(b"\x89PNG") for panel in figures["beside"].panels)


def test_larger_batches_cost_more_under_max_keep_and_each_costs_at_least_its_own(runs):
    by_batch, alone = gflops_by_batch_size(Path(runs["MADTP 0.8"][0]["folder"]))
    assert list(by_batch) == [1, 2]  # the evaluation's batches have 3
    assert alone <= by_batch[1] < by_batch[2]


@pytest.mark.parametrize("task", [name for name in TASKS if name != "nlvr"])
def test_every_task_has_the_figures_that_need_its_models(task, tmp_path):
    found = {}
    for name in ("MADTP 0.8", "STP 0.8"):
        folder = write_run(tmp_path / name.replace(" ", "_"), task)
        (folder / "log.txt").write_text("".join(json.dumps(each) + "\n" for each in log_of(result_of(task, 0.8), 3)))
        write_json({}, folder / "predictions_test.json")
        found[name] = [entry(42, 80.0, 0.4, folder=folder)]
    missing = {figure.name: figure.missing for figure in illustrations(TABLE, found) if figure.missing}
    assert missing == {"complexity": f"task {task}: the number of things is known for NLVR2 on Shapes alone"}


def test_a_sentence_with_markup_is_drawn_as_it_is():
    alive = np.array([[[True, False], [False, False]]])
    sample = Sample("a", EVIL, [("left", np.zeros((4, 4, 3)), alive)], [([EVIL], np.ones((1, 1), dtype=bool))])
    drawn = side_by_side({EVIL: sample})
    assert any(EVIL in text.get_text() for text in drawn.texts) and f"{EVIL}: 1 of 4" in {text.get_text() for text in drawn.texts}
    drawn.savefig(io.BytesIO(), format="png", dpi=30)


def test_a_rare_colour_stays_in_a_drawing():
    drawn = new_figure((2, 2))
    drawn.set_layout_engine("none")
    axes = drawn.add_axes((0, 0, 1, 1))
    picture = np.random.default_rng(0).uniform(0.3, 0.5, (60, 60, 3))
    picture[30, 30] = (1.0, 0.85, 0.1)
    axes.imshow(picture, interpolation="nearest")
    shown = Image.open(io.BytesIO(measured.as_picture(drawn, 100, "").content)).convert("RGB")
    error = np.abs(np.asarray(shown).reshape(-1, 3) - np.array([255, 217, 26])).max(axis=1)
    assert error.min() < 12


# The number of things.


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    """Shapes data with 20 test pairs, and a run's config that reads them."""
    folder = tmp_path_factory.mktemp("shapes")
    make_shapes(folder, 3, 6, ("nlvr",), statements_per_pair=2, eval_size=20, val_size=2, workers=1)
    said = {"seed": 3, "eval_size": 20, "most_things": 12, "templates": "both,one,pair,more,total,higher,above,things"}
    write_json({"command": said, "generator": "any", "complete": True}, folder / "made_nlvr.json")
    run = write_run(folder / "run", "nlvr")
    text = (run / "config.yaml").read_text().replace(f"ann_root: {run}", f"ann_root: {folder}/annotations")
    (run / "config.yaml").write_text(text.replace(f"image_root: {run}", f"image_root: {folder}/images"))
    return folder


def things_in(picture: Path) -> int:
    """Counts the cells of 16 px with bright or colourful pixels inside: the ground is grey, and each thing has its own cell."""
    pixels = np.asarray(Image.open(picture)).astype(int)
    stands_out = (np.ptp(pixels, axis=-1) > 70) | (pixels.min(axis=-1) > 180)
    cells = stands_out.reshape(6, 16, 6, 16)[:, 2:14, :, 2:14]
    return int((cells.sum(axis=(1, 3)) > 5).sum())


def test_the_number_of_things_is_what_the_pictures_show(shapes):
    things = things_by_sample(load_any_config(shapes / "run" / "config.yaml"))
    entries = json.loads((shapes / "annotations" / "nlvr_test.json").read_text())
    shown = [sum(things_in(shapes / "images" / name) for name in entry["images"]) for entry in entries]
    assert things == {f"nlvr_test-{index}": number for index, number in enumerate(shown)} and len(set(shown)) > 5


def test_data_whose_seed_draws_other_statements_are_refused(shapes, tmp_path):
    shutil.copytree(shapes, tmp_path / "other")
    config = load_any_config(shapes / "run" / "config.yaml", {"ann_root": str(tmp_path / "other" / "annotations")})
    made = tmp_path / "other" / "made_nlvr.json"
    made.write_text(made.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(UserError, match="draws other statements now"):
        things_by_sample(config)
    made.unlink()
    with pytest.raises(UserError, match="did not make it"):
        things_by_sample(config)


def test_the_caption_has_the_rank_correlation_of_each_method(shapes):
    things = things_by_sample(load_any_config(shapes / "run" / "config.yaml"))
    found = {}
    for name, tokens in (("MADTP 0.8", lambda number: 3 * number), ("STP 0.8", lambda number: 30)):
        folder = shapes / name.replace(" ", "_")
        folder.mkdir(exist_ok=True)
        shutil.copy(shapes / "run" / "config.yaml", folder)
        rows = {sample: {"tokens_kept": tokens(number), "gflops": 1 / number} for sample, number in things.items()}
        write_json(rows, folder / "predictions_test.json")
        found[name] = [entry(42, 80.0, 0.4, folder=folder)]
    caption, panels = measured.complexity(TABLE, found)
    assert "STP 0.8: none (constant) and -1.00 (1 seed); MADTP 0.8: +1.00 and -1.00 (1 seed)." in caption and len(panels) == 2


# The page.


def test_markup_in_a_rows_name_shows_as_text_and_the_page_needs_nothing_beside_it(tmp_path):
    rows = [Row(name=EVIL, run="--p 0.5", against="other"), Row(name="other", run="--p 0.4")]
    table = Table(title=EVIL, data="nlvr", columns=COLUMNS, rows=rows)
    found = {EVIL: [entry(42, 1.0, 1.0, "UUU0")], "other": [entry(42, 1.0, 1.0, "U000")]}
    lost = Illustration("lost", EVIL, missing=EVIL)
    drawn = Illustration("b", "b", EVIL, [Panel("svg", b"<svg/>", EVIL)])
    parts = [*parts_of({EVIL: table}, {EVIL: found}), Part("9", EVIL, [lost, drawn])]
    write_page(tmp_path / "toy.html", EVIL, parts, EVIL)
    text = (tmp_path / "toy.html").read_text()
    page = Shown(text)
    assert not {"b", "script", "link", "iframe"} & page.elements and "href" not in page.attributes
    assert "://" not in text and all(source.startswith("data:image/") for source in page.attributes["src"])
    assert page.texts.count(EVIL) == 5 and f"Missing: {EVIL}." in page.texts and EVIL in page.attributes["alt"]
    (shown,) = [file for file in (tmp_path / "toy_figures").iterdir() if "differences" in file.name]
    assert f"{EVIL} against other (1 seed)" in texts(Panel("svg", shown.read_bytes(), ""))


def test_each_plot_is_a_file_too_and_those_of_an_earlier_page_go(tmp_path):
    panels = [Panel("svg", b"<svg/>", "a"), Panel("png", b"png", "b", wide=True)]
    write_page(tmp_path / "toy.html", "t", [Part("5 COCO", "x", [Illustration("accuracy", "t", "c", panels)])], "")
    folder = tmp_path / "toy_figures"
    assert {file.name for file in folder.iterdir()} == {"5_COCO_accuracy_1.svg", "5_COCO_accuracy_2.png"}
    write_page(tmp_path / "toy.html", "t", [Part("5 COCO", "x", [Illustration("accuracy", "t", missing="no run")])], "")
    assert list(folder.iterdir()) == []


def test_drawings_that_would_make_the_page_too_large_are_named(tmp_path):
    panels = [Panel("png", bytes(400_000), str(number)) for number in range(3)]
    write_page(tmp_path / "toy.html", "t", [Part("2", "x", [Illustration("by_block", "t", "c", panels)])], "")
    text = (tmp_path / "toy.html").read_text()
    assert len(text) < 1_000_000 and text.count("<img ") == 1
    assert "toy_figures/2_by_block_2.png" in text and "toy_figures/2_by_block_3.png" in text


def test_a_figure_is_the_same_bytes_each_time():
    assert forest("9", TABLE, FOUND) == forest("9", TABLE, FOUND)
