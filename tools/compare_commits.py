"""Checks that a code change alters no result: runs every task before and after it, and compares the output files.

    python tools/compare_commits.py --base COMMIT
    python tools/compare_commits.py --base COMMIT --head OTHER --tasks nlvr,vqa --work output/compare
    python tools/compare_commits.py --base COMMIT --added alignment,learnable_start    # entries that the base does not write

Each task is compressed twice on a tiny Shapes data set: by token pruning alone, in mixed precision; and with sparse weights and
distillation, in float32. Then both sides evaluate the base's checkpoint and its packed export. log.txt, all JSON files and the
checkpoints are compared to the last bit. Runs use the CPU, one thread each, and this Python environment; the base is checked out
into a git worktree. Exits with 0 only if everything is the same.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import torch

# This file imports nothing from the project, so that it works the same whatever is changed there.
ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "output" / "compare_commits"
TASKS = ("nlvr", "caption", "vqa", "retrieval", "retrieval_clip")
ARMS = {"tokens": "--p 0.5", "all": "--p 0.8 --enable-sparse-api --token_reduce --set distill=true --no-amp"}
SHORT = (  # with a short warm-up, so that most of the few steps use the full learning rate
    "--epoch 2 --set epoch_steps=3 --set ramp_epochs=1 --set calibration_size=16 --seed 42 --device cpu"
    " --set batch_size_train=8 --set batch_size_test=16 --set warmup_steps=2"
)
SIZES = "--seed 7 --size 160 --eval-size 24 --val-size 24 --workers 1"  # val and test have two batches, the second a smaller one
PICTURES = {"vqa": ("vqa_root", "vg_root")}  # keys of the image folders, if not image_root
IGNORED = {"log.txt": "seconds", "result.json": "versions", "checkpoint_last.pth": "config"}
# In this order, because the log shows the earliest difference. checkpoint_previous.pth holds times and the rest too early.
COMPARED = ("log.txt", "*.json", "checkpoint_best.pth", "checkpoint_last.pth")


class Stopped(Exception):
    """A program ended with an error, so there is nothing to compare."""


@dataclass(frozen=True)
class Case:
    """A task with an arm, the folders of both sides, the folder for their output, and the entries that the head may add."""

    task: str
    arm: str
    base: Path
    head: Path
    work: Path
    added: tuple[str, ...] = ()

    @property
    def data(self) -> Path:
        return self.work / "data" / shapes_of(self.task)

    def compare(self) -> dict[str, str]:
        """Runs all checks. Returns check -> the first difference, empty if there is none."""
        found = {"run": self._check("run", [*self._config(), *SHORT.split()])}
        trained = self._output("base", "run")
        loads = [*self._config(), *SHORT.split(), "--evaluate", "--pretrained", str(trained / "checkpoint_best.pth")]
        found["checkpoint"] = self._check("checkpoint", loads)
        if self.arm == "all":  # only sparse weights can be packed
            found["packed export"] = self._check_export(trained / "checkpoint_best.pth")
        return found

    def _config(self) -> list[str]:
        keys = {**dict.fromkeys(PICTURES.get(self.task, ("image_root",)), "images"), "ann_root": "annotations"}
        paths = [part for key, name in keys.items() for part in ("--set", f"{key}={self.data / name}")]
        return ["--config", f"configs/shapes/{self.task}.yaml", *ARMS[self.arm].split(), *paths]

    def _output(self, side: str, check: str) -> Path:
        return self.work / "runs" / f"{self.task}_{self.arm}" / check.replace(" ", "_") / side

    def _check(self, check: str, arguments: Sequence[str]) -> str:
        outputs = []
        try:
            for side, root in (("base", self.base), ("head", self.head)):
                outputs.append(self._output(side, check))
                remove_files(outputs[-1])
                script = f"compress_{self.task}_dtp.py"
                execute(root, [script, *arguments, "--output_dir", str(outputs[-1])], side)
        except Stopped as error:
            return str(error)
        return next(differences(*outputs, self.added), "")

    def _check_export(self, checkpoint: Path) -> str:
        out = self.work / "runs" / f"{self.task}_{self.arm}" / "exported"
        remove_files(out)
        try:
            execute(self.base, ["tools/export.py", "--checkpoint", str(checkpoint), "--out", str(out), "--packed"], "base")
        except Stopped as error:
            return str(error)
        loads = ["--config", str(out / "config.yaml"), "--evaluate", "--pretrained", str(out / "model.safetensors")]
        return self._check("packed export", loads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", required=True, metavar="COMMIT", help="the code before the change")
    parser.add_argument("--head", metavar="COMMIT", help="commit, or folder of a checkout; default: the files as they are")
    parser.add_argument("--tasks", default=",".join(TASKS), help="some of " + ",".join(TASKS))
    parser.add_argument("--added", default="", metavar="KEYS", help="entries that the head may write and the base does not")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="folder for all output")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="number of runs at a time")
    args = parser.parse_args()
    tasks, work = args.tasks.split(","), args.work.expanduser().resolve()
    if not set(tasks) <= set(TASKS):
        parser.error(f"--tasks: some of {', '.join(TASKS)}")
    try:
        base = worktree(args.base, work / "base")
        if args.head is None or Path(args.head).is_dir():
            head = Path(args.head or ROOT).resolve()
        else:
            head = worktree(args.head, work / "head")
        for shapes in sorted(set(map(shapes_of, tasks))):
            more = ["--statements-per-pair", "8"] if shapes == "nlvr" else []
            out = ["--out", str(work / "data" / shapes), "--tasks", shapes]
            execute(base, ["tools/make_shapes.py", *out, *SIZES.split(), *more], "base")
    except Stopped as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    added = tuple(args.added.split(","))
    cases = [Case(task, arm, base, head, work, added) for task in tasks for arm in ARMS]
    found = compare_all(cases, args.jobs)
    print(f"\nbase {base}\nhead {head}\n")
    for case in cases:
        for check, difference in found[case].items():
            print(f"{case.task:15} {case.arm:7} {check:14} {difference or 'same'}")
    sys.exit(any(difference for checks in found.values() for difference in checks.values()))


def compare_all(cases: Sequence[Case], jobs: int) -> dict[Case, dict[str, str]]:
    """Compares all cases, `jobs` at a time."""
    found = {}
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(case.compare): case for case in cases}
        for ended in as_completed(running):
            case = running[ended]
            found[case] = ended.result()
            outcome = "different" if any(found[case].values()) else "same"
            print(f"{len(found)}/{len(cases)} {case.task} {case.arm}: {outcome}", flush=True)
    return found


def shapes_of(task: str) -> str:
    """Returns the name of a task's data in tools/make_shapes.py. CLIP uses the same data as BLIP."""
    return task.removesuffix("_clip")


