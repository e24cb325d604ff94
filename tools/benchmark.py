"""How fast compressed models are beside dense ones: throughput, latency and memory at real size, methods in turn.

    python tools/benchmark.py --task nlvr --p 0.5,0.7,0.8 --batch-sizes 8 --device cpu
    python tools/benchmark.py --task vit --against dense,timm,transformers --batch-sizes 1,8,32
    python tools/benchmark.py --task vit --train --p 0.5 --batch-sizes 8
    python tools/benchmark.py --task nlvr --keep-schedule 0.9,0.9,0.8,0.8,0.7,0.7,0.7,0.7,0.7,0.7,0.7,0.7
    python tools/benchmark.py --task retrieval_clip --against dense,transformers --p 0.5,0.75 --batch-sizes 4 --metered
    python tools/benchmark.py --task nlvr --sparse --amp --p 0.5,0.8 --batch-sizes 8,32
    python tools/benchmark.py --task nlvr --shapes --amp --p 0.5,0.8 --batch-sizes 8,32
    python tools/benchmark.py --task rerank --candidates 256 --batch-sizes 4
    python tools/benchmark.py --task rank_answers --batch-sizes 32

The pictures are noise and the weights random, and scores of these mean nothing. So every block keeps the same share of its tokens,
the one that makes the GFLOPs fall by p, pruning's own cost included; scores and thresholds are computed all the same.
--keep-schedule gives the share of each block instead; --temperature prunes as --pretrained weights would.
--train times a forward and a backward pass, the similarity loss included. --metered adds to each pruned model the same pass with
the GFLOPs of each sample counted, as evaluation does.

--sparse adds models with 2:4 weights in all blocks: with all tokens, and with as few as p takes beside them. On a GPU with --amp a
layer runs sparse kernels where these are measured to be faster; elsewhere dense kernels multiply zeros, and the note says so.
--shapes prints, of the same models on a GPU, the milliseconds of each shape of product with dense and with sparse kernels.

nlvr is BLIP-NLVR whole (pairs), vit its image encoder (images), block the first block of that, on all its tokens; retrieval_clip is
CLIP's image encoder (images).
dense is this project's model without pruners (fused attention), compiled the same under torch.compile; timm and transformers are
their image encoders of the same size and exist for --task vit, transformers for retrieval_clip too. speedup is the throughput over
that of the first method, dense, round by round.

rerank and rank_answers score candidates with an uncompressed model; images and questions are encoded beforehand.
rerank is BLIP's matching of images with --candidates texts each (pairs of an image and a text): separate repeats the image for each
of its texts, which so have keys and values of their own; padded and shared compute them once an image, shared with packed texts, as
evaluation does. rank_answers is VQA's choice among listed answers (questions): one by one, each question's candidates padded and
with copies of the question; and batched, what candidates have in common computed once, as evaluation does.
"""

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from engine.results import write_json
from engine.train import Precision
from tools.benchmarks.contenders import PRUNED, TASKS, build_methods, random_inputs
from tools.benchmarks.sparse_shapes import shapes_table, time_shapes
from tools.benchmarks.workloads import Forward
from utils import at_least_one, init_run, run_main

MIB = 2**20


