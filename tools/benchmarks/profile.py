"""The time of a pass by the parts of its blocks, for tools/benchmark.py --profile."""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

from tools.benchmarks.workloads import Forward

PARTS = {"attend": "attention", "transform": "MLP and cross-attention"}  # methods of `PrunedBlock`
PRUNING = {"align": "alignment", "prune": "choosing and gathering"}  # methods of `TokenPruner`
WHOLE = "whole pass"


def profile(forward: Forward, blocks: Iterable[nn.Module], rounds: int, synchronise: Callable[[], None]) -> dict[str, float]:
    """Returns the milliseconds of a pass and of the parts of its blocks, means over `rounds` passes after a first one.

    What is left of the pass lies outside of the blocks. On a GPU each part waits for the device, so that a pass takes longer.
    """
    with timed(blocks, synchronise) as seconds:
        forward()
        seconds.clear()
        for _ in range(rounds):
            _timed(WHOLE, forward, seconds, synchronise)
    return {part: 1000 * total / rounds for part, total in seconds.items()}


@contextmanager
def timed(blocks: Iterable[nn.Module], synchronise: Callable[[], None]) -> Iterator[dict[str, float]]:
    """Yields the seconds by part, which add up while the blocks run."""
    seconds: dict[str, float] = {}
    replaced = []
    for block in blocks:
        for owner, names in ((block, PARTS), (block.pruner, PRUNING)):
            for name, part in names.items() if owner is not None else ():
                setattr(owner, name, partial(_timed, part, getattr(owner, name), seconds, synchronise))
                replaced.append((owner, name))
    try:
        yield seconds
    finally:
        for owner, name in replaced:
            delattr(owner, name)


def _timed(part: str, run: Callable, seconds: dict[str, float], synchronise: Callable[[], None], *inputs: Any) -> Any:
    synchronise()
    started = time.perf_counter()
    found = run(*inputs)
    synchronise()
    seconds[part] = seconds.get(part, 0.0) + time.perf_counter() - started
    return found


def described(parts: dict[str, float]) -> str:
    """Returns a line such as "attention 40 %, alignment 2 %, outside of blocks 5 % of 81.3 ms"."""
    whole = parts[WHOLE]
    shares = {name: value / whole for name, value in parts.items() if name != WHOLE}
    shares["outside of blocks"] = 1 - sum(shares.values())
    return ", ".join(f"{name} {share:.1%}" for name, share in shares.items()) + f" of {whole:.1f} ms"
