"""Runs all steps on the small Shapes data: data, uncompressed evaluation, compression and a report. Run by `make demo`.

    python tools/demo.py --task nlvr

Writes output/demo/TASK_pX/ (one run each), output/demo/summary.json (their results) and output/demo/report.html. The summary and
the report of an earlier demo are replaced. The measured speed is in output/demo/speed.csv, too.
"""

import argparse
import io
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch

from engine.results import write_json
from tasks.registry import TASKS, demonstrated
from tasks.task import Demo
from tasks.view import View, spread
from tools.benchmark import machine, write_csv
from tools.benchmarks.runs import BATCHES, ROUNDS, Speed, open_run, remarks, time_runs
from tools.report import Picture, ReportedRun, table, text_table, write_report
from tools.visualize import DPI, draw
from utils import run_main

ROOT = Path(__file__).resolve().parents[1]
OUTPUT, SHAPES = Path("output/demo"), Path("datasets/shapes")
SEED = 7  # seed of the data; differs from that of pretraining, so that the pictures are new to the model

DEMO_EPOCHS = 3  # fewer than in the config, so that the demo takes only minutes
SHORT = ["--epoch", str(DEMO_EPOCHS), "--set", "ramp_epochs=1"]

# Measurements for the report.
COUNTED_SAMPLES = 512
DRAWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # the counted samples are sorted by tokens kept, and those at these ranks are drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="nlvr", choices=demonstrated())
    name = parser.parse_args().task
    task, script = TASKS[name].demo, TASKS[name].config_class.script
    os.chdir(ROOT)
    started = time.time()
    headline("1/4 data")
    commands = [execute(data_command(task, SHAPES, task.demo_size))]
    folders, programs = [], {}
    for p in (0.0, *task.reductions):
        folders.append(OUTPUT / f"{name}_p{p:g}")
        shutil.rmtree(folders[-1], ignore_errors=True)  # remove the run of an earlier demo
        command = [script, "--config", str(config_of(name)), "--p", f"{p:g}", "--output_dir", str(folders[-1])]
        programs[f"p = {p:g}"] = command + (SHORT if p else ["--evaluate"])
    headline("2/4 uncompressed evaluation")
    commands.append(execute(programs.pop("p = 0")))
    headline(f"3/4 compression at {' and '.join(programs)}")
    # On a CPU the runs go side by side: a model this small gains nothing from a second core.
    commands += map(execute, programs.values()) if torch.cuda.is_available() else execute_side_by_side(programs)
    headline("4/4 report")
    runs, report = gather(task, folders, commands)
    columns = zip(*table(runs), strict=True)  # one column per run, which fits a terminal
    print(f"\n{text_table(list(columns))}\n\n{report} ({minutes(time.time() - started)})")


def config_of(name: str) -> Path:
    return Path(f"configs/shapes/{name}.yaml")


def data_command(task: Demo, folder: Path, size: int) -> list[str]:
    """Returns the command that writes a Shapes data set of `size` to `folder`, unless the same one is there."""
    command = ["tools/make_shapes.py", "--out", str(folder), "--seed", str(SEED), "--size", str(size), "--tasks", task.shapes]
    return command + task.options.split()


def execute(arguments: Sequence[str]) -> str:
    """Runs a program of the project with its output on this terminal. Exits with its exit code if it fails.

    Returns the command line.
    """
    announce(arguments)
    try:
        code = subprocess.run([sys.executable, *arguments]).returncode
    except KeyboardInterrupt:
        code = 130
    leave_if_failed(arguments, code)
    return shlex.join(["python", *arguments])


def execute_side_by_side(programs: Mapping[str, Sequence[str]]) -> list[str]:
    """Runs several programs at once, each with its share of the CPU cores. Returns their command lines.

    Each line of output starts with the name of its program. Only the progress bars of the first program are shown. If one
    fails, the others are stopped.
    """
    share = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // len(programs)))}
    running: dict[str, subprocess.Popen] = {}

    def relay(name: str) -> tuple[str, int]:
        for line in running[name].stdout:
            print(f"{name} | {line}", end="", flush=True)
        return name, running[name].wait()

    for name, arguments in programs.items():
        announce(arguments)
        errors = subprocess.STDOUT if running else None
        running[name] = subprocess.Popen(
            [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, **share}
        )
    with ThreadPoolExecutor(len(running)) as pool:
        try:
            for ended in as_completed([pool.submit(relay, name) for name in running]):
                name, code = ended.result()
                leave_if_failed(programs[name], code)
        except KeyboardInterrupt:
            leave_if_failed(next(iter(programs.values())), 130)
        finally:
            for process in running.values():
                process.terminate()
    return [shlex.join(["python", *arguments]) for arguments in programs.values()]


def announce(arguments: Sequence[str]) -> None:
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(ROOT) else sys.executable
    print(f"$ {shlex.join([python, *arguments])}", flush=True)


