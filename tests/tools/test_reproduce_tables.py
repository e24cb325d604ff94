"""Tables: what the YAML says, runs that are made once and go on where they were cut, and what is written while some are missing."""

import csv
import io
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from configs.load import read_yaml
from tasks.registry import TASKS, load_any_config
from tests.runs import refusal
from tools import reproduce_tables
from tools.tables.hours import Estimator
from tools.tables.needs import needs_of
from tools.tables.plan import PLAN, Row, Table, config_of, distinct, jobs_of, read_plan, tables_of
from tools.tables.render import NOT_RUN, OUT_OF_REACH, as_csv, compare, comparisons, markdown
from tools.tables.run import Progress, is_complete
from utils import UserError

ROOT = Path(__file__).parents[2]
SAMPLES = 40

# An entry script in miniature: two epochs, a checkpoint after each, and results that depend on p, the method and the seed.
ENTRY = """
import json, sys, time
from pathlib import Path
args = sys.argv[2:]
out = Path(args[args.index("--output_dir") + 1])
p, seed = float(args[args.index("--p") + 1]), int(args[args.index("--seed") + 1])
with open(out.parent / "starts.txt", "a") as file:
    file.write(f"{out.name} {'resumed' if '--resume' in args else 'new'}\\n")
if "method=broken" in args:
    sys.exit(2)
if "sd_num=7" in args:
    sys.exit("error: p = 0.5 is out of reach: 0.6 to 0.7 possible")
if "--evaluate" in args and p:
    assert Path(args[args.index("--pretrained") + 1]).is_file()
epochs = out / "checkpoint_last.pth"
first = int(epochs.read_text()) if epochs.is_file() else 0
for epoch in range(first, 0 if "--evaluate" in args else 2):
    time.sleep(SLEEP)
    epochs.write_text(str(epoch + 1))
    (out / "log.txt").write_text(json.dumps({"alignment": {"pairs": {"auc": 0.75}}}) + "\\n")
(out / "checkpoint_best.pth").write_text("")
right = int(40 * (1 - p / 4)) - seed % 3 - 5 * ("method=stp" in args)
rows = {f"nlvr_test-{i}": {"prediction": i < right} for i in range(40)}
(out / "predictions_test.json").write_text(json.dumps(rows))
gflops = {"measured": 1 - p}
result = {"seed": seed, "gflops": gflops, "metrics": {"val": {"acc": 50.0}, "test": {"acc": right / 0.4}}}
(out / "result.json").write_text(json.dumps(result))
"""

PLAN_TEXT = """
scales:
  toy:
    configs: {{nlvr: {root}/configs/shapes/nlvr.yaml}}
    arguments: --set ann_root={world}
    launch: {python} {world}/entry.py
  other:
    configs: {{nlvr: {root}/configs/shapes/nlvr.yaml}}
tables:
  "1":
    title: a comparison
    data: nlvr
    columns: {{test acc: metrics.test.acc, AUC: alignment.pairs.auc, GFLOPs: gflops.measured}}
    rows:
      - {{name: whole, run: --p 0 --evaluate, seeds: 1, paper: [90, null, 1]}}
      - {{name: cut, ratio: 0.5, run: --p 0.5, against: static}}
      - {{name: static, ratio: 0.5, run: --p 0.5 --set method=stp}}
      - {{name: cut again, after: cut, run: --set sd_redraw=true, against: cut}}
      - {{name: theirs, published: [70, null, 0.5]}}
      - {{name: elsewhere, run: {{other: --p 0.5 --set sd_num=5}}}}
  "2 more":
    title: another
    data: nlvr
    columns: {{test acc: metrics.test.acc}}
    rows: [{{name: the same, run: --p 0.5}}]
"""


@pytest.fixture
def world(tmp_path: Path) -> Path:
    write_world(tmp_path, sleep=0.0)
    return tmp_path


def write_world(folder: Path, sleep: float) -> None:
    (folder / "entry.py").write_text(ENTRY.replace("SLEEP", str(sleep)))
    (folder / "plan.yaml").write_text(PLAN_TEXT.format(root=ROOT, world=folder, python=sys.executable))
    entries = [{"sentence": "a", "label": "True", "images": ["a", "b"]}] * SAMPLES
    (folder / "nlvr_test.json").write_text(json.dumps(entries))


