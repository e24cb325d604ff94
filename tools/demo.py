"""The whole way on a small world: data, uncompressed evaluation, compression, and a report. Run by `make demo`.

    python tools/demo.py --task nlvr

Writes output/demo/TASK_pX/ (a run each), output/demo/summary.json (their results) and output/demo/report.html.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from engine.report import Picture, ReportedRun, table, text_table, write_report  # noqa: E402
from engine.results import write_json  # noqa: E402
from options import load_config  # noqa: E402
from tools.visualize import DPI, VIEWS, View, draw, open_view, spread  # noqa: E402
from utils import UserError, run_main  # noqa: E402

REDUCTIONS = (0.0, 0.5, 0.8)  # the values of p; 0 evaluates the uncompressed model
OUTPUT = Path("output/demo")

# The data. Another seed than pretraining's: its pictures have not been seen.
SHAPES = Path("datasets/shapes")
SEED, SIZE, STATEMENTS_PER_PAIR, VAL_SIZE, TEST_SIZE = 7, 6_000, 8, 1_000, 4_000

# What is measured for the report.
TIMED_BATCHES, TIMED_ROUNDS = 2, 9
COUNTED_SAMPLES = 512
DRAWN = (0.0, 0.25, 0.5, 0.75, 1.0)  # samples are drawn at these ranks of the tokens that they keep


@dataclass(frozen=True)
class Task:
    """What differs from task to task: what runs, on what, and how its models are looked at."""

    title: str
    script: str
    config: Path
    shapes: str  # its name in tools/make_shapes.py
    annotations: tuple[str, ...]  # the files that it reads
    view: type


TASKS = {
    "nlvr": Task(
        "NLVR2 on Shapes: does a sentence hold for two images?",
        "compress_nlvr_dtp.py",
        Path("configs/shapes/nlvr.yaml"),
        "nlvr",
        ("nlvr_train.json", "nlvr_dev.json", "nlvr_test.json"),
        VIEWS["nlvr"],
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="nlvr", choices=TASKS)
    name = parser.parse_args().task
    task = TASKS[name]
    os.chdir(ROOT)
    started = time.time()
    steps = 2 + len(REDUCTIONS)
    headline(f"1/{steps} data")
    commands = make_data(task)
    folders = [OUTPUT / f"{name}_p{p:g}" for p in REDUCTIONS]
    for number, (p, folder) in enumerate(zip(REDUCTIONS, folders, strict=True), 2):
        headline(f"{number}/{steps} " + (f"compression at p = {p:g}" if p else "uncompressed evaluation"))
        shutil.rmtree(folder, ignore_errors=True)  # an earlier demo's
        command = [task.script, "--config", str(task.config), "--p", f"{p:g}", "--output_dir", str(folder)]
        commands.append(execute(command + ([] if p else ["--evaluate"])))
    headline(f"{steps}/{steps} report")
    runs, report = gather(task, folders, commands)
    print(f"\n{text_table(table(runs))}\n\n{report} ({minutes(time.time() - started)})")


def make_data(task: Task) -> list[str]:
    """Write the Shapes data set, unless the same one is there. Returns the command, if it was needed.

    Raises:
        UserError: when there are data that this program did not write.
    """
    command = ["tools/make_shapes.py", "--out", str(SHAPES), "--seed", str(SEED), "--size", str(SIZE), "--tasks", task.shapes]
    command += ["--statements-per-pair", str(STATEMENTS_PER_PAIR), "--eval-size", str(TEST_SIZE), "--val-size", str(VAL_SIZE)]
    stamp = {"command": shlex.join(command), "generator": digest(Path("data/shapes")), "complete": True}
    path = SHAPES / f"demo_{task.shapes}.json"
    found = json.loads(path.read_text()) if path.is_file() else None
    if found == stamp:
        print(f"{SHAPES}: made before by the same command and code, used again")
        return []
    if found is None and any((SHAPES / "annotations" / name).exists() for name in task.annotations):
        raise UserError(f"{SHAPES}: holds data that this demo did not make; move them away, it needs data of its own there")
    SHAPES.mkdir(parents=True, exist_ok=True)
    write_json({**stamp, "complete": False}, path)
    done = execute(command)
    write_json(stamp, path)
    return [done]


def digest(folder: Path) -> str:
    """Of the Python files of a folder: data made by other code are other data."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))).hexdigest()[:16]


def execute(arguments: Sequence[str]) -> str:
    """Run one of the project's programs as a user would, its output on this terminal; leaves with its exit code if it fails.

    Returns the command line.
    """
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(ROOT) else sys.executable
    print(f"$ {shlex.join([python, *arguments])}", flush=True)
    try:
        code = subprocess.run([sys.executable, *arguments]).returncode
    except KeyboardInterrupt:
        code = 130
    if code:
        print(f"error: the demo stopped: {arguments[0]} ended with exit code {code}", file=sys.stderr)
        sys.exit(code if code > 0 else 128 - code)  # below 0: the number of a signal
    return shlex.join(["python", *arguments])