def leave_if_failed(arguments: Sequence[str], code: int) -> None:
    if code:
        print(f"error: the demo stopped: {arguments[0]} ended with exit code {code}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # a negative code is the number of a signal


def gather(task: Demo, folders: Sequence[Path], commands: Sequence[str]) -> tuple[list[ReportedRun], Path]:
    """Measures the models of the runs, and writes summary.json and report.html."""
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    views = [open_run(folder) for folder in folders]
    print(f"measuring images/s: {ROUNDS} rounds of {BATCHES} batches, models in turn", flush=True)
    speeds = time_runs(views, [folder.name for folder in folders])
    ids = spread(views[0].ids, COUNTED_SAMPLES)
    print(f"counting the tokens of {len(ids)} test samples", flush=True)
    counts = [count_tokens(view, ids) for view in views]
    runs = [
        ReportedRun(result, read_log(folder), speed.images_per_second, tokens)
        for result, folder, speed, (tokens, _) in zip(results, folders, speeds, counts, strict=True)
    ]
    ranked = [sample for _, sample in sorted(zip(counts[1][1], ids, strict=True))]
    pictures = draw_samples([(run, view) for run, view in zip(runs, views, strict=True) if run.compressed], ranked)
    write_json(results, OUTPUT / "summary.json")
    command = f"python tools/demo.py --task {views[0].config.task}"
    write_csv(OUTPUT / "speed.csv", command, machine(str(views[0].run.device)), speeds)
    path = OUTPUT / "report.html"
    notes = [*counting_notes(results[0]), *task.notes, *timing_notes(views[0], speeds)]
    write_report(path, f"MADTP: {task.title}", runs, notes, len(ids), pictures, commands)
    return runs, path


def read_log(folder: Path) -> list[dict]:
    path = folder / "log.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def count_tokens(view: View, ids: Sequence[str]) -> tuple[dict[str, np.ndarray], list[int]]:
    """Counts tokens. Returns tower -> (images or texts, 1 + blocks), and the number of tokens that each sample keeps to the end."""
    counts, left = [], []
    for batch in view.batches(ids):
        output = view.forward(batch)
        counts.append(view.tokens(output))
        left += view.tokens_left(output).tolist()
    return {tower: torch.cat([count[tower] for count in counts]).cpu().numpy() for tower in counts[0]}, left


def draw_samples(compressed: Sequence[tuple[ReportedRun, View]], ranked: Sequence[str]) -> list[Picture]:
    """Draws the same test samples under each compressed model.

    `ranked` holds the sample ids by the number of tokens that the first of these models keeps, fewest first.
    """
    chosen = [ranked[round(rank * (len(ranked) - 1))] for rank in DRAWN]
    print(f"drawing {len(chosen)} test samples", flush=True)
    drawn = [{sample.id: sample for batch in view.batches(chosen) for sample in view.samples(batch)} for _, view in compressed]
    labels = [run.label for run, _ in compressed]
    pictures = []
    for rank, sample in zip(DRAWN, chosen, strict=True):
        buffer = io.BytesIO()
        draw([samples[sample] for samples in drawn]).savefig(buffer, format="png", dpi=DPI)
        place = {0.0: "fewest tokens kept", 1.0: "most tokens kept"}.get(rank, f"{rank:.0%} of the samples keep fewer tokens")
        caption = f"{sample}: above {labels[0]}, below {', '.join(labels[1:])} ({place} at {labels[0]})"
        pictures.append(Picture(caption, buffer.getvalue()))
    return pictures


def counting_notes(result: dict) -> list[str]:
    return [
        "GFLOPs are billions of multiply-adds per sample at true text lengths, without padding, including the cost of pruning:"
        " the mean over the calibration subset, a part of the training split. 'fewer' is p as measured there."
        " The mean over the test split is shown next to it.",
        "The checkpoint is selected on the validation split; the test split is evaluated once."
        f" Keep rule: {result['keep']}; variant: {result['variant']}; seed {result['seed']}.",
    ]


def timing_notes(view: View, speeds: Sequence[Speed]) -> list[str]:
    device, number = view.run.device, len(view.labels)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    precision = f"autocast to {str(view.precision.dtype).removeprefix('torch.')}" if view.config.amp else "float32"
    return [
        f"images/s: {view.timed}; {speeds[0].samples} test samples in memory, {number} image{'s' * (number > 1)} each, in batches"
        f" of {view.config.batch_size_test}; median of {ROUNDS} rounds after a warm-up, models in turn.",
        f"Machine: {device.type}, {where}; {precision}; PyTorch {torch.__version__}.",
        *remarks(speeds),
    ]


def cpu_name() -> str:
    """Returns the name of the CPU on Linux, elsewhere its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def minutes(seconds: float) -> str:
    return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


if __name__ == "__main__":
    run_main(main)
