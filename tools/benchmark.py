"""Benchmarks compressed models against dense ones: throughput, latency and memory at real size. The methods take turns.

    python tools/benchmark.py --task nlvr --p 0.5,0.7,0.8 --batch-sizes 8 --device cpu
    python tools/benchmark.py --task vit --against dense,timm,transformers --batch-sizes 1,8,32
    python tools/benchmark.py --task vit --train --p 0.5 --batch-sizes 8
    python tools/benchmark.py --task nlvr --keep-schedule 0.9,0.9,0.8,0.8,0.7,0.7,0.7,0.7,0.7,0.7,0.7,0.7
    python tools/benchmark.py --task retrieval_clip --against dense,transformers --p 0.5,0.75 --batch-sizes 4 --metered
    python tools/benchmark.py --task nlvr --sparse --amp --p 0.5,0.8 --batch-sizes 8,32
    python tools/benchmark.py --task nlvr --shapes --amp --p 0.5,0.8 --batch-sizes 8,32
    python tools/benchmark.py --task vit --engine openvino --precision int8 --p 0.5,0.8 --batch-sizes 4 --device cpu
    python tools/benchmark.py --task rerank --candidates 256 --batch-sizes 4
    python tools/benchmark.py --task rank_answers --batch-sizes 32

Images are noise and weights are random, so token scores carry no information. Therefore every block keeps the same share of its
tokens: the share at which the GFLOPs fall by p, including the cost of pruning. Scores and thresholds are still computed, so that
their time counts. --keep-schedule sets the share of each block instead. --temperature prunes by the scores, as with the weights of
--pretrained. --train times a forward and a backward pass, with the similarity loss. --metered adds a row for each pruned model in
which the pass also counts the GFLOPs of each sample, as evaluation does. --profile adds the parts of the blocks to each row: the
share of the time that attention, MLP, alignment and the choice of tokens take.

--sparse adds models with 2:4 weights in all blocks: one with all tokens, and one per p with as few tokens as p still requires. On a
GPU with --amp, a layer uses sparse kernels if these are measured to be faster. Otherwise dense kernels multiply zeros, and the note
says so. --shapes prints, for the same models on a GPU, the milliseconds of each matrix product with dense and with sparse kernels.

Tasks (unit of throughput): nlvr is the whole BLIP-NLVR (pairs), caption and vqa are these models with given captions and answers
(images), vit is BLIP's image encoder (images), block its first block with all tokens (images), retrieval_clip CLIP's or, with its
config, SigLIP's image encoder (images).
Methods: dense is this project's model without pruners, with fused attention; compiled is the same under torch.compile; timm and
transformers are the image encoders of these libraries at the same size, for --task vit (transformers also for retrieval_clip).
speedup is the throughput relative to the first method, dense, computed round by round.

--engine times the deployment form instead, in which every sample keeps the same number of tokens in a block: dense against fixed
numbers (method fixed), both in this engine and precision. onnxruntime and openvino run exported files on a CPU, with a note on how
far these deviate from PyTorch in fp32; torch and compile run the model itself, in bf16 under autocast, compile on a GPU in CUDA
graphs. Quantised models are calibrated on noise: only their time is of interest.

rerank and rank_answers time the scoring of candidates by an uncompressed model. Images and questions are encoded beforehand.
rerank is BLIP's matching of images with --candidates texts each (unit: image-text pairs). separate repeats the image for each of
its texts and computes keys and values for each; padded and shared compute them once per image; shared also packs the texts, as
evaluation does. rank_answers is VQA's choice from the answer list (unit: questions). one by one runs each question alone, with
padded candidates and copies of the question; batched computes the parts that candidates share once, as evaluation does.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from engine.results import code_version, write_json
from engine.train import Precision
from tools.benchmarks.contenders import PRUNED, TASKS, build_methods, random_inputs
from tools.benchmarks.engines import ENGINES, engine_methods, engine_version
from tools.benchmarks.profile import described, profile
from tools.benchmarks.sparse_shapes import shapes_table, time_shapes
from tools.benchmarks.workloads import Forward, Method
from tools.exports.engines import instruction_sets
from utils import UserError, at_least_one, home_expanded, init_run, run_main, user_path

MIB = 2**20


@dataclass
class Row:
    """A row of the result.

    throughput: samples per second; image-text pairs for rerank
    peak_memory_mib: of a pass, besides weights and inputs; None on a CPU, where earlier passes leave memory to reuse
    engine, precision: that ran the pass
    keep: tokens after each block of the image encoder
    parts: shares of the parts of the blocks in the time of a pass, with --profile
    """

    method: str
    p: float
    batch_size: int
    device: str
    throughput: float
    throughput_spread: float
    speedup: float
    latency_ms: float
    peak_memory_mib: float | None
    gflops: float | None
    keep: list[float]
    note: str
    engine: str = "torch"
    precision: str = "fp32"
    parts: str = ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="nlvr")
    parser.add_argument("--config", type=user_path, help="model sizes; default: published, or small for rerank and rank_answers")
    parser.add_argument("--pretrained", type=home_expanded, help="weights to load")
    parser.add_argument("--p", type=numbers(float), default=PRUNED, help="shares of the GFLOPs to remove, such as 0.5,0.8")
    parser.add_argument("--keep-schedule", type=numbers(float), help="share of tokens that each block keeps, separated by commas")
    parser.add_argument("--prune-every", type=at_least_one, default=1, help="one block in so many prunes; the key prune_every")
    parser.add_argument("--temperature", type=float, help="prune at this temperature, instead of --p")
    parser.add_argument("--batch-sizes", type=numbers(at_least_one), default=(8,))
    parser.add_argument("--candidates", type=at_least_one, help="rerank, rank_answers: candidates per item; default: k_test")
    parser.add_argument("--against", default="dense", help="some of dense, compiled, timm, transformers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train", action="store_true", help="time a forward and a backward pass, as in training")
    parser.add_argument("--metered", action="store_true", help="also time pruned models while they count GFLOPs per sample")
    parser.add_argument("--sparse", action="store_true", help="also time models with 2:4 weights")
    parser.add_argument("--shapes", action="store_true", help="instead, time each product of 2:4 weights, dense and sparse")
    parser.add_argument("--amp", action="store_true", help="bf16 under autocast")
    parser.add_argument("--engine", choices=ENGINES, help="compare dense with fixed numbers of tokens in this engine, see above")
    parser.add_argument("--precision", choices=("fp32", "bf16", "int8"), default="fp32", help="with --engine")
    parser.add_argument("--profile", action="store_true", help="also time the parts of the blocks, in passes of their own")
    parser.add_argument("--rounds", type=at_least_one, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=user_path, help="write the rows here")
    parser.add_argument("--out", type=user_path, help="folder for a CSV file and a plot, named by task, device and PyTorch version")
    args = parser.parse_args()
    args.config = args.config or TASKS[args.task].path
    init_run(args.device, args.seed)
    if args.precision != "fp32" and not args.engine:
        raise UserError("--precision: goes with --engine; for bf16 without one use --amp")
    rows = time_shapes(args) if args.shapes else benchmark(args)
    print(shapes_table(rows) if args.shapes else table(rows))
    if args.json:
        here = machine(args.device, args.engine, args.precision)
        write_json({"command": " ".join(sys.argv), **here, "rows": [asdict(row) for row in rows]}, args.json)
    if args.out:
        save(rows, args)


def numbers(kind: type) -> Callable[[str], tuple]:
    """Returns an argparse type for numbers separated by commas."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