@dataclass
class Row:
    """One line of the result. throughput: samples a second, of rerank pairs; keep: tokens after each image block."""

    method: str
    p: float
    batch_size: int
    device: str
    throughput: float
    throughput_spread: float
    speedup: float
    latency_ms: float
    peak_memory_mib: float
    gflops: float | None
    keep: list[float]
    note: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="nlvr")
    parser.add_argument("--config", type=Path, help="sizes of the model; by default the published ones, for rankings small ones")
    parser.add_argument("--pretrained", help="weights to load")
    parser.add_argument("--p", type=numbers(float), default=PRUNED, help="shares of the GFLOPs to remove, 0.5,0.8")
    parser.add_argument("--keep-schedule", type=numbers(float), help="the share of its tokens that each block keeps")
    parser.add_argument("--temperature", type=float, help="prune at this temperature, instead of --p")
    parser.add_argument("--batch-sizes", type=numbers(at_least_one), default=(8,))
    parser.add_argument("--candidates", type=at_least_one, help="of each image or question, for rerank and rank_answers; k_test")
    parser.add_argument("--against", default="dense", help="of dense, compiled, timm, transformers")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--train", action="store_true", help="forward and backward, as training runs them")
    parser.add_argument("--metered", action="store_true", help="pruned models also with the GFLOPs of each sample counted")
    parser.add_argument("--sparse", action="store_true", help="also models with 2:4 weights")
    parser.add_argument("--shapes", action="store_true", help="the time of each product of 2:4 weights instead, dense and sparse")
    parser.add_argument("--amp", action="store_true", help="bf16 under autocast")
    parser.add_argument("--rounds", type=at_least_one, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--out", type=Path, help="a folder for a CSV and a plot, named by task, device and PyTorch version")
    args = parser.parse_args()
    args.config = args.config or TASKS[args.task].path
    init_run(args.device, args.seed)
    rows = time_shapes(args) if args.shapes else benchmark(args)
    print(shapes_table(rows) if args.shapes else table(rows))
    if args.json:
        write_json({"command": " ".join(sys.argv), **machine(args.device), "rows": [asdict(row) for row in rows]}, args.json)
    if args.out:
        save(rows, args)


def numbers(kind: type) -> Callable[[str], tuple]:
    """An argparse type: numbers with commas between."""

    def parse(text: str) -> tuple:
        return tuple(kind(part) for part in text.split(","))

    parse.__name__ = f"list of {kind.__name__}"
    return parse


@torch.no_grad()
def benchmark(args: argparse.Namespace) -> list[Row]:
    device = torch.device(args.device)
    precision = Precision(device, args.amp)
    methods = build_methods(args, device)
    rows = []
    for batch_size in args.batch_sizes:
        inputs = random_inputs(args, batch_size, device)
        with precision.autocast():
            forwards = [method.prepare(inputs) for method in methods]
            seconds, memory = time_in_turn(forwards, args.rounds, device)
        first, note = seconds[0], TASKS[args.task].note(inputs)
        for method, times, mib in zip(methods, seconds, memory, strict=True):
            speedup = statistics.median(a / b for a, b in zip(first, times, strict=True))
            rates = sorted(method.each * batch_size / t for t in times)
            spread = (rates[-1 - len(rates) // 4] - rates[len(rates) // 4]) / 2  # half of what lies between the quartiles
            rate, latency = statistics.median(rates), 1000 * statistics.median(times)
            rows.append(
                Row(method.name, method.p, batch_size, str(device), rate, spread, speedup, latency, mib, method.gflops,
                    list(method.keep), "; ".join(filter(None, (note, method.note))))
            )  # fmt: skip
    return rows


def time_in_turn(forwards: Sequence[Forward], rounds: int, device: torch.device) -> tuple[list[list[float]], list[float]]:
    """Seconds of each round of each forward pass, after a warm-up, and its peak memory in MiB above what was there before."""
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


def peak_memory(forward: Forward, device: torch.device) -> float:
    """MiB that a forward pass needs beyond weights and inputs; of a CPU as Linux counts them."""
    if device.type == "cuda":
        forward()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        forward()
        return (torch.cuda.max_memory_allocated(device) - before) / MIB
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what is there now
        before = status("VmRSS")
        forward()
        return (status("VmHWM") - before) / 1024
    except OSError:  # no Linux
        return float("nan")


def status(key: str) -> int:
    """KiB, from Linux' account of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def machine(device: str) -> dict:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else f"{torch.get_num_threads()} threads"
    return {"device": device, "machine": name, "torch": torch.__version__}


def table(rows: Sequence[Row]) -> str:
    head = f"{'method':14}{'p':>7}{'batch':>7}{'a second':>12}{'+-':>8}{'speedup':>9}{'ms':>10}{'MiB':>9}{'GFLOPs':>10}"
    lines = [
        f"{r.method:14}{r.p:7.3f}{r.batch_size:7d}{r.throughput:12.2f}{r.throughput_spread:8.2f}{r.speedup:9.2f}"
        f"{r.latency_ms:10.1f}{r.peak_memory_mib:9.0f}" + (f"{r.gflops:10.3f}" if r.gflops else f"{'':10}")
        for r in rows
    ]
    notes = dict.fromkeys(f"batch {r.batch_size}: {r.note}" for r in rows if r.note)
    return "\n".join([head, *lines, *notes])


def save(rows: Sequence[Row], args: argparse.Namespace) -> None:
    """A CSV with the command that made it, and where models are pruned, the throughput over the GFLOPs reduction."""
    args.out.mkdir(parents=True, exist_ok=True)
    kind = f"{args.task}_shapes" if args.shapes else args.task
    name = args.out / f"{kind}_{args.device.replace(':', '')}_torch{torch.__version__.partition('+')[0]}"
    with open(f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        file.write(f"# python {' '.join(sys.argv)}\n# {json.dumps(machine(args.device))}\n")
        writer = csv.DictWriter(file, asdict(rows[0]))
        writer.writeheader()
        writer.writerows(
            {key: " ".join(f"{n:g}" for n in value) if isinstance(value, list) else value for key, value in asdict(row).items()}
            for row in rows
        )
    if not args.shapes and any(row.method == "madtp" for row in rows):
        plot(rows, args).savefig(f"{name}.png")


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