def command(world: Path, *more: str, tables: str = "all") -> list[str]:
    places = ["--plan", str(world / "plan.yaml"), "--output", str(world / "runs"), "--results", str(world / "results")]
    return ["tools/reproduce_tables.py", "--scale", "toy", "--tables", tables, *places, *more]


def make(world: Path, monkeypatch, *more: str, tables: str = "all") -> None:
    monkeypatch.setattr(sys, "argv", command(world, *more, tables=tables))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    reproduce_tables.main()


def starts(world: Path) -> list[str]:
    file = world / "runs" / "toy" / "nlvr" / "starts.txt"
    return sorted(file.read_text().splitlines()) if file.is_file() else []


def rows_of(world: Path, name: str) -> dict[str, dict[str, str]]:
    text = (world / "results" / f"toy_{name}.csv").read_text()
    return {row["approach"]: row for row in csv.DictReader(io.StringIO(text))}


def test_every_row_is_run_once_for_each_seed_and_shared_between_tables(world, monkeypatch):
    make(world, monkeypatch, "--seeds", "2", "--jobs", "2")
    assert len(starts(world)) == 1 + 2 + 2 + 2 and all(line.endswith(" new") for line in starts(world))
    rows = rows_of(world, "1")
    mean = (100 * 35 / 40 + 100 * 34 / 40) / 2  # seed 43 has one fewer right
    assert rows["cut"]["test acc"] == f"{mean:.2f} ± 1.77" and rows["cut"]["seeds"] == "2"
    assert rows["whole"]["test acc"] == "100.00" and rows["whole"]["test acc (paper)"] == "90" and rows["whole"]["seeds"] == "1"
    assert rows["cut"]["AUC"] == "0.75 ± 0.00" and rows["cut"]["reduce ratio"] == "0.5"
    assert rows["theirs (published)"]["test acc"] == "" and rows["theirs (published)"]["test acc (paper)"] == "70"
    assert "elsewhere" not in rows
    assert rows_of(world, "2_more")["the same"]["test acc"] == rows["cut"]["test acc"]
    make(world, monkeypatch, "--seeds", "2")
    assert len(starts(world)) == 7  # nothing was run again


def test_rows_that_are_missing_are_named_and_not_filled_in(world, monkeypatch):
    make(world, monkeypatch, "--rows", "whole", "--seeds", "1", tables="1")
    assert rows_of(world, "1")["cut"]["test acc"] == NOT_RUN
    assert "Not run yet: cut; static; cut again." in (world / "results" / "toy_1.md").read_text()


def test_a_row_that_evaluates_another_takes_its_checkpoint_and_its_arguments(world, monkeypatch):
    make(world, monkeypatch, "--rows", "cut again", "--seeds", "1", tables="1")
    assert len(starts(world)) == 2
    (job,) = jobs_of(read_plan(world / "plan.yaml"), "toy", tables_of(read_plan(world / "plan.yaml"), "toy", "1")["1"],
                     Row(name="cut again", after="cut", run="--set sd_redraw=true"), 1, world, {})  # fmt: skip
    config = config_of(job)
    assert config.evaluate and config.sd_redraw and config.p == 0.5 and "checkpoint_best.pth" in config.pretrained


def test_a_command_that_has_changed_is_run_again(world, monkeypatch):
    make(world, monkeypatch, "--rows", "cut", "--seeds", "1", tables="1")
    text = (world / "plan.yaml").read_text().replace("ann_root=", "seed=42 --set ann_root=")
    (world / "plan.yaml").write_text(text)
    make(world, monkeypatch, "--rows", "cut", "--seeds", "1", tables="1")
    assert [line.split()[1] for line in starts(world)] == ["new", "new"]


def test_a_failure_stops_neither_other_rows_nor_the_tables(world, monkeypatch):
    (world / "plan.yaml").write_text((world / "plan.yaml").read_text().replace("method=stp", "method=stp --set method=broken"))
    monkeypatch.setattr(reproduce_tables, "config_of", lambda job: None)  # it would find the error first
    with pytest.raises(UserError, match="ended with exit code 2; see .*txt"):
        make(world, monkeypatch, "--seeds", "1", tables="1")
    rows = rows_of(world, "1")
    assert rows["static"]["test acc"] == NOT_RUN and rows["cut"]["test acc"] == rows["cut again"]["test acc"] == "87.50"