@torch.no_grad()
def benchmark(args: argparse.Namespace) -> list[Row]:
    device = torch.device(args.device)
    methods = engine_methods(args, device) if args.engine else build_methods(args, device)
    in_torch = args.engine in (None, "torch", "compile")
    rounded = "bf16" if args.amp else args.precision
    precision = Precision(device, in_torch and rounded == "bf16")
    rows = []
    for batch_size in args.batch_sizes:
        inputs = random_inputs(args, batch_size, device)
        with precision.autocast():
            forwards = [method.prepare(inputs) for method in methods]
            seconds, memory = time_in_turn(forwards, args.rounds, device)
            parts = profiles(args, forwards, methods, device)
        first, note = seconds[0], TASKS[args.task].note(inputs)
        for method, times, mib, shares in zip(methods, seconds, memory, parts, strict=True):
            speedup = statistics.median(a / b for a, b in zip(first, times, strict=True))
            rates = sorted(method.each * batch_size / t for t in times)
            spread = (rates[-1 - len(rates) // 4] - rates[len(rates) // 4]) / 2  # half the interquartile range
            rate, latency = statistics.median(rates), 1000 * statistics.median(times)
            rows.append(
                Row(method.name, method.p, batch_size, str(device), rate, spread, speedup, latency, mib, method.gflops,
                    list(method.keep), "; ".join(filter(None, (note, method.note))), args.engine or "torch", rounded, shares)
            )  # fmt: skip
    return rows


def profiles(args: argparse.Namespace, forwards: Sequence[Forward], methods: Sequence[Method], device: torch.device) -> list[str]:
    """Returns the parts of each pass in words, empty without --profile and for models that have no blocks of this project."""
    wait = partial(synchronise, device)
    return [
        described(profile(forward, method.blocks, args.rounds, wait)) if args.profile and method.blocks else ""
        for forward, method in zip(forwards, methods, strict=True)
    ]


def time_in_turn(forwards: Sequence[Forward], rounds: int, device: torch.device) -> tuple[list[list[float]], list[float | None]]:
    """Times the forward passes in turn, after a warm-up, so that a slower phase of the machine affects all alike.

    Returns:
        the seconds of each round of each pass, and the peak memory of each in MiB on a GPU, None on a CPU.
    """
    memory = [peak_memory(forward, device) for forward in forwards]
    for forward in forwards:
        forward()
    seconds: list[list[float]] = [[] for _ in forwards]
    for _ in range(rounds):
        for forward, times in zip(forwards, seconds, strict=True):
            synchronise(device)
            started = time.perf_counter()
            forward()
            synchronise(device)
            times.append(time.perf_counter() - started)
    return seconds, memory


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(forward: Forward, device: torch.device) -> float | None:
    """Measures the MiB that a forward pass needs besides weights and inputs, on a GPU."""
    if device.type != "cuda":
        return None
    forward()
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    forward()
    return (torch.cuda.max_memory_allocated(device) - before) / MIB


def machine(device: str, engine: str | None = None, precision: str | None = None) -> dict:
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name(device) if on_gpu else f"{torch.get_num_threads()} threads"
    found = {"commit": code_version(), "device": device, "machine": name, "torch": torch.__version__}
    if engine:
        found |= {"engine": engine, "engine_version": engine_version(engine), "precision": precision}
    if not on_gpu:
        found |= {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "instruction_sets": instruction_sets()}
    return found


def table(rows: Sequence[Row]) -> str:
    head = f"{'method':14}{'p':>7}{'batch':>7}{'a second':>12}{'+-':>8}{'speedup':>9}{'ms':>10}{'MiB':>9}{'GFLOPs':>10}"
    lines = [
        f"{r.method:14}{r.p:7.3f}{r.batch_size:7d}{r.throughput:12.2f}{r.throughput_spread:8.2f}{r.speedup:9.2f}"
        f"{r.latency_ms:10.1f}"
        + (f"{'':9}" if r.peak_memory_mib is None else f"{r.peak_memory_mib:9.0f}")
        + (f"{r.gflops:10.3f}" if r.gflops else f"{'':10}")
        for r in rows
    ]
    notes = dict.fromkeys(f"batch {r.batch_size}: {r.note}" for r in rows if r.note)
    parts = [f"{r.method} {r.p:.3f}, batch {r.batch_size}: {r.parts}" for r in rows if r.parts]
    return "\n".join([head, *lines, *notes, *parts])


def save(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """Saves a CSV file with the command that made it, and a plot of speed-up over p if models are pruned."""
    kind = f"{args.task}_shapes" if args.shapes else f"{args.task}_train" if args.train else args.task
    kind += f"_every{args.prune_every}" if args.prune_every > 1 else ""
    name = args.out / f"{kind}_{args.device.replace(':', '')}_torch{torch.__version__.partition('+')[0]}"
    name = Path(f"{name}_bf16") if args.amp else name
    if args.engine:
        version = engine_version(args.engine).partition("+")[0]
        name = args.out / f"{kind}_{args.device}_{args.engine}{version}_{args.precision}"
    here = machine(args.device, args.engine, args.precision)
    write_csv(Path(f"{name}.csv"), f"python {' '.join(sys.argv)}", here, rows)
    if not args.shapes and not args.engine and any(row.method == "madtp" for row in rows):
        plot(rows, args).savefig(f"{name}.png")


def write_csv(path: Path, command: str, here: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """Writes dataclasses as a CSV file, with the command and the machine that made them above."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        file.write(f"# {command}\n# {json.dumps(here)}\n")
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: " ".join(f"{n:g}" for n in value) if isinstance(value, list) else value for key, value in asdict(row).items()}
            for row in rows
        )


def plot(rows: Sequence[Row], args: argparse.Namespace):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axes = figure.subplots()
    for size in args.batch_sizes:
        mine = sorted((row.p, row.speedup) for row in rows if row.batch_size == size and row.method in ("dense", "madtp"))
        axes.plot(*zip(*mine, strict=True), marker="o", label=f"batch {size}")
    axes.set(xlabel="GFLOPs removed, p", ylabel="throughput over dense", title=f"{args.task} on {args.device}")
    axes.legend()
    return figure


if __name__ == "__main__":
    run_main(main)
