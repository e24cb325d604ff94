"""Times the models of runs against one another, on the same test samples, which are held in memory. The models take turns.

    python -m tools.benchmarks.runs output/demo/nlvr_p0 output/demo/nlvr_p0.5 output/demo/nlvr_p0.8 --out benchmarks

The first run is the reference of the speed-ups. Beside other busy processes on a CPU, images per second say little about a model;
processor time still compares the models.
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
STATISTICS = Path("/proc/stat")  # of each core, on Linux
QUOTA = Path("/sys/fs/cgroup/cpu.max")  # of a container, whose cores are then also those of others
BUSY = 0.25  # share of the cores that other processes may take before the remark that the machine was busy
ALIKE = ("task", "image_size", "patch_size", "pictures", "batch_size_test")  # of runs that see the same samples


@dataclass
class Speed:
    """The speed of a run's model.

    run: the name of its folder
    p: its reduce ratio
    samples: timed in a round
    speedup, lowest: over the first model, round by round: the median and the lowest
    processor: the median ratio of processor seconds; None on a GPU
    others: share of this process's cores that other processes took meanwhile; None on a GPU and where it is not known
    """

    run: str
    p: float
    samples: int
    images_per_second: float
    speedup: float
    lowest: float
    processor: float | None
    others: float | None


def remarks(speeds: Sequence[Speed]) -> list[str]:
    """Returns the speed-ups by processor time, and on a busy machine that those by time do not hold; nothing for a GPU."""
    if speeds[0].processor is None:
        return []
    ratios = ", ".join(f"{speed.processor:.2f} at p = {speed.p:g}" for speed in speeds[1:])
    said = [f"Speed-up by processor time, which counts what the models compute and no waiting: {ratios}."] if ratios else []
    if speeds[0].others is not None and speeds[0].others > BUSY:
        said.append(
            f"THE MACHINE WAS BUSY: other processes took {speeds[0].others:.0%} of its processor time, so that images/s and their"
            " speed-up do not hold for a quiet one. Trust processor time, or use python -m tools.benchmarks.runs later."
        )
    return said


def open_run(folder: Path) -> View:
    """Opens the model that a run saved or, for an evaluation, the one that it evaluated."""
    config = load_any_config(folder / "config.yaml")
    return open_view(config, config.pretrained if config.evaluate else folder / "checkpoint_best.pth")


def check_alike(views: Sequence[View], folders: Sequence[Path]) -> None:
    """
    Raises:
        UserError: when a run does not see the samples as the first one does.
    """
    for view, folder in zip(views, folders, strict=True):
        for key in ALIKE:
            wanted, found = (getattr(each.config, key, None) for each in (views[0], view))
            if wanted != found:
                raise UserError(f"{folder}: has {key} {found}, and {folders[0]} has {wanted}; give runs on the same samples")


def time_runs(views: Sequence[View], names: Sequence[str], batches: int = BATCHES, rounds: int = ROUNDS) -> list[Speed]:
    """Times the models on the same test samples. A slower phase of the machine affects all of them, because they take turns.

    names: of the runs
    """
    first, on_cpu = views[0], views[0].run.device.type == "cpu"
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
    for name, view, times in zip(names, views, spent, strict=True):
        ratios = [a / b for (a, _), (b, _) in zip(spent[0][1:], times[1:], strict=True)]
        processor = statistics.median(a / b for (_, a), (_, b) in zip(spent[0][1:], times[1:], strict=True))
        rate = images / statistics.median(wall for wall, _ in times[1:])
        known = (processor, others[0] if others else None) if on_cpu else (None, None)
        speeds.append(Speed(name, view.config.p, len(ids), rate, statistics.median(ratios), min(ratios), *known))
    return speeds


def synchronised_time(view: View) -> float:
    if view.run.device.type == "cuda":
        torch.cuda.synchronize(view.run.device)
    return time.perf_counter()


@contextmanager
def elsewhere() -> Iterator[list[float]]:
    """Yields a list that holds afterwards the share of this process's cores that others took; empty where nothing tells."""
    found: list[float] = []
    before, own = processor_ticks(), time.process_time()
    yield found
    after, own = processor_ticks(), time.process_time() - own
    if before and after and after[1] > before[1]:
        found.append(max(0.0, (after[0] - before[0] - own * os.sysconf("SC_CLK_TCK")) / (after[1] - before[1])))


def processor_ticks() -> tuple[int, int] | None:
    """Returns the ticks that this process's cores have worked, and those that have passed on them; None where nothing tells."""
    try:
        if QUOTA.is_file() and not QUOTA.read_text().startswith("max"):
            return None
        rows = [line.split() for line in STATISTICS.read_text().splitlines()]
        mine = {f"cpu{core}" for core in os.sched_getaffinity(0)}
        ticks = [sum(column) for column in zip(*([int(part) for part in row[1:9]] for row in rows if row[0] in mine), strict=True)]
    except (OSError, ValueError, AttributeError):  # other systems have neither these files nor an affinity
        return None
    idle = sum(ticks[3:5])  # waiting for a disk among it
    return (sum(ticks) - idle, sum(ticks)) if ticks else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=home_expanded, nargs="+", metavar="RUN", help="folders of runs of one task")
    parser.add_argument("--batches", type=at_least_one, default=BATCHES, help=f"test batches; default: {BATCHES}")
    parser.add_argument("--rounds", type=at_least_one, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--out", type=user_path, help="folder for a CSV file")
    args = parser.parse_args()
    folders = [Path(folder) for folder in args.runs]
    for folder in folders:
        if not (folder / "config.yaml").is_file():
            raise UserError(f"{folder}: has no config.yaml; give the folder of a run")
    views = [open_run(folder) for folder in folders]
    check_alike(views, folders)
    speeds = time_runs(views, [folder.name for folder in folders], args.batches, args.rounds)
    for speed in speeds:
        print(f"{speed.run}: {speed.images_per_second:.0f} images/s, {speed.speedup:.2f} times (lowest {speed.lowest:.2f})")
    print("\n".join(remarks(speeds)))
    if args.out:
        device = str(views[0].run.device)
        command = f"python -m tools.benchmarks.runs {' '.join(sys.argv[1:])}"
        write_csv(args.out / f"runs_{views[0].config.task}_{device.replace(':', '')}.csv", command, machine(device), speeds)


if __name__ == "__main__":
    run_main(main)
