"""Makes the paper's tables, with baselines and ablations, at the scale that its configs name.

    python tools/reproduce_tables.py --tables 2,3 --scale shapes --seeds 3 --jobs 2
    python tools/reproduce_tables.py --tables all --scale paper --dry-run      # prints the commands, and what they need

The tables and their rows are in configs/tables.yaml. Every row is a run of an entry script in a folder of its own below
output/tables/SCALE. A run that the same command has completed is not repeated, and one that was cut goes on where it was. After
each run the tables so far are written to results/tables/SCALE_TABLE.md and .csv, and all runs to results/tables/SCALE.json.
With --figures, results/tables/SCALE.html shows the figures of these tables, and results/tables/SCALE_figures/ has each plot.
"""

import argparse
import os
import platform
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tools.demo import cpu_name
from tools.tables.hours import Estimator
from tools.tables.needs import needs_of
from tools.tables.page import parts_of, write_page
from tools.tables.plan import PLAN, Job, Plan, Table, config_of, distinct, jobs_of, read_plan, tables_of
from tools.tables.render import as_csv, markdown
from tools.tables.run import Ledger, data_arguments, make_data, run_all
from utils import at_least_one, init_run, run_main

ROOT = Path(__file__).resolve().parents[1]
OUTPUT, RESULTS = Path("output/tables"), Path("results/tables")
Jobs = dict[tuple[str, str], list[Job]]  # (table, row) -> its runs, by seed


def main() -> None:
    args = parse()
    os.chdir(ROOT)
    plan = read_plan(args.plan)
    tables = tables_of(plan, args.scale, args.tables)
    scale = plan.scales[args.scale]
    data = data_arguments(scale, sorted({table.data for table in tables.values()}))
    where = {name: arguments for name, (_, arguments) in data.items()}
    jobs = plan_jobs(plan, args.scale, tables, args.seeds, args.output / args.scale, where)
    chosen = [job for (_, row), rows in jobs.items() if args.rows is None or row in args.rows.split(";") for job in rows]
    ordered = list(distinct(sorted((job for job in with_parents(chosen)), key=lambda job: job.seed)))
    for job in ordered:
        config_of(job)  # a wrong row must not be found out hours later
    if args.dry_run:
        print(needs_of(ordered, scale.launch, scale.samples, Estimator(init_run().device)))
        return
    ledger = Ledger(args.results / f"{args.scale}.json", args.known)
    make_data(data)

    def write() -> None:
        ledger.write(with_parents([job for rows in jobs.values() for job in rows]))
        for name, table in tables.items():
            write_table(name, table, jobs, ledger, args.results / f"{args.scale}_{name.replace(' ', '_')}")

    failures = run_all(ordered, ledger, scale.launch, args.jobs, write)
    write()
    for name in tables:
        print((args.results / f"{args.scale}_{name.replace(' ', '_')}.md").read_text(encoding="utf-8"))
    if args.figures:
        print(write_figures(args.scale, tables, jobs, ledger, args.results))
    if failures:
        raise failures[0]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default="all", help="names or numbers of tables, separated by commas; default: all")
    parser.add_argument("--scale", default="shapes", help="shapes, fast or paper: the sizes, configs and data; default: shapes")
    parser.add_argument("--seeds", type=at_least_one, default=3, help="runs of each row")
    parser.add_argument("--jobs", type=at_least_one, default=1, help="runs at a time, which share the CPU cores")
    parser.add_argument("--rows", help="make only the runs of these rows, separated by ';' (none: just write the tables)")
    parser.add_argument("--figures", action="store_true", help="draw the tables' figures too; some run models on test samples")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and what they need; run nothing")
    parser.add_argument("--known", type=Path, metavar="FILE", help="count the runs in this results file of another machine as made")
    parser.add_argument("--plan", type=Path, default=PLAN, help="YAML file of the tables")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="folder of the runs")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the tables")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that running children are ended too
    return parser.parse_args()


def plan_jobs(plan: Plan, scale: str, tables: Mapping[str, Table], seeds: int, folder: Path, data: Mapping[str, str]) -> Jobs:
    """Returns the runs of each row of each table."""
    return {
        (name, row.name): jobs_of(plan, scale, table, row, seeds, folder, data)
        for name, table in tables.items()
        for row in table.rows
    }


def with_parents(jobs: Sequence[Job]) -> list[Job]:
    """Adds the runs whose checkpoints others evaluate, in front of them."""
    return [each for job in jobs for each in ([*with_parents([job.parent]), job] if job.parent else [job])]


def write_table(name: str, table: Table, jobs: Jobs, ledger: Ledger, path: Path) -> None:
    """Writes a table of the completed runs to `path`.md and .csv."""
    found = found_of(name, table, jobs, ledger)
    shown = table.model_copy(update={"rows": [row for row in table.rows if row.published or jobs[name, row.name]]})
    refused = {row.name: next(filter(None, map(ledger.refused, jobs[name, row.name])), "") for row in table.rows}
    text = markdown(name, shown, found, command_line(), versions_of([found]), refused)
    Path(f"{path}.md").write_text(text, encoding="utf-8")
    Path(f"{path}.csv").write_text(as_csv(shown, found, refused), encoding="utf-8")


def write_figures(scale: str, tables: Mapping[str, Table], jobs: Jobs, ledger: Ledger, folder: Path) -> Path:
    """Writes the page of the tables' figures. Returns its path."""
    shown = {
        name: table.model_copy(update={"rows": [row for row in table.rows if row.published or jobs[name, row.name]]})
        for name, table in tables.items()
    }
    found = {name: found_of(name, table, jobs, ledger) for name, table in shown.items()}
    origin = f"Made by {command_line()}. {' '.join(versions_of(list(found.values())))}"
    path = folder / f"{scale}.html"
    write_page(path, f"Figures of the tables, scale {scale}", list(parts_of(shown, found)), origin)
    return path


def found_of(name: str, table: Table, jobs: Jobs, ledger: Ledger) -> dict[str, list[dict]]:
    """Returns the entries of the completed runs by row."""
    return {row.name: entries_of(jobs[name, row.name], ledger) for row in table.rows}


def command_line() -> str:
    return shlex.join(["python", "tools/reproduce_tables.py", *sys.argv[1:]])


def versions_of(tables: Sequence[Mapping[str, list[dict]]]) -> list[str]:
    """Describes the code of these runs, and this machine."""
    entries = [entry for found in tables for row in found.values() for entry in row]
    codes = {entry["result"].get("versions", {}).get("code") or "not recorded" for entry in entries}
    return [f"Commits: {', '.join(sorted(codes)) or 'none'}.", f"Machine: {cpu_name()}, Python {platform.python_version()}."]


def entries_of(jobs: Sequence[Job], ledger: Ledger) -> list[dict]:
    return [entry for entry in map(ledger.entry, jobs) if entry is not None]


if __name__ == "__main__":
    run_main(main)
