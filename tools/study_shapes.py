"""Produces the Shapes results: several seeds, random pruning, pruning without fine-tuning, and models with restricted inputs.

    python tools/study_shapes.py --task nlvr --jobs 2
    python tools/study_shapes.py --task nlvr --jobs 2 --arms      # token pruning with 2:4 weights, distillation, and both
    python tools/study_shapes.py --task nlvr --jobs 2 --orders    # all three, with different orders of weights and tokens
    python tools/study_shapes.py --task nlvr --jobs 2 --alignment # ways for the learnable tokens to learn

Makes the data and runs the task's script once per row and seed; a run that the same command has completed is not repeated. After
each run the tables so far are written to results/shapes_TASK.md and the results to results/shapes_TASK.json (with --arms to
shapes_TASK_arms.*, and so on).
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from engine.results import write_json
from tasks.registry import TASKS, demonstrated
from tools.demo import SHAPES, config_of, data_command, execute
from utils import UserError, at_least_one, run_main

ROOT = Path(__file__).resolve().parents[1]
OUTPUT, RESULTS = Path("output/study"), Path("results")
STUDY_SHAPES = Path("datasets/shapes_study")  # data of tasks whose study needs more than the demo
SEEDS = (42, 43, 44)
COMMAND = "command.txt"  # file in a run's folder that records its command
ARMS_P = 0.8
ALONE_P = 0.2  # less than 2:4 weights remove, so that no tokens are pruned
WEIGHTS = "--set sparsity_type=2:4 --set order=together"
ARMS = {", distilled": "--set distill=true", ", 2:4": WEIGHTS, ", 2:4, distilled": f"{WEIGHTS} --set distill=true"}
ORDERS = ("weights_first", "tokens_first", "adaptive")  # the orders other than together

WITHOUT_TOKEN = "--set tis=[cls,self]"
MERGE, DECISION = "--set token_gradient=merge", "--set token_gradient=decision"
FASTER = "--set align_lr_scale=100"
GUIDES = {"merge": MERGE, "decision": DECISION, "decision, faster E": f"{DECISION} {FASTER}"}
SEARCH = {
    "faster E": FASTER,
    "merge, faster E": f"{MERGE} {FASTER}",
    "decision, E ten times as fast": f"{DECISION} --set align_lr_scale=10",
    "decision, faster E, wide": f"{DECISION} {FASTER} --set relaxation=3",
    "decision, faster E, narrow": f"{DECISION} {FASTER} --set relaxation=0.3",
    "decision, faster E, annealed": f"{DECISION} {FASTER} --set relaxation=3 --set relaxation_end=0.3",
    "decision, faster E, std 1": f"{DECISION} {FASTER} --set sd_init_std=1",
    "decision, faster E, std 0.02": f"{DECISION} {FASTER} --set sd_init_std=0.02",
    "decision, faster E, aligned first": f"{DECISION} {FASTER} --set align_epochs=2",
    "decision, faster E, sim 0.01": f"{DECISION} {FASTER} --set sim_weight=0.01",
    "decision, faster E, sim 1": f"{DECISION} {FASTER} --set sim_weight=1",
    "decision, faster E, negatives": f"{DECISION} {FASTER} --set sim_negatives=true",
    "faster E, negatives, sim 1": f"{FASTER} --set sim_negatives=true --set sim_weight=1",
}


@dataclass(frozen=True)
class Job:
    """The run of a row with one seed."""

    row: str
    folder: Path
    command: list[str]

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    @property
    def has_run(self) -> bool:
        """Tells whether the run has completed with exactly this command: the meaning of a row may have changed since."""
        said = self.folder / COMMAND
        return self.result.is_file() and said.is_file() and said.read_text(encoding="utf-8") == shlex.join(self.command)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="nlvr", choices=demonstrated())
    parser.add_argument("--jobs", type=at_least_one, default=1, help="number of runs at a time, which share the CPU cores")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--arms", action="store_true", help=f"instead: effect of sparse weights and distillation, p = {ARMS_P:g}")
    instead.add_argument("--orders", action="store_true", help="instead: effect of the order of weights and tokens")
    instead.add_argument("--alignment", action="store_true", help="instead: effect of the ways for the learnable tokens to learn")
    parser.add_argument("--rows", help="run only these rows, separated by ';'; the table shows all rows that have been run")
    args = parser.parse_args()
    os.chdir(ROOT)
    task = TASKS[args.task].demo
    data = SHAPES if task.study_size == task.demo_size else STUDY_SHAPES
    execute(data_command(task, data, task.study_size))
    kinds = {"arms": arms_of, "orders": orders_of, "alignment": alignment_of}
    kind = next((kind for kind in kinds if getattr(args, kind)), "")
    rows = kinds[kind]() if kind else rows_of(args.task)
    wanted = [row.strip() for row in args.rows.split(";")] if args.rows else list(rows)
    if unknown := [row for row in wanted if row not in rows]:
        raise UserError(f"--rows: there is no row '{unknown[0]}'; there are: {'; '.join(rows)}")
    jobs = jobs_of(args.task, data, rows)
    name = "_".join(filter(None, ("shapes", args.task, kind)))
    problems, text = [], ""
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for ended in as_completed([pool.submit(run, job, args.jobs) for job in jobs if job.row in wanted]):
                problems += [ended.exception()] if ended.exception() else []  # the other runs go on
                text = write_results(args.task, jobs, name)
        finally:
            pool.shutdown(cancel_futures=True)
    print(text)
    if problems:
        raise problems[0]


def jobs_of(name: str, data: Path, rows: Mapping[str, tuple[str, bool]]) -> list[Job]:
    """Lists all runs. The first seed of every row comes before any second seed, so that a full table is there early.

    Args:
        name: the task.
        data: the folder of the data set.
        rows: from `rows_of`, `arms_of` or `orders_of`.
    """
    shared = [TASKS[name].config_class.script, "--config", str(config_of(name))]
    if data != SHAPES:  # the configs already point to SHAPES
        for key in TASKS[name].config_class.image_keys:
            shared += ["--set", f"{key}={data / 'images'}"]
        shared += ["--set", f"ann_root={data / 'annotations'}"]
    jobs = []
    for row, (arguments, each) in rows.items():
        for seed in SEEDS if each else SEEDS[:1]:
            folder = OUTPUT / f"{name}_{row.replace(' = ', '').replace(', ', '_').replace(' ', '_').replace(':', '-')}_{seed}"
            jobs.append(Job(row, folder, [*shared, "--seed", str(seed), "--output_dir", str(folder), *arguments.split()]))
    return sorted(jobs, key=lambda job: not job.folder.name.endswith(f"_{SEEDS[0]}"))


def rows_of(name: str) -> dict[str, tuple[str, bool]]:
    """Returns row -> its arguments, and whether it is run with every seed."""
    demo = TASKS[name].demo
    reductions = demo.reductions
    rows = {"uncompressed": ("--p 0 --evaluate", False)}
    rows |= {f"p = {p:g}": (f"--p {p:g}", True) for p in reductions}
    rows[f"p = {reductions[-1]:g}, at random"] = (f"--p {reductions[-1]:g} --set method=random", True)
    rows |= {f"p = {p:g}, not fine-tuned": (f"--p {p:g} --evaluate", True) for p in reductions}
    return rows | {row: (arguments, False) for row, arguments in demo.blind.items()}


def arms_of() -> dict[str, tuple[str, bool]]:
    """Returns the rows of MADTP++, in the form of `rows_of`. All arms have the same GFLOPs, whether tokens or weights save them."""
    tokens = f"p = {ARMS_P:g}"
    arms = {tokens + name: (f"--p {ARMS_P:g} {arguments}".strip(), True) for name, arguments in {"": "", **ARMS}.items()}
    alone = f"--p {ALONE_P:g} --evaluate {WEIGHTS} --set method=none"
    before = f"--p {ARMS_P:g} --evaluate"
    untrained = {
        f"{tokens}, not fine-tuned": before,
        f"{tokens}, 2:4, not fine-tuned": f"{before} {WEIGHTS}",
        "2:4 alone, not fine-tuned": alone,
        "2:4 alone, masked only, not fine-tuned": f"{alone} --set refit_weights=false",
    }
    return {"uncompressed": ("--p 0 --evaluate", False), **arms, **{name: (each, False) for name, each in untrained.items()}}


def orders_of() -> dict[str, tuple[str, bool]]:
    """Returns the rows of the arm with tokens, weights and distillation: the order `together`, and the other orders."""
    name, arms = f"p = {ARMS_P:g}, 2:4, distilled", arms_of()
    others = {f"{name}, {order}": (arms[name][0].replace("together", order), True) for order in ORDERS}
    return {"uncompressed": arms["uncompressed"], name: arms[name], **others}


def alignment_of() -> dict[str, tuple[str, bool]]:
    """Returns the rows of the search for learnable tokens that guide, one change each, with what they are compared to.

    Those that decide, first, are run with every seed, the search with one.
    """
    decide = {"": "", ", without S_token": WITHOUT_TOKEN, ", without MAG": f"{WITHOUT_TOKEN} --set sim_weight=0"}
    decide |= {f", {name}": arguments for name, arguments in GUIDES.items()}
    rows = {f"p = {ARMS_P:g}{name}": (f"--p {ARMS_P:g} {arguments}".strip(), True) for name, arguments in decide.items()}
    return rows | {f"p = {ARMS_P:g}, {name}": (f"--p {ARMS_P:g} {arguments}", False) for name, arguments in SEARCH.items()}


def run(job: Job, at_a_time: int) -> None:
    """Runs a job, one of `at_a_time` that share the CPU cores. Its output goes to the file `folder`.txt."""
    if job.has_run:
        return
    job.result.unlink(missing_ok=True)
    print(f"$ python {shlex.join(job.command)}", flush=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_a_time))}
    with open(f"{job.folder}.txt", "w", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, *job.command], stdout=log, stderr=log, env={**os.environ, **threads}).returncode
    if code:
        raise UserError(f"{job.folder.name}: ended with exit code {code}; see {job.folder}.txt")
    (job.folder / COMMAND).write_text(shlex.join(job.command), encoding="utf-8")


def write_results(task: str, jobs: Sequence[Job], name: str) -> str:
    """Writes the results of the completed runs to files with this name. Returns the table."""
    results: dict[str, list[dict]] = {}
    for job in jobs:
        if job.has_run:
            results.setdefault(job.row, []).append(json.loads(job.result.read_text()))
    RESULTS.mkdir(exist_ok=True)
    write_json(results, RESULTS / f"{name}.json")
    versions = sorted({each.get("versions", {}).get("code") or "unknown" for found in results.values() for each in found})
    text = f"Made by `python {shlex.join(sys.argv)}`; commit: {', '.join(versions)}.\n\n{table(task, results)}\n"
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    return text


def table(name: str, results: Mapping[str, Sequence[dict]]) -> str:
    """Formats the results as a Markdown table of the task's main metric: mean and standard deviation over the seeds."""
    words, (metric, *_) = next(iter(TASKS[name].columns.items()))
    head = ("model", f"{words} (test)", f"{words} (val)", "GFLOPs (slice)", "fewer", "off target", "seeds")
    sparse = any(each["sparsity_type"] for found in results.values() for each in found)
    alone = ("by tokens alone", "by weights alone") if sparse else ()
    head = (*head[:5], *alone, *head[5:])
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, found in results.items():
        test, val = (spread([result["metrics"][split][metric] for result in found]) for split in ("test", "val"))
        gflops = [result["gflops"] for result in found]
        measured = statistics.mean(each["measured"] for each in gflops)
        parts = [statistics.mean(each[key] for each in gflops) for key in ("tokens", "weights")] if alone else []
        off = max(abs(each["measured"] / each["target"] - 1) for each in gflops)
        shares = [f"{1 - part / gflops[0]['uncompressed']:.1%}" for part in (measured, *parts)]
        lines.append(f"| {row} | {test} | {val} | {measured:.4f} | {' | '.join(shares)} | {off:.2%} | {len(found)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    run_main(main)
