"""Searching the prune setting that meets a GFLOPs target: a scan over temperatures, then interpolation inside a bracket.

GFLOPs as a function of the temperature is a black box: nearly monotone for trained models, rising in `variant: paper` and falling
in `released`, not always monotone with random weights. The search only assumes that a bracket found by the scan holds a crossing.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

from madtp.rule import PruneSetting

Measure = Callable[[PruneSetting], float]  # mean GFLOPs per sample on the calibration slice

COARSE_GRID = tuple(10.0 ** (k / 2) for k in range(-2, 13))  # 0.1 ... 1e6: small untrained learnable tokens need as much
WITHIN_BUDGET = 0.01  # relative distance from the target that still counts as meeting it
WALK, STRIDE = 5, math.log(4)  # secant steps from an earlier answer, and the largest step


@dataclass(frozen=True)
class Calibration:
    """A setting, the GFLOPs measured at it, and the number of measurements that the search took."""

    setting: PruneSetting
    gflops: float
    evaluations: int


class UnreachableTarget(ValueError):
    """No setting reaches the target.

    nearest: the setting that comes nearest
    low, high: the range of GFLOPs that pruning reaches; if the target lies in a gap, the range at the nearest `prune_from`
    """

    def __init__(self, target: float, nearest: Calibration, low: float, high: float):
        super().__init__(f"no temperature reaches {target:.4f} GFLOPs: pruning spans {low:.4f} to {high:.4f}")
        self.nearest, self.low, self.high = nearest, low, high


class _Meter:
    """Measures each setting once and remembers the result."""

    def __init__(self, measure: Measure):
        self._measure, self.evaluations = measure, 0
        self._seen: dict[tuple[float, int], float] = {}

    def __call__(self, temperature: float, prune_from: int) -> float:
        key = (temperature, prune_from)
        if key not in self._seen:
            self._seen[key] = self._measure(PruneSetting(temperature, prune_from))
            self.evaluations += 1
        return self._seen[key]

    def unreachable(self, target: float) -> UnreachableTarget:
        """Returns the error that describes the measurements so far."""
        (temperature, first), gflops = min(self._seen.items(), key=lambda item: abs(item[1] - target))
        span = list(self._seen.values())
        if min(span) < target < max(span):
            span = [value for (_, prune_from), value in self._seen.items() if prune_from == first]
        nearest = Calibration(PruneSetting(temperature, first), gflops, self.evaluations)
        return UnreachableTarget(target, nearest, min(span), max(span))


def within(measured: float, goal: float, setting: PruneSetting, limit: float = WITHIN_BUDGET) -> bool:
    """Tells whether GFLOPs meet the goal. Fewer are fine if no token is pruned: sparse weights then meet it alone."""
    return abs(measured - goal) <= limit * goal or (setting.temperature is None and measured <= goal)


def calibrate(
    measure: Measure,
    target: float,
    *,
    start: PruneSetting | None = None,
    prune_from: int = 0,
    max_prune_from: int = 0,
    tolerance: float = 0.005,
    max_evaluations: int = 20,
) -> Calibration:
    """Finds the setting whose GFLOPs come within `tolerance` (relative) of `target`.

    Args:
        measure: returns the mean GFLOPs per sample at a setting; called 2 to about 35 times, and some 15 times more
            for each further `prune_from`.
        target: GFLOPs per sample, in the units of `measure`.
        start: an earlier answer; the search begins with steps from it.
        prune_from: the first block that prunes; raised up to `max_prune_from` while even the gentlest pruning is below `target`.
        tolerance: relative.
        max_evaluations: of the interpolation.
    Raises:
        UnreachableTarget: when no temperature and no `prune_from` brackets the target.
    """
    meter = _Meter(measure)
    firsts = range(prune_from, max_prune_from + 1)
    near = start if start is not None and start.temperature is not None and start.prune_from in firsts else None
    for first in chain([] if near is None else [near.prune_from], _likely_first(meter, target, firsts, tolerance)):
        gflops = partial(meter, prune_from=first)
        if near is not None and near.temperature is not None:
            bracket, near = _walk(gflops, near.temperature, target, tolerance), None
        else:
            bracket = _scan(gflops, target, tolerance)
        if bracket is not None:
            temperature = _narrow(gflops, target, bracket, tolerance, max_evaluations)
            return Calibration(PruneSetting(temperature, first), gflops(temperature), meter.evaluations)
    raise meter.unreachable(target)


def _likely_first(meter: _Meter, target: float, firsts: Sequence[int], tolerance: float) -> Iterator[int]:
    """Yields values of `prune_from`: from the earliest that seems to reach `target`, found by bisection; then the others."""

    def reaches(first: int) -> bool:
        return max(meter(temperature, first) for temperature in (COARSE_GRID[0], COARSE_GRID[-1])) >= target * (1 - tolerance)

    low, high = 0, 0 if reaches(firsts[0]) else len(firsts)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reaches(firsts[middle]) else (middle + 1, high)
    for first in firsts[low:]:
        yield first
        if min(meter(temperature, first) for temperature in COARSE_GRID) > target:
            break  # pruning later only costs more
    yield from firsts[:low]


def _scan(gflops: Callable[[float], float], target: float, tolerance: float) -> tuple[float, float] | None:
    """Returns two temperatures with the target between their GFLOPs, or equal ones when a grid point already meets it.

    The ends of the grid are tried first; the points between serve curves that are not monotone.
    """
    ends = COARSE_GRID[0], COARSE_GRID[-1]
    if (gflops(ends[0]) - target) * (gflops(ends[1]) - target) < 0:
        return ends
    scanned: list[tuple[float, float]] = []
    for temperature in COARSE_GRID:
        value = gflops(temperature)
        if abs(value - target) <= tolerance * target:
            return temperature, temperature
        scanned = sorted([*scanned, (temperature, value)])
        for (low, a), (high, b) in zip(scanned, scanned[1:], strict=False):
            if (a - target) * (b - target) < 0:
                return low, high
    return None


def _walk(gflops: Callable[[float], float], start: float, target: float, tolerance: float) -> tuple[float, float] | None:
    """Finds such a bracket by secant steps on the logarithm of the temperature, from an earlier answer."""
    here, there = start, start * 1.2
    if abs(gflops(here) - target) <= tolerance * target:
        return here, here
    for _ in range(WALK):
        a, b = gflops(here), gflops(there)
        if abs(b - target) <= tolerance * target:
            return there, there
        if (a - target) * (b - target) < 0:
            return min(here, there), max(here, there)
        if a == b:
            return None
        step = (target - b) / (b - a) * math.log(there / here)
        here, there = there, there * math.exp(max(-STRIDE, min(STRIDE, step)))
    return None


def _narrow(gflops: Callable[[float], float], target: float, bracket: tuple[float, float], tolerance: float, steps: int) -> float:
    """Shrinks the bracket by interpolation on the logarithm of the temperature and returns the best temperature seen."""
    low, high = bracket
    best = min(bracket, key=lambda t: abs(gflops(t) - target))
    for _ in range(steps):
        a, b = gflops(low), gflops(high)
        if abs(gflops(best) - target) <= tolerance * target:
            break
        share = max(0.15, min(0.85, (target - a) / (b - a)))
        middle = low * (high / low) ** share
        if (gflops(middle) < target) == (a < target):
            low = middle
        else:
            high = middle
        best = min(best, middle, key=lambda t: abs(gflops(t) - target))
    return best
