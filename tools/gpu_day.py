"""Measures on a GPU all that only a GPU can show, part by part, within a time limit, and goes on where it was cut.

    python tools/gpu_day.py                        # also `make gpu`: 25 minutes on an H100 or H200
    python tools/gpu_day.py --parts tests,nlvr     # some parts, again
    python tools/gpu_day.py --device cpu --tiny    # a check of the commands

Each part is one or more commands with a time limit of its own. Their tables, plots and logs go to benchmarks/gpu. day.json there
holds, for each part, its commands, the commit, how long it took and how it ended. A part that has succeeded at this commit is not
repeated unless --parts names it. A part that fails does not stop the others; at the end the exit code is 1 if any has.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.results import code_version, write_json
from utils import UserError, at_least_one, run_main, user_path

ROOT = Path(__file__).resolve().parents[1]
OUT, STATE = Path("benchmarks/gpu"), "day.json"
MINUTES = 25
SHAPES = "configs/shapes/nlvr.yaml"
PRUNED = "0.5,0.7,0.8"
Command = list[str]


@dataclass
class Day:
    """How to run the parts: on which device, at real or tiny size, and where results go."""

    device: str
    tiny: bool
    out: Path

    def benchmark(self, task: str, batches: str, *more: str, sizes: str | None = None) -> Command:
        """Returns the command of a benchmark of models, dense against pruned."""
        common = ["tools/benchmark.py", "--task", task, "--device", self.device, "--out", str(self.out)]
        if not self.tiny:
            return [*common, "--amp", "--rounds", "7", "--batch-sizes", batches, *more]
        small = ["--config", sizes or SHAPES, "--rounds", "1", "--batch-sizes", "2"]
        return [*common, *small, *(word.replace("dense,compiled", "dense") for word in more)]


@dataclass
class Part:
    """A part of the day: its commands, and the minutes after which it is stopped."""

    name: str
    minutes: float
    commands: Callable[[Day], Sequence[Command]]


def tests(day: Day) -> Sequence[Command]:
    files = ["tests/madtp/attention", "tests/madtp/sparsity/test_kernels.py", "tests/engine/test_sparse_inference.py"]
    return [["-m", "pytest", "-q", "-p", "no:cacheprovider", *(files[1:2] if day.tiny else files)]]


def attention(day: Day) -> Sequence[Command]:
    small = ["--tokens", "9,17", "--batch-size", "2", "--heads", "2", "--width", "16", "--rounds", "1"] if day.tiny else []
    return [["-m", "tools.benchmarks.attention_cost", "--device", day.device, "--out", str(day.out), *small]]


def encoder(day: Day) -> Sequence[Command]:
    return [day.benchmark("vit", "1,32,256", "--p", PRUNED, "--against", "dense,compiled")]


def nlvr(day: Day) -> Sequence[Command]:
    return [day.benchmark("nlvr", "1,32,256", "--p", PRUNED, "--against", "dense,compiled")]


def clip(day: Day) -> Sequence[Command]:
    sizes = "configs/shapes/retrieval_clip.yaml"
    return [day.benchmark("retrieval_clip", "1,32,256", "--p", PRUNED, "--against", "dense,compiled", sizes=sizes)]


def deployed(day: Day) -> Sequence[Command]:
    """The deployment form, whose fixed shapes CUDA graphs can replay, compiled and as it is; on a CPU as it is alone."""
    sizes = ["--config", SHAPES, "--rounds", "1", "--batch-sizes", "2"] if day.tiny else ["--batch-sizes", "1,32"]
    form = ["tools/benchmark.py", "--task", "vit", "--precision", "bf16", "--p", "0.5,0.8", "--device", day.device, *sizes]
    engines = ("torch",) if day.device == "cpu" else ("torch", "compile")
    return [[*form, "--engine", engine, "--out", str(day.out / "deployed")] for engine in engines]


def training(day: Day) -> Sequence[Command]:
    there = Day(day.device, day.tiny, day.out / "train")
    return [there.benchmark(task, "32", "--p", "0.5,0.8", "--train") for task in ("vit", "nlvr")]


def sparse(day: Day) -> Sequence[Command]:
    there = Day(day.device, day.tiny, day.out / "sparse")
    models, shapes = (there.benchmark("nlvr", "32", "--p", "0.8", what) for what in ("--sparse", "--shapes"))
    return [models] if day.device == "cpu" else [models, shapes]  # products are timed on GPUs alone


def compression(day: Day) -> Sequence[Command]:
    """A short compression of the Shapes model in a process group: NCCL, mixed precision, packed evaluation."""
    data = day.out / "shapes"
    size, steps = ("40", "2") if day.tiny else ("2000", "40")
    make = ["tools/make_shapes.py", "--out", str(data), "--seed", "7", "--size", size, "--tasks", "nlvr"]
    make += ["--statements-per-pair", "8", "--eval-size", "24" if day.tiny else "1000"]
    settings = {"image_root": data / "images", "ann_root": data / "annotations", "epoch_steps": steps, "max_epoch": 2}
    settings["ramp_epochs"] = 1
    if day.tiny:
        settings |= {"calibration_size": 8, "batch_size_train": 8, "num_workers": 0, "warmup_steps": 0}
    run = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "compress_nlvr_dtp.py", "--config", SHAPES]
    run += ["--reduce_ratio", "0.5", "--device", day.device, "--output_dir", str(day.out / "shapes_run"), "--overwrite"]
    return [make, run + [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]]


PARTS = (
    Part("tests", 5, tests),
    Part("attention", 2, attention),
    Part("encoder", 4, encoder),
    Part("nlvr", 5, nlvr),
    Part("clip", 5, clip),
    Part("deployed", 3, deployed),
    Part("training", 4, training),
    Part("sparse", 4, sparse),
    Part("compression", 4, compression),
)


def main() -> None:
    args = parse()
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no GPU is here; run this where one is, or check the commands with --device cpu --tiny")
    known = {part.name: part for part in PARTS}
    names = list(known) if args.parts is None else args.parts.split(",")
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"--parts: no part is called {unknown[0]}; the parts are {', '.join(known)}")
    day, out = Day(args.device, args.tiny, args.out), ROOT / args.out
    out.mkdir(parents=True, exist_ok=True)
    state = json.loads((out / STATE).read_text(encoding="utf-8")) if (out / STATE).is_file() else {}
    ends, failed = time.monotonic() + 60 * args.minutes, []
    for name in names:
        commit, before = code_version(), state.get(name, {})
        if args.parts is None and before.get("ended") == "well" and before.get("commit") == commit:
            print(f"{name}: done before at {commit}", flush=True)
            continue
        left = ends - time.monotonic()
        if left < 60 * min(known[name].minutes, args.minutes) / 2:
            print(f"{name}: not begun, {left / 60:.1f} minutes are left", flush=True)
            failed.append(name)
            continue
        state[name] = {"commit": commit, **run_part(known[name], day, min(left, 60 * known[name].minutes))}
        write_json(state, out / STATE)
        print(f"{name}: ended {state[name]['ended']} after {state[name]['seconds']:.0f} s", flush=True)
        failed += [name] if state[name]["ended"] != "well" else []
    if failed:
        raise SystemExit(f"not done: {', '.join(failed)}; see the logs in {args.out}")


def run_part(part: Part, day: Day, seconds: float) -> dict[str, object]:
    """Runs the commands of a part, with their output in a log. Returns how it went."""
    started, ended = time.monotonic(), "well"
    commands = [[sys.executable, *command] for command in part.commands(day)]
    with open(ROOT / day.out / f"{part.name}.log", "w", encoding="utf-8") as log:
        for command in commands:
            log.write(f"$ python {' '.join(command[1:])}\n")
            log.flush()
            left = seconds - (time.monotonic() - started)
            try:
                code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT, timeout=max(1.0, left)).returncode
            except subprocess.TimeoutExpired:
                ended = "by its time limit"
                break
            if code:
                ended = f"with exit code {code}"
                break
    said = [" ".join(["python", *command[1:]]) for command in commands]
    return {"commands": said, "seconds": round(time.monotonic() - started, 1), "ended": ended}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", help=f"some of {','.join(part.name for part in PARTS)}; default: those not done yet")
    parser.add_argument("--minutes", type=at_least_one, default=MINUTES, help=f"time limit; default: {MINUTES}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: a check of the commands, not a measurement")
    parser.add_argument("--out", type=user_path, default=OUT, help=f"folder of the results; default: {OUT}")
    return parser.parse_args()


if __name__ == "__main__":
    run_main(main)
