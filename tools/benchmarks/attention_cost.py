"""Measures what the scores of a pruned block add to its attention, and how exact they are: packed against the plain formula.

    python -m tools.benchmarks.attention_cost --device cuda --out benchmarks/gpu

The plain formula runs padded in double precision. On a GPU, packed attention is the variable-length kernel and the scores are those
of the Triton kernel, in bf16; on a CPU both are computed in chunks, in float32.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from madtp.attention import varlen
from madtp.attention.attend import attend
from madtp.packing import pack, padded
from madtp.rule import PruningRule
from tools.benchmark import machine, numbers, synchronise, write_csv
from utils import at_least_one, init_run, run_main, user_path

RULE = PruningRule(keep="instance")
SPREAD = 0.2  # samples have up to this share fewer tokens than the longest one


@dataclass
class Row:
    """A number of tokens.

    attention_ms, scored_ms: median milliseconds of packed attention alone, and with scores
    ratio: of the two, the median over rounds
    output_error, class_error, column_error: largest absolute difference from the plain formula, relative to its largest value
    """

    tokens: int
    batch_size: int
    kernel: str
    attention_ms: float
    scored_ms: float
    ratio: float
    output_error: float
    class_error: float
    column_error: float


@torch.no_grad()
def measure(tokens: int, batch_size: int, heads: int, width: int, device: torch.device, rounds: int) -> Row:
    """Measures attention over samples of up to `tokens` tokens with `heads` heads of `width` channels."""
    generator = torch.Generator().manual_seed(tokens)
    lengths = torch.randint(max(2, int(tokens * (1 - SPREAD))), tokens + 1, (batch_size,), generator=generator)
    lengths[0] = tokens
    valid = (torch.arange(tokens) < lengths.unsqueeze(1)).to(device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    drawn = [torch.randn(batch_size, tokens, heads * width, generator=generator).to(device, dtype) for _ in range(3)]
    packed = [pack(part, valid) for part in drawn]
    query, key, value = (part for part, _ in packed)
    layout = packed[0][1]
    out, statistics_ = attend(query, key, value, heads, layout, layout, rule=RULE)
    plain, expected = attend(*(part.double() for part in drawn), heads, valid, valid, rule=RULE)
    errors = [_error(padded(out, layout)[0], plain, valid)]
    errors += [_error(getattr(statistics_, name), getattr(expected, name), valid[:, 1:]) for name in ("class_attention", "columns")]
    run = partial(attend, query, key, value, heads, layout, layout)
    alone, scored = _times([run, partial(run, rule=RULE)], rounds, device)
    ratio = statistics.median(b / a for a, b in zip(alone, scored, strict=True))
    kernel = "varlen" if varlen.usable(query, heads) else "chunks"
    return Row(tokens, batch_size, kernel, *(1000 * statistics.median(times) for times in (alone, scored)), ratio, *errors)


def _error(found: Tensor, expected: Tensor, valid: Tensor) -> float:
    found, expected = found[valid].double(), expected[valid].double()
    return float((found - expected).abs().max() / expected.abs().max())


def _times(runs: list[Callable[[], object]], rounds: int, device: torch.device) -> list[list[float]]:
    """Returns the seconds of each, run in turns after a warm-up."""
    seconds: list[list[float]] = [[] for _ in runs]
    for round_ in range(rounds + 1):
        for run, times in zip(runs, seconds, strict=True):
            synchronise(device)
            start = time.perf_counter()
            run()
            synchronise(device)
            if round_:
                times.append(time.perf_counter() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=numbers(at_least_one), default=(64, 128, 197, 257, 400, 577))
    parser.add_argument("--batch-size", type=at_least_one, default=32)
    parser.add_argument("--heads", type=at_least_one, default=12)
    parser.add_argument("--width", type=at_least_one, default=64, help="channels of a head")
    parser.add_argument("--rounds", type=at_least_one, default=20)
    parser.add_argument("--out", type=user_path, help="folder for a CSV file")
    args = parser.parse_args()
    device = init_run(args.device).device
    rows = [measure(tokens, args.batch_size, args.heads, args.width, device, args.rounds) for tokens in args.tokens]
    for row in rows:
        print(row)
    if args.out:
        command = f"python -m tools.benchmarks.attention_cost {' '.join(sys.argv[1:])}"
        write_csv(args.out / f"attention_{args.device.replace(':', '')}.csv", command, machine(args.device), rows)


if __name__ == "__main__":
    run_main(main)
