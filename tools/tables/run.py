"""Running the jobs of tables: side by side, each at most once, and going on where an earlier attempt was cut."""

import ctypes
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.results import write_json
from tasks.registry import TASKS
from tools.demo import SHAPES, data_command, execute
from tools.tables.plan import Job, Scale, config_of, task_of
from utils import UserError

STUDY_SHAPES, FAST_SHAPES = Path("datasets/shapes_study"), Path("datasets/shapes_fast")
FAST_SIZE, FAST = 160, "--eval-size 24 --val-size 24"  # in place of a task's own sizes
OUT_OF_REACH = "is out of reach"  # in the message of such a run
COMMAND = "command.txt"  # file in a run's folder that holds its command
STEPS = 30  # of a sample's score, which is a multiple of 1/3 or of 1/10
DIGITS = "0123456789ABCDEFGHIJKLMNOPQRSTU"
LINUX_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG


def data_arguments(scale: Scale, datasets: Iterable[str]) -> dict[str, tuple[list[str], str]]:
    """Returns, by data set, the command that makes its Shapes data, and the arguments that point runs to it."""
    found = {}
    for name in datasets if scale.data else ():
        task = task_of(scale.configs[name])
        demo, folder = task.demo, SHAPES
        command = data_command(demo, folder, demo.study_size)
        if scale.data == "fast":
            folder = FAST_SHAPES
            command = [*data_command(demo, folder, FAST_SIZE), *FAST.split()]
        elif demo.study_size != demo.demo_size:
            folder = STUDY_SHAPES
            command = data_command(demo, folder, demo.study_size)
        keys = {**dict.fromkeys(task.config_class.image_keys, "images"), "ann_root": "annotations"}
        where = " ".join(f"--set {key}={folder / part}" for key, part in keys.items())
        found[name] = command, "" if folder == SHAPES else where
    return found