def test_a_row_whose_ratio_is_out_of_reach_says_so_and_is_not_tried_again(world, monkeypatch):
    (world / "plan.yaml").write_text((world / "plan.yaml").read_text().replace("method=stp", "method=stp --set sd_num=7"))
    known = world / "results" / "toy.json"
    for more in ((), (), ("--known", str(known), "--output", str(world / "elsewhere"))):
        make(world, monkeypatch, "--seeds", "1", "--rows", "static", *more, tables="1")
        assert len(starts(world)) == 1
        assert rows_of(world, "1")["static"]["test acc"] == OUT_OF_REACH
        text = (world / "results" / "toy_1.md").read_text()
        assert "Not run yet: whole; cut; cut again." in text
        assert "static: p = 0.5 is out of reach: 0.6 to 0.7 possible." in text


def test_results_of_another_machine_count_as_made(world, monkeypatch, tmp_path):
    make(world, monkeypatch, "--seeds", "1")
    known = world / "results" / "toy.json"
    runs = (world / "runs").rename(world / "gone")
    make(world, monkeypatch, "--seeds", "1", "--known", str(known))
    assert not (world / "runs" / "toy" / "nlvr" / "starts.txt").exists() and runs.is_dir()
    assert rows_of(world, "1")["cut"]["test acc"] == "87.50"


def test_the_file_of_runs_keeps_those_of_other_tables_and_prefers_what_was_run_here(world, monkeypatch):
    make(world, monkeypatch, "--rows", "cut", "--seeds", "1", tables="1")
    make(world, monkeypatch, "--rows", "whole", "--seeds", "1", tables="1")
    file = world / "results" / "toy.json"
    entries = json.loads(file.read_text())
    assert len(entries) == 2
    file.write_text(json.dumps({command: {**entry, "scores": ""} for command, entry in entries.items()}))
    make(world, monkeypatch, "--rows", "none", "--known", str(file), tables="1")
    assert all(entry["scores"] for entry in json.loads(file.read_text()).values())