def worktree(commit: str, folder: Path) -> Path:
    """Makes a clean checkout of the commit in `folder`, replacing an earlier one. Returns the folder."""
    if folder.exists():
        git("worktree", "remove", "--force", str(folder))
    git("worktree", "prune")  # forgets worktrees whose folders were deleted by hand
    git("worktree", "add", "--quiet", "--detach", str(folder), commit)
    return folder


def git(*arguments: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Stopped(f"git {' '.join(arguments)}: {last_line(done.stderr)}")


def execute(root: Path, arguments: Sequence[str], side: str) -> None:
    """Runs a program of one side, in the folder of that side."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("PYTHONPATH", None)  # otherwise one side could import the code of the other
    done = subprocess.run([sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Stopped(f"{side}: {arguments[0]} ended with exit code {done.returncode}: {last_line(done.stderr)}")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def remove_files(folder: Path) -> None:
    """Removes the files of an earlier comparison, so that they are not mistaken for new ones."""
    for file in folder.glob("*"):
        if file.is_file():
            file.unlink()


def differences(base: Path, head: Path, added: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields the differences between the files of two runs, with both values."""
    names = [name for pattern in COMPARED for name in sorted({path.name for side in (base, head) for path in side.glob(pattern)})]
    if "result.json" not in names:
        yield "result.json: neither side wrote one"
    for name in names:
        if missing := [side for side, folder in (("base", base), ("head", head)) if not (folder / name).is_file()]:
            yield f"{name}: {missing[0]} did not write it"
        else:
            yield from leaves_that_differ(read(base / name), read(head / name), name, added)


def read(path: Path) -> object:
    """Reads a file, without the entries that differ from run to run."""
    if path.suffix == ".pth":
        content = torch.load(path, map_location="cpu", weights_only=True)
    else:
        text = path.read_text(encoding="utf-8")
        content = [json.loads(line) for line in text.splitlines()] if path.suffix == ".txt" else json.loads(text)
    if path.name in IGNORED:
        for entry in content if isinstance(content, list) else [content]:
            entry.pop(IGNORED[path.name], None)
    return content


def leaves_that_differ(base: object, head: object, where: str, added: tuple[str, ...] = ()) -> Iterator[str]:
    """Yields every number, text or tensor that differs, even in the last digit, and every entry that one side lacks.

    added: names of entries that the base may lack
    """
    if isinstance(base, list | tuple) and isinstance(head, list | tuple):
        base, head = dict(enumerate(base)), dict(enumerate(head))
    if isinstance(base, dict) and isinstance(head, dict):
        for key in [*base, *(key for key in head if key not in base)]:
            place = f"{where}: {key}"
            if key in base and key in head:
                yield from leaves_that_differ(base[key], head[key], place, added)
            elif key in base or key not in added:
                yield f"{place}: only {'base' if key in base else 'head'} has it"
    elif isinstance(base, torch.Tensor) and isinstance(head, torch.Tensor):
        yield from tensors_that_differ(base, head, where)
    elif repr(base) != repr(head):  # by repr, 1 differs from 1.0, and NaN equals NaN
        yield f"{where}: base {base!r}, head {head!r}"


def tensors_that_differ(base: torch.Tensor, head: torch.Tensor, where: str) -> Iterator[str]:
    """Yields the first number that differs, if any."""
    if (base.dtype, base.shape) != (head.dtype, head.shape):
        yield f"{where}: base {base.dtype} {tuple(base.shape)}, head {head.dtype} {tuple(head.shape)}"
        return
    same = (base == head) | ((base != base) & (head != head))
    if not same.all():
        first = (~same).flatten().nonzero()[0].item()
        values = (side.flatten()[first].item() for side in (base, head))
        yield "{}: number {} of {}: base {!r}, head {!r}".format(where, first, same.numel(), *values)


if __name__ == "__main__":
    main()
