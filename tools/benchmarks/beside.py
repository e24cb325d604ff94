"""Measures the speed-up of a compressed checkpoint beside other busy processes, by how its evaluation uses a CPU's threads.

    python -m tools.benchmarks.beside --checkpoint output/demo/nlvr_p0.8/checkpoint_best.pth --busy 0,2 --out benchmarks

All threads in one batch; one thread; a batch for each thread, as evaluation does. The pruned model and the same model unpruned take
turns on the same test samples, which are held in memory. Busy processes are endless loops.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from madtp.rule import OFF
from tasks.registry import load_any_config, open_view
from tasks.view import View
from tools.benchmark import machine, numbers, write_csv
from utils import UserError, at_least_one, run_main, user_path

LOOP = [sys.executable, "-c", "while True: pass"]


@dataclass
class Row:
    """A way to use the threads.

    seconds: medians over rounds, of the unpruned and of the pruned model
    ratio, lowest: of the two in a round, the median and the lowest; processor: the median ratio of processor seconds
    """

    busy: int
    way: str
    uncompressed_seconds: float
    pruned_seconds: float
    ratio: float
    lowest: float
    processor: float


def one_by_one(threads: int) -> Callable[[View, Sequence[dict]], None]:
    def run(view: View, batches: Sequence[dict]) -> None:
        torch.set_num_threads(threads)
        for batch in batches:
            view.forward(batch)

    return run


def parallel(threads: int) -> Callable[[View, Sequence[dict]], None]:
    def run(view: View, batches: Sequence[dict]) -> None:
        torch.set_num_threads(threads)
        for _ in view.forwards(batches):
            pass

    return run


def measure(whole: View, pruned: View, batches: Sequence[dict], busy: int, rounds: int) -> list[Row]:
    """Measures all ways beside `busy` endless loops."""
    cores = os.cpu_count() or 1
    ways = {"all threads in one batch": one_by_one(cores), "one thread": one_by_one(1), "a batch for each thread": parallel(cores)}
    loops = [subprocess.Popen(LOOP) for _ in range(busy)]
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in ways}
    try:
        for _ in range(rounds + 1):  # the first warms up
            for name, run in ways.items():
                spent: list[float] = []
                for view in (whole, pruned):
                    wall, processor = time.perf_counter(), time.process_time()
                    run(view, batches)
                    spent += [time.perf_counter() - wall, time.process_time() - processor]
                taken[name].append(tuple(spent))
    finally:
        for loop in loops:
            loop.kill()
        torch.set_num_threads(cores)
    rows = []
    for name, times in taken.items():
        slow, _, fast, _ = (statistics.median(column) for column in zip(*times[1:], strict=True))
        ratios = [a / b for a, _, b, _ in times[1:]]
        processor = statistics.median(a / b for _, a, _, b in times[1:])
        rows.append(Row(busy, name, slow, fast, statistics.median(ratios), min(ratios), processor))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=user_path, required=True, metavar="FILE", help="of a run, beside its config")
    parser.add_argument("--busy", type=numbers(int), default=(0, 2), help="numbers of busy processes; default: 0,2")
    parser.add_argument("--batches", type=at_least_one, default=2, help="test batches; default: 2")
    parser.add_argument("--rounds", type=at_least_one, default=5)
    parser.add_argument("--out", type=user_path, help="folder for a CSV file")
    args = parser.parse_args()
    config = load_any_config(args.checkpoint.with_name("config.yaml"))
    whole, pruned = (open_view(config, args.checkpoint, "cpu") for _ in range(2))
    if pruned.setting == OFF:
        raise UserError(f"--checkpoint {args.checkpoint}: its tokens are not pruned; give a compressed one")
    whole.guidance = whole.task.guidance(OFF)
    batches = list(pruned.batches(pruned.ids[: args.batches * config.batch_size_test]))
    rows = [row for busy in args.busy for row in measure(whole, pruned, batches, busy, args.rounds)]
    for row in rows:
        print(f"{row.busy} busy, {row.way}: {row.ratio:.2f} times (lowest {row.lowest:.2f}, processor time {row.processor:.2f})")
    if args.out:
        command = f"python -m tools.benchmarks.beside {' '.join(sys.argv[1:])}"
        write_csv(args.out / f"beside_{config.task}_cpu.csv", command, machine("cpu"), rows)


if __name__ == "__main__":
    run_main(main)
