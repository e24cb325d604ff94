"""What the Shapes results rest on: several seeds, pruning at random, pruning without fine-tuning, models that see less.

    python tools/study_shapes.py --jobs 2

Makes the demo's data, runs the task's script once a row and seed (a run that has ended is not run again) and writes
results/shapes_TASK.md and the results themselves, results/shapes_TASK.json.
"""

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from config import CONFIGS  # noqa: E402
from engine.results import write_json  # noqa: E402
from tools.demo import SHAPES, TASKS, config_of, make_data  # noqa: E402
from utils import UserError, run_main  # noqa: E402

OUTPUT, RESULTS = Path("output/study"), Path("results")
SEEDS = (42, 43, 44)

# row: (arguments, whether it is run once a seed)
ROWS = {
    "uncompressed": ("--p 0 --evaluate", False),
    "p = 0.5": ("--p 0.5", True),
    "p = 0.8": ("--p 0.8", True),
    "p = 0.8, at random": ("--p 0.8 --set method=random", True),
    "p = 0.5, not fine-tuned": ("--p 0.5 --evaluate", True),
    "p = 0.8, not fine-tuned": ("--p 0.8 --evaluate", True),
    "trained on the text alone": ("--p 0 --set text_only=true", False),
    "trained on the left image alone": ("--p 0 --set images=left", False),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", default="nlvr", choices=TASKS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which share the processor's cores")
    args = parser.parse_args()
    os.chdir(ROOT)
    make_data(TASKS[args.task], SHAPES, TASKS[args.task].demo_size)
    pairs = [(row, seed) for row, (_, each) in ROWS.items() for seed in (SEEDS if each else SEEDS[:1])]
    runs = {(row, seed): folder_of(args.task, row, seed) for row, seed in pairs}
    with ThreadPoolExecutor(args.jobs) as pool:
        done = [pool.submit(run, args, row, seed, folder) for (row, seed), folder in runs.items()]
        for future in done:
            future.result()
    results = {row: [read(folder) for (name, _), folder in runs.items() if name == row] for row in ROWS}
    RESULTS.mkdir(exist_ok=True)
    write_json(results, RESULTS / f"shapes_{args.task}.json")
    text = f"Made by `python {shlex.join(sys.argv)}`.\n\n{table(results)}\n"
    (RESULTS / f"shapes_{args.task}.md").write_text(text, encoding="utf-8")
    print(text)


def folder_of(task: str, row: str, seed: int) -> Path:
    return OUTPUT / f"{task}_{row.replace(' = ', '').replace(', ', '_').replace(' ', '_')}_{seed}"


def read(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def run(args: argparse.Namespace, row: str, seed: int, folder: Path) -> None:
    """One row's run with one seed, its output in `folder`.txt."""
    if (folder / "result.json").is_file():
        return
    command = [CONFIGS[args.task].script, "--config", str(config_of(args.task)), "--seed", str(seed), "--output_dir", str(folder)]
    command += ROWS[row][0].split()
    print(f"$ python {shlex.join(command)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // args.jobs))}
    with open(f"{folder}.txt", "w", encoding="utf-8") as log:
        code = subprocess.run([sys.executable, *command], stdout=log, stderr=log, env={**os.environ, **threads}).returncode
    if code:
        raise UserError(f"{row}, seed {seed}: ended with exit code {code}; see {folder}.txt")


def table(results: dict[str, Sequence[dict]]) -> str:
    """Markdown; of several seeds the mean and the standard deviation."""
    head = ("model", "accuracy (test)", "accuracy (val)", "GFLOPs (slice)", "fewer", "off target", "seeds")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row, found in results.items():
        accuracies = [spread([result["metrics"][split]["acc"] for result in found]) for split in ("test", "val")]
        gflops = [result["gflops"] for result in found]
        measured, target = (statistics.mean(each[key] for each in gflops) for key in ("measured", "target"))
        off = max(abs(each["measured"] / each["target"] - 1) for each in gflops)
        fewer = 1 - measured / gflops[0]["uncompressed"]
        lines.append(f"| {row} | {accuracies[0]} | {accuracies[1]} | {measured:.4f} | {fewer:.1%} | {off:.2%} | {len(found)} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")


if __name__ == "__main__":
    run_main(main)