class Ledger:
    """The completed runs: those in their folders, and those that an earlier ledger holds.

    An entry has the command, the content of result.json, the alignment diagnostics of the last epoch, and the score of each test
    sample, a digit each. That of a run whose reduce ratio is out of reach has the reason instead.
    """

    def __init__(self, path: Path, known: Path | None = None):
        """path: the file that is written; known: an earlier one, whose runs count as completed."""
        self.path = path
        self.known = _read_ledger(known) if known is not None else {}
        self.own: dict[str, dict[str, Any]] = {}

    def entry(self, job: Job) -> dict[str, Any] | None:
        """Returns the entry of a run; None if it is not complete. A run in its folder goes before a known one."""
        found = self._found(job)
        return found if found and "result" in found else None

    def refused(self, job: Job) -> str:
        """Returns why the run's reduce ratio is out of reach; empty where it is not."""
        return (self._found(job) or {}).get("refused", "")

    def _found(self, job: Job) -> dict[str, Any] | None:
        command = shlex.join(job.command)
        if "result" not in self.own.get(command, {}) and is_complete(job):
            self.own[command] = self._read(job)
        elif command not in self.own and (reason := refusal(job)):
            self.own[command] = {"folder": str(job.folder), "refused": reason}
        return self.own.get(command) or self.known.get(command)

    def write(self, jobs: Iterable[Job]) -> None:
        """Writes the entries of the completed ones of these runs, and of all others that the file or `known` held."""
        for job in jobs:
            self.entry(job)
        before = _read_ledger(self.path) if self.path.is_file() else {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json({**before, **self.known, **self.own}, self.path)

    def _read(self, job: Job) -> dict[str, Any]:
        result = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
        log = job.folder / "log.txt"
        lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() and not job.evaluates else []
        alignment = json.loads(lines[-1]).get("alignment", {}) if lines else {}
        return {"folder": str(job.folder), "result": {**result, "alignment": alignment}, "scores": scores_of(job)}


def _read_ledger(path: Path) -> dict[str, dict[str, Any]]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: {error}; give a file that this program has written") from None


def scores_of(job: Job) -> str:
    """Returns the score of each test sample of a completed run in the order of the samples' names; empty if they have none."""
    config = config_of(job)
    predictions = json.loads((job.folder / "predictions_test.json").read_text(encoding="utf-8"))
    found = TASKS[config.task].sample_scores(config, predictions)
    return "".join(DIGITS[round(found[sample] * STEPS)] for sample in sorted(found))


def is_complete(job: Job) -> bool:
    """Tells whether the run has completed with exactly this command: the meaning of a row may have changed since."""
    return (job.folder / "result.json").is_file() and _said(job) == shlex.join(job.command)


def refusal(job: Job) -> str:
    """Returns the last words of a run with this command whose reduce ratio is out of reach; empty for any other."""
    log = Path(f"{job.folder}.txt")
    if _said(job) != shlex.join(job.command) or not log.is_file():
        return ""
    *_, last = ["", *log.read_text(encoding="utf-8").splitlines()]
    return last.removeprefix("error: ") if last.startswith("error: ") and OUT_OF_REACH in last else ""


def _said(job: Job) -> str:
    file = job.folder / COMMAND
    return file.read_text(encoding="utf-8") if file.is_file() else ""


@dataclass
class Progress:
    """The state of a series of runs, for an estimate of the time that is left."""

    at_a_time: int
    waiting: list[Job]
    done: int = 0
    seconds: dict[bool, list[float]] = field(default_factory=lambda: {True: [], False: []})  # by Job.evaluates

    def line(self, job: Job, seconds: float) -> str:
        """Counts a run that took `seconds` and describes how far the series is."""
        self.waiting.remove(job)
        self.done += 1
        self.seconds[job.evaluates].append(seconds)
        text = f"[{self.done}/{self.done + len(self.waiting)}] {job.folder}: {spell(seconds)}"
        left = self.left()
        return text if left is None else f"{text}; about {spell(left)} left"

    def left(self) -> float | None:
        """Estimates the seconds that are left from runs of the same kind; None before there was one of each kind that waits."""
        total = 0.0
        for job in self.waiting:
            past = self.seconds[job.evaluates]
            if not past:
                return None
            total += sum(past) / len(past)
        return total / self.at_a_time


def spell(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min" if minutes else f"{seconds:.0f} s"


def run_all(
    jobs: Sequence[Job], ledger: Ledger, launch: str, at_a_time: int, after_each: Callable[[], None]
) -> list[UserError]:
    """Runs the jobs that are not complete, parents first, `at_a_time` of them side by side. Returns the failures.

    After a failure the other runs go on, except those that need it.

    Args:
        jobs: parents before their children.
        launch: the command in front of the entry script.
        after_each: called after each run.
    """
    waiting = [job for job in jobs if ledger.entry(job) is None and not ledger.refused(job)]
    progress, failures = Progress(at_a_time, list(waiting)), []
    running: set[subprocess.Popen] = set()
    started: dict[Path, Future] = {}

    def attempt(job: Job) -> tuple[Job, float]:
        if job.parent is not None and job.parent.folder in started:
            started[job.parent.folder].result()
        began = time.time()
        run(job, launch, at_a_time, running)
        return job, time.time() - began

    with ThreadPoolExecutor(at_a_time) as pool:
        try:
            for job in waiting:
                started[job.folder] = pool.submit(attempt, job)
            for ended in as_completed(list(started.values())):
                if isinstance(error := ended.exception(), UserError):
                    failures += [error] if error not in failures else []  # children raise their parent's
                    continue
                print(progress.line(*ended.result()), flush=True)
                after_each()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(running):
                process.terminate()
    return failures


def run(job: Job, launch: str, at_a_time: int, running: set[subprocess.Popen]) -> None:
    """Runs a job, one of `at_a_time` that share the CPU cores. Its output goes to the file `folder`.txt.

    A training run that was cut goes on; what another command left in the folder is removed.
    """
    command, how = shlex.join(job.command), list(job.command)
    if job.parent is not None and not (job.parent.folder / "checkpoint_best.pth").is_file():
        raise UserError(f"{job.folder}: needs the checkpoint in {job.parent.folder}; run that row on this machine first")
    if _said(job) == command and (job.folder / "checkpoint_last.pth").is_file() and not job.evaluates:
        how += ["--resume", "last"]
    else:
        shutil.rmtree(job.folder, ignore_errors=True)
    job.folder.mkdir(parents=True, exist_ok=True)
    (job.folder / COMMAND).write_text(command, encoding="utf-8")
    starter = [sys.executable] if launch == "python" else shlex.split(launch)
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // at_a_time))}
    with open(f"{job.folder}.txt", "a", encoding="utf-8") as log:
        process = subprocess.Popen(
            [*starter, *how], stdout=log, stderr=log, env={**os.environ, **threads}, preexec_fn=_die_with_parent
        )
        running.add(process)
        code = process.wait()
        running.discard(process)
    if code and not refusal(job):
        raise UserError(f"{job.folder.name}: ended with exit code {code}; see {job.folder}.txt")


def _die_with_parent() -> None:
    """Lets Linux end this process when the one that started it is killed: it must not go on beside the next attempt."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(LINUX_DEATH_SIGNAL, signal.SIGTERM)


def make_data(found: Mapping[str, tuple[list[str], str]]) -> None:
    """Makes the Shapes data of these data sets, each once."""
    for command in {shlex.join(command): command for command, _ in found.values()}.values():
        execute(command)