def test_figures_are_drawn_of_what_has_run_and_named_where_the_runs_hold_no_model(world, monkeypatch):
    make(world, monkeypatch, "--seeds", "2", "--figures", tables="1")
    page = (world / "results" / "toy.html").read_text()
    plots = {file.name for file in (world / "results" / "toy_figures").iterdir()}
    assert plots == {"1_accuracy.svg", "1_differences.svg"} and page.count("<img ") == 2
    assert page.count("Missing: ") == 5


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_it_can_be_killed_and_goes_on_where_it_was(tmp_path, how):
    write_world(tmp_path, sleep=1.0)
    argv = [sys.executable, *command(tmp_path, "--rows", "cut;whole", "--seeds", "1", tables="1")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    wait_for(tmp_path / "runs" / "toy" / "nlvr" / "p_0.5_42" / "checkpoint_last.pth")
    process.send_signal(how)
    process.wait()
    time.sleep(1.5)  # a child that lived on would write its second checkpoint by now
    assert (tmp_path / "runs" / "toy" / "nlvr" / "p_0.5_42" / "checkpoint_last.pth").read_text() == "1"
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert starts(tmp_path) == ["p_0.5_42 new", "p_0.5_42 resumed", "p_0_evaluate_42 new"]
    assert rows_of(tmp_path, "1")["cut"]["test acc"] == "87.50"


def wait_for(path: Path, seconds: float = 120.0) -> None:
    end = time.time() + seconds
    while not path.exists():
        assert time.time() < end, f"{path} was not written"
        time.sleep(0.02)


def entries(*scores: str) -> list[dict]:
    return [{"result": {"seed": 42 + i}, "scores": each} for i, each in enumerate(scores)]


def test_two_rows_are_compared_sample_by_sample():
    """Digits are thirtieths: U is 1 and F is a half."""
    result = compare(entries("UUUU", "UUU0"), entries("UU00", "UUF0"))
    by_sample = [0, 0, (1 + 0.5) / 2, (1 + 0) / 2]
    mean = sum(by_sample) / 4
    error = (sum((value - mean) ** 2 for value in by_sample) / 3 / 4) ** 0.5
    assert result.difference == pytest.approx(100 * mean) and result.sample_error == pytest.approx(100 * error)
    assert result.seed_error == pytest.approx(100 * abs(0.5 - 0.125) / 2**0.5) and result.seeds == 2
    assert result.p_value == pytest.approx(0.0956, abs=1e-4)  # z = 5 / 3
    assert compare(entries("UU"), entries("UUU")) is None and compare(entries(""), entries("")) is None


def test_equal_rows_do_not_differ():
    result = compare(entries("U0U"), entries("U0U"))
    assert (result.difference, result.p_value, result.seed_error) == (0.0, 1.0, None)


def test_markdown_shows_what_was_compared_and_where_it_comes_from():
    rows = [Row(name="a|b", run="--p 0.5", against="c", note="a note"), Row(name="c", run="--p 0.4")]
    table = Table(title="t", data="nlvr", columns={"seed": "seed"}, rows=rows)
    found = {"a|b": entries("UU"), "c": entries("U0")}
    text = markdown("9", table, found, "python x.py", ["Code: abc."], {})
    assert "a\\|b" in text and "+50.00" in text and "a|b: a note" in text and "Made by `python x.py`. Code: abc." in text
    assert comparisons(table, {"c": entries("U0")}) == []
    assert as_csv(table, found, {}).splitlines()[0] == "approach,seed,seeds"


def test_the_estimate_waits_for_a_run_of_each_kind_and_counts_runs_side_by_side(world):
    plan = read_plan(world / "plan.yaml")
    table = tables_of(plan, "toy", "1")["1"]
    jobs = [job for row in table.rows for job in jobs_of(plan, "toy", table, row, 2, world, {})]
    progress = Progress(2, list(jobs))
    assert progress.left() is None
    assert "left" not in progress.line(jobs[0], 60.0)  # an evaluation
    text = progress.line(jobs[1], 600.0)
    assert text.startswith("[2/7] ") and text.endswith("10 min; about 16 min left")  # 3 runs of 10 min, 2 of 1, two at a time


# The tables that come with the project.


@pytest.mark.parametrize("scale", ["shapes", "fast", "paper"])
def test_every_command_parses_and_stands_for_a_setting_of_its_own(scale):
    plan = read_plan()
    tables = tables_of(plan, scale, "all")
    jobs = [job for table in tables.values() for row in table.rows for job in jobs_of(plan, scale, table, row, 1, Path("out"), {})]
    jobs = list(distinct(jobs))
    settings = [config_of(job).model_dump_json(exclude={"output_dir", "pretrained"} if job.parent is None else {"output_dir"})
                for job in jobs]  # fmt: skip
    assert len(jobs) > 40 and len(set(settings)) == len(settings)
    assert all(len(job.folder.name) < 200 for job in jobs)


def test_the_tables_of_the_paper_have_all_its_rows():
    tables = tables_of(read_plan(), "paper", "all")
    figures = {name: sum(bool(row.paper or row.published) for row in table.rows) for name, table in tables.items()}
    assert figures == {
        "2": 13, "3": 6, "4": 8, "5 Flickr30K": 5, "5 COCO": 5, "6 Flickr30K": 5, "6 COCO": 5, "7 captioning": 5, "7 VQA": 5,
    }  # fmt: skip
    assert all(row.run is None or row.arguments("paper") for table in tables.values() for row in table.rows if row.paper)


def test_at_least_twelve_ways_of_learning_are_compared():
    rows = tables_of(read_plan(), "shapes", "alignment")["alignment NLVR2"].rows
    assert sum(not row.after for row in rows) >= 12 and {"guide=text", "token_gradient=merge", "sd_init=kmeans"} <= {
        setting for row in rows for setting in shlex.split(row.arguments("shapes"))
    }


def test_what_the_paper_needs_is_listed_and_its_models_have_their_real_sizes(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = read_plan()
    jobs = {
        name: jobs_of(plan, "paper", table, row, 1, Path("out"), {})
        for name, table in tables_of(plan, "paper", "all").items()
        for row in table.rows
        if row.name.startswith("MADTP")
    }
    paper, estimator = plan.scales["paper"], Estimator(torch.device("cpu"))
    monkeypatch.setattr(estimator, "measured", lambda config: (100.0, 0.01))
    text = needs_of([job for each in jobs.values() for job in each], paper.launch, paper.samples, estimator)
    assert "torchrun --nproc_per_node=8 -- compress_nlvr_dtp.py --config configs/nlvr.yaml" in text
    assert "  pretrained/model_base_nlvr.pth" in text and "  datasets/annotations/nlvr_train.json" in text
    parameters = 259.45e6  # of BLIP-NLVR with its learnable tokens, 4 bytes each: kept twice and with two moments
    alone = needs_of(jobs["2"], paper.launch, paper.samples, estimator)
    assert f"writes {4 * 4 * parameters / 1e9:.2f} GB" in alone
    # 15 epochs, of which five ramp up: at p = 0.8 they cost 10 * 0.2 + 0.84 + 0.68 + 0.52 + 0.36 + 0.2 epochs of a dense model.
    assert f"trains for about {86373 * 4.6 * 100 * 0.01 / 3600:.1f} hours on this CPU" in alone


def test_a_training_step_is_measured_per_gflop_of_the_image_encoder():
    config = load_any_config("configs/shapes/nlvr.yaml", {"p": 0.5, "epoch_steps": 10, "batch_size_train": 4, "max_epoch": 3})
    estimator = Estimator(torch.device("cpu"))
    gflops, seconds = estimator.measured(config)
    assert 0.3 < gflops < 1 and 0 < seconds < 10 and list(estimator.costs.values()) == [(gflops, seconds)]
    # 40 samples an epoch; the first of two ramp epochs removes a quarter.
    assert estimator.hours(config, 1000) == pytest.approx(40 * (0.75 + 0.5 + 0.5) * gflops * seconds / 3600)
    assert estimator.hours(config, 20) == pytest.approx(estimator.hours(config, 1000) / 2)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("data: nlvr", "data: nlvr\n    colour: red"), "tables.1.colour"),
        (("against: static", "against: nothing"), "row 'cut' refers to 'nothing'"),
        (("paper: [90, null, 1]", "paper: [90]"), "one figure for each of the columns"),
        (("name: static", "name: cut"), "two rows are named 'cut'"),
        (("name: theirs, published: [70, null, 0.5]", "name: theirs"), "has neither runs nor figures"),
        (("--p 0.5 --set method=stp", "--p 0.5 --set metod=stp"), "did you mean 'method'?"),
    ],
)
def test_a_mistake_in_the_yaml_is_one_line(world, monkeypatch, capsys, change, words):
    text = (world / "plan.yaml").read_text()
    assert change[0] in text
    (world / "plan.yaml").write_text(text.replace(*change, 1))
    assert words in refusal(capsys, lambda: make(world, monkeypatch))


@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("--tables", "9", "there is no such table"),
        ("--scale", "huge", "there is no such scale"),
        ("--known", "no.json", "No such file"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line(world, monkeypatch, capsys, argument, value, words):
    assert words in refusal(capsys, lambda: make(world, monkeypatch, argument, value))


def test_a_run_of_another_command_is_not_complete(world, monkeypatch):
    make(world, monkeypatch, "--rows", "cut", "--seeds", "1", tables="1")
    plan = read_plan(world / "plan.yaml")
    (job,) = jobs_of(plan, "toy", plan.tables["1"], plan.tables["1"].rows[1], 1, world / "runs" / "toy", {})
    assert is_complete(job)
    (job.folder / "command.txt").write_text("another")
    assert not is_complete(job)


def test_the_yaml_names_only_scales_and_data_that_there_are():
    values = read_yaml(ROOT / PLAN)
    assert all(set(table.get("scales", [])) <= set(values["scales"]) for table in values["tables"].values())
    known = {name for scale in values["scales"].values() for name in scale["configs"]}
    assert {table["data"] for table in values["tables"].values()} <= known and len(TASKS) == 5