def gather(task: Task, folders: Sequence[Path], commands: Sequence[str]) -> tuple[list[ReportedRun], Path]:
    """Measure the models of the runs, write summary.json and report.html."""
    results = [json.loads((folder / "result.json").read_text()) for folder in folders]
    views = [open_run(task, folder) for folder in folders]
    speeds, batches = throughput(views)
    counted = spread(views[0].ids, COUNTED_SAMPLES)
    print(f"counting the tokens of {len(counted)} test samples", flush=True)
    runs = [
        ReportedRun(result, read_log(folder), speed, count_tokens(view, counted))
        for result, folder, speed, view in zip(results, folders, speeds, views, strict=True)
    ]
    pictures = draw_samples([(run, view) for run, view in zip(runs, views, strict=True) if run.compressed], folders[1])
    write_json(results, OUTPUT / "summary.json")
    path = OUTPUT / "report.html"
    notes = [*counting_notes(results[0]), *timing_notes(views[0], batches)]
    write_report(path, f"MADTP: {task.title}", runs, notes, len(counted), pictures, commands)
    return runs, path


def open_run(task: Task, folder: Path) -> View:
    """The model that a run left behind; of an evaluation, the one that it evaluated."""
    config = load_config(task.view.config_class, folder / "config.yaml")
    return open_view(task.view, config, config.pretrained if config.evaluate else folder / "checkpoint_best.pth")


def read_log(folder: Path) -> list[dict]:
    path = folder / "log.txt"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def throughput(views: Sequence[View]) -> tuple[list[float], list[dict]]:
    """Images per second of each model on the same real test batches, in memory; and these batches.

    The models take turns, so that a machine that slows down slows all of them; the median of the rounds after a warm-up counts.
    """
    size = views[0].config.batch_size_test
    batches = list(views[0].batches(views[0].ids[: TIMED_BATCHES * size]))
    print(f"measuring images/s: {TIMED_ROUNDS} rounds of {len(batches)} batches, models in turn", flush=True)
    seconds: list[list[float]] = [[] for _ in views]
    for _ in range(1 + TIMED_ROUNDS):
        for view, times in zip(views, seconds, strict=True):
            started = synchronised_time(view)
            for batch in batches:
                view.forward(batch)
            times.append(synchronised_time(view) - started)
    images = views[0].pictures_per_sample * sum(len(batch["ids"]) for batch in batches)
    return [images / statistics.median(times[1:]) for times in seconds], batches


def synchronised_time(view: View) -> float:
    if view.run.device.type == "cuda":
        torch.cuda.synchronize(view.run.device)
    return time.perf_counter()


def count_tokens(view: View, ids: Sequence[str]) -> dict:
    """Tower -> (samples, 1 + blocks) tokens."""
    counts = [view.tokens(view.forward(batch)) for batch in view.batches(ids)]
    return {tower: torch.cat([count[tower] for count in counts]).cpu().numpy() for tower in counts[0]}


def draw_samples(compressed: Sequence[tuple[ReportedRun, View]], folder: Path) -> list[Picture]:
    """The same test samples under each compressed model: from few tokens kept to many, as the run in `folder` ranks them."""
    predictions = json.loads((folder / "predictions_test.json").read_text())
    ranked = sorted(predictions, key=lambda sample: (predictions[sample]["tokens_kept"], sample))
    chosen = [ranked[round(rank * (len(ranked) - 1))] for rank in DRAWN]
    print(f"drawing {len(chosen)} test samples", flush=True)
    views = [view for _, view in compressed]
    drawn = [{sample.id: sample for batch in view.batches(chosen) for sample in view.samples(batch)} for view in views]
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
        "GFLOPs are billions of multiply-adds per sample at true text lengths, padding left out, pruning's own cost included;"
        " the mean over the calibration slice, a part of the training split. 'fewer' is p as measured there."
        " The test split's mean stands beside it.",
        "The checkpoint is chosen on validation; test is evaluated once."
        f" Keep rule: {result['keep']}; variant: {result['variant']}; seed {result['seed']}.",
    ]


def timing_notes(view: View, batches: Sequence[dict]) -> list[str]:
    device = view.run.device
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    precision = f"autocast to {str(view.precision.dtype).removeprefix('torch.')}" if view.config.amp else "float32"
    return [
        f"images/s: the whole forward pass of batches of {view.config.batch_size_test} test samples in memory,"
        f" {view.pictures_per_sample} images each; median of {TIMED_ROUNDS} rounds after a warm-up, models in turn.",
        f"Machine: {device.type}, {where}; {precision}; PyTorch {torch.__version__}.",
    ]


def cpu_name() -> str:
    """As Linux tells it, or the kind of processor."""
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
