"""The plan of tables: their rows and scales from configs/tables.yaml, and the runs of entry scripts that fill them."""

import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from configs.load import parse_command_line, read_yaml
from configs.schema import Config
from configs.sizes import Section, require
from tasks.registry import TASKS, load_any_config
from tasks.task import Task
from utils import UserError

PLAN = Path("configs/tables.yaml")
FIRST_SEED = 42


class Row(Section):
    """A row of a table. It has runs of its own, or numbers published elsewhere, or both."""

    name: str
    ratio: float | None = Field(None, description="reduce ratio by which the paper names the row")
    run: str | dict[str, str] | None = Field(
        None, description="arguments of the entry script; by scale where they differ, and none at scales that are not named"
    )
    after: str = Field("", description="name of the row whose selected checkpoints the runs evaluate, each with its own seed")
    seeds: int | None = Field(None, ge=1, description="number of seeds, if fewer than those asked for")
    against: str = Field("", description="name of the row that this one is compared with, sample by sample")
    paper: list[float | None] = Field([], description="the paper's figures, in the order of the table's columns")
    published: list[float | None] = Field([], description="figures of others that the paper cites; no run is made")
    note: str = Field("", description="explanation below the table")

    @model_validator(mode="after")
    def _has_numbers(self) -> "Row":
        return require(self, self.run is not None or bool(self.published), f"row {self.name!r} has neither runs nor figures")

    def arguments(self, scale: str) -> str | None:
        """Returns the arguments of the row's runs at a scale; None if it has none there."""
        return self.run.get(scale) if isinstance(self.run, dict) else self.run


class Table(Section):
    """A table: rows that share a data set and columns."""

    title: str
    data: str = Field(description="name of the data set, a key of the scale's configs")
    columns: dict[str, str] = Field(description="heading -> place of the figure in result.json, with dots")
    scales: list[str] = Field([], description="scales that have the table; none: all that know its data set")
    rows: list[Row] = Field(min_length=1)

    @model_validator(mode="after")
    def _rows_fit(self) -> "Table":
        names = [row.name for row in self.rows]
        for row in self.rows:
            require(self, names.count(row.name) == 1, f"two rows are named {row.name!r}")
            for other in filter(None, (row.after, row.against)):
                require(self, other in names, f"row {row.name!r} refers to {other!r}, and there is no such row")
            for figures in (row.paper, row.published):
                require(self, len(figures) in (0, len(self.columns)), f"row {row.name!r}: one figure for each of the columns")
        return self


class Scale(Section):
    """The sizes at which tables are made."""

    configs: dict[str, Path] = Field(description="data set -> YAML file of its runs")
    arguments: str = Field("", description="arguments of every run")
    launch: str = Field("python", description="command in front of the entry script")
    data: Literal["", "study", "fast"] = Field("", description="size of the Shapes data that is made first; empty: none is")
    samples: dict[str, int] = Field({}, description="data set -> training samples, for an estimate of the time")


class Plan(Section):
    """The content of configs/tables.yaml."""

    scales: dict[str, Scale]
    tables: dict[str, Table]


@dataclass(frozen=True)
class Job:
    """A run of an entry script for a row with one seed.

    command: the script with its arguments
    folder: where the run writes
    own: the arguments that tell it from other runs on its data set
    parent: the run whose checkpoint it evaluates
    data: name of the data set
    """

    command: tuple[str, ...]
    folder: Path
    seed: int
    own: str
    parent: "Job | None" = None
    data: str = ""

    @property
    def evaluates(self) -> bool:
        return "--evaluate" in self.command


def read_plan(path: Path = PLAN) -> Plan:
    """
    Raises:
        UserError: when the file does not describe tables; names the place and the problem.
    """
    try:
        return Plan(**read_yaml(path))
    except ValidationError as error:
        problem = error.errors()[0]
        place = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {place}: {problem['msg']}; correct it") from None


def tables_of(plan: Plan, scale: str, wanted: str) -> dict[str, Table]:
    """Returns the tables of a scale that `wanted` names: names separated by commas, or "all".

    A first word stands for all tables that begin with it, such as 5 for "5 COCO".

    Raises:
        UserError: for an unknown scale or table.
    """
    if scale not in plan.scales:
        raise UserError(f"--scale {scale}: there is no such scale; there are: {', '.join(plan.scales)}")
    known = {
        name: table
        for name, table in plan.tables.items()
        if table.data in plan.scales[scale].configs and scale in (table.scales or [scale])
    }
    if wanted == "all":
        return known
    chosen: dict[str, Table] = {}
    for part in (part.strip() for part in wanted.split(",")):
        found = {name: table for name, table in known.items() if name == part or name.split()[0] == part}
        if not found:
            raise UserError(f"--tables {part}: there is no such table at scale {scale}; there are: {', '.join(known)}")
        chosen |= found
    return chosen


def jobs_of(plan: Plan, scale: str, table: Table, row: Row, seeds: int, folder: Path, data: Mapping[str, str]) -> list[Job]:
    """Returns the runs of a row, one per seed; none if it has none at this scale.

    Args:
        seeds: number of seeds.
        folder: below which each run has its folder.
        data: arguments that point to the data set, by data set.
    """
    if row.arguments(scale) is None:
        return []
    rows = {each.name: each for each in table.rows}
    least = min(seeds, row.seeds or seeds)
    if row.after:
        parents = jobs_of(plan, scale, table, rows[row.after], least, folder, data)
        return [_job(plan.scales[scale], table.data, row.arguments(scale), job.seed, folder, data, job) for job in parents]
    return [_job(plan.scales[scale], table.data, row.arguments(scale), FIRST_SEED + i, folder, data) for i in range(least)]


def _job(
    scale: Scale, dataset: str, own: str, seed: int, folder: Path, data: Mapping[str, str], parent: Job | None = None
) -> Job:
    config = scale.configs[dataset]
    where = folder / dataset / f"{_slug(own)}_{seed}"
    evaluated: tuple[str, ...] = ()
    if parent is not None:
        where = parent.folder.with_name(f"{parent.folder.name}_then_{_slug(own)}")
        own = f"{parent.own} {own}"
        evaluated = ("--evaluate", "--pretrained", str(parent.folder / "checkpoint_best.pth"))
    shared = ("--config", str(config), *shlex.split(data.get(dataset, "")), "--seed", str(seed), "--output_dir", str(where))
    command = (task_of(config).config_class.script, *shared, *shlex.split(f"{own} {scale.arguments}"), *evaluated)
    return Job(command, where, seed, own, parent, dataset)


def _slug(arguments: str) -> str:
    """Turns arguments into the name of a folder."""
    plain = re.sub(r"--set |--", "", arguments).replace("=", "-").replace(" ", "_")
    return re.sub(r"[^A-Za-z0-9._,-]", "", plain) or "default"


@cache
def task_of(config: Path) -> type[Task]:
    """Returns the task that a YAML file names."""
    return TASKS[load_any_config(config).task]


def config_of(job: Job) -> Config:
    """Builds the config of a run, and thereby checks its command."""
    cls = next(task.config_class for task in TASKS.values() if task.config_class.script == job.command[0])
    return parse_command_line("", cls, list(job.command[1:]))


def distinct(jobs: Iterable[Job]) -> Iterator[Job]:
    """Yields each run once: rows of several tables may share it."""
    seen: set[Path] = set()
    for job in jobs:
        if job.folder not in seen:
            seen.add(job.folder)
            yield job


def figure(result: Mapping[str, Any], place: str) -> float | None:
    """Returns the number at a place in a result, such as metrics.test.acc; None if there is none."""
    value: Any = result
    for key in place.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None
