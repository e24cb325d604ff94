"""Times the models of runs against one another, on the same test samples, which are held in memory. The models take turns.

    python -m tools.benchmarks.runs output/demo/nlvr_p0 output/demo/nlvr_p0.5 output/demo/nlvr_p0.8 --out benchmarks

The first run is the reference of the speed-ups. On a CPU with other busy processes, images per second say little about a model;
processor time then still compares the models.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from tasks.registry import load_any_config, open_view
from tasks.view import View
from tools.benchmark import machine, write_csv
from utils import UserError, at_least_one, home_expanded, run_main, user_path

BATCHES, ROUNDS = 2, 9
STATISTICS = Path("/proc/stat")  # of all processors, on Linux
BUSY = 0.25  # share of the cores that other processes may take before the remark that the machine is busy


@dataclass
class Speed:
    """The speed of a run's model.

    p: its reduce ratio
    samples: timed in a round
    speedup, lowest: over the first model, round by round: the median and the lowest
    processor: the median ratio of processor seconds; None on a GPU
    others: share of all cores that other processes took meanwhile; None where this is not known
    """

    task: str
    p: float
    samples: int
    images_per_second: float
    speedup: float
    lowest: float
    processor: float | None
    others: float | None

    @property
    def beside_others(self) -> bool:
        """Tells whether other processes took so much that images per second mean little."""
        return self.others is not None and self.others > BUSY


def open_run(folder: Path) -> View:
    """Opens the model that a run saved or, for an evaluation, the one that it evaluated."""
    config = load_any_config(folder / "config.yaml")
    return open_view(config, config.pretrained if config.evaluate else folder / "checkpoint_best.pth")


def time_runs(views: Sequence[View], batches: int = BATCHES, rounds: int = ROUNDS) -> list[Speed]:
    """Times the models on the same test samples. A slower phase of the machine affects all of them, because they take turns."""
    first = views[0]
    ids = first.ids[: batches * first.config.batch_size_test]
    held = list(first.batches(ids))
    spent: list[list[tuple[float, float]]] = [[] for _ in views]
    with elsewhere() as others:
        for _ in range(1 + rounds):  # the first warms up
            for view, times in zip(views, spent, strict=True):
                wall, processor = synchronised_time(view), time.process_time()
                for _ in view.forwards(held):
                    pass
                times.append((synchronised_time(view) - wall, time.process_time() - processor))
    images = len(first.labels) * len(ids)
    speeds = []
    for view, times in zip(views, spent, strict=True):
        ratios = [a / b for (a, _), (b, _) in zip(spent[0][1:], times[1:], strict=True)]
        processor = statistics.median(a / b for (_, a), (_, b) in zip(spent[0][1:], times[1:], strict=True))
        speeds.append(
            Speed(view.config.task, view.config.p, len(ids), images / statistics.median(wall for wall, _ in times[1:]),
                  statistics.median(ratios), min(ratios), processor if view.run.device.type == "cpu" else None,
                  others[0] if others else None)
        )  # fmt: skip
    return speeds


def synchronised_time(view: View) -> float:
    if view.run.device.type == "cuda":
        torch.cuda.synchronize(view.run.device)
    return time.perf_counter()


@contextmanager
def elsewhere() -> Iterator[list[float]]:
    """Yields a list that holds afterwards the share of all cores that other processes took; it stays empty where nothing tells."""
    found: list[float] = []
    before, own = processor_ticks(), time.process_time()
    yield found
    after, own = processor_ticks(), time.process_time() - own
    if before and after and after[1] > before[1]:
        all_ticks = after[1] - before[1]
        found.append(max(0.0, (after[0] - before[0] - own * os.sysconf("SC_CLK_TCK")) / all_ticks))


def processor_ticks() -> tuple[int, int] | None:
    """Returns the ticks that all cores have worked, and those that have passed on them; None where the system does not tell."""
    try:
        ticks = [int(part) for part in STATISTICS.read_text().split("\n", 1)[0].split()[1:9]]
    except (OSError, ValueError):
        return None
    idle = sum(ticks[3:5])  # waiting for a disk among it
    return sum(ticks) - idle, sum(ticks)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=home_expanded, nargs="+", metavar="RUN", help="folders of runs of one task")
    parser.add_argument("--batches", type=at_least_one, default=BATCHES, help=f"test batches; default: {BATCHES}")
    parser.add_argument("--rounds", type=at_least_one, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--out", type=user_path, help="folder for a CSV file")
    args = parser.parse_args()
    views = [open_run(Path(folder)) for folder in args.runs]
    if len(tasks := {view.config.task for view in views}) > 1:
        raise UserError(f"the runs are of {' and '.join(sorted(tasks))}; give runs of one task")
    speeds = time_runs(views, args.batches, args.rounds)
    for speed in speeds:
        print(f"p = {speed.p:g}: {speed.images_per_second:.0f} images/s, {speed.speedup:.2f} times (lowest {speed.lowest:.2f})")
    if args.out:
        device = str(views[0].run.device)
        command = f"python -m tools.benchmarks.runs {' '.join(sys.argv[1:])}"
        write_csv(args.out / f"runs_{views[0].config.task}_{device.replace(':', '')}.csv", command, machine(device), speeds)


if __name__ == "__main__":
    run_main(main)
