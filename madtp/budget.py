"""The prune setting that meets a GFLOPs target: a scan over temperatures, then bisection inside the bracket.

GFLOPs as a function of the temperature is a black box: nearly monotone for trained models, rising in `variant: paper` and falling
in `released`, not always monotone at random weights. So nothing is assumed but that a bracket on the scan holds a crossing.
"""

from collections.abc import Callable
from dataclasses import dataclass

from madtp.pruning import PruneSetting

Measure = Callable[[PruneSetting], float]  # mean GFLOPs per sample on the calibration slice

COARSE_GRID = tuple(10.0 ** (k / 2) for k in range(-2, 9))  # 0.1 ... 1e4


@dataclass(frozen=True)
class Calibration:
    """A setting, the GFLOPs measured there, and how many times the slice was run to find it."""

    setting: PruneSetting
    gflops: float
    evaluations: int


class UnreachableTarget(ValueError):
    """No setting reaches the target.

    nearest: the setting that comes nearest; low, high: the GFLOPs that pruning can reach, the target outside them; where it lies in
    a gap, those that the `prune_from` of the nearest setting can reach
    """

    def __init__(self, target: float, nearest: Calibration, low: float, high: float):
        super().__init__(f"no temperature reaches {target:.4f} GFLOPs: pruning spans {low:.4f} to {high:.4f}")
        self.nearest, self.low, self.high = nearest, low, high


class _Meter:
    """Measures each setting once and remembers it, `prune_from` by `prune_from`."""

    def __init__(self, measure: Measure):
        self._measure, self._seen, self.evaluations = measure, {}, 0

    def __call__(self, temperature: float, prune_from: int) -> float:
        key = (temperature, prune_from)
        if key not in self._seen:
            self._seen[key] = self._measure(PruneSetting(temperature, prune_from))
            self.evaluations += 1
        return self._seen[key]

    def unreachable(self, target: float) -> UnreachableTarget:
        """What to say of what was measured."""
        (temperature, first), gflops = min(self._seen.items(), key=lambda item: abs(item[1] - target))
        span = list(self._seen.values())
        if min(span) < target < max(span):
            span = [value for (_, prune_from), value in self._seen.items() if prune_from == first]
        nearest = Calibration(PruneSetting(temperature, first), gflops, self.evaluations)
        return UnreachableTarget(target, nearest, min(span), max(span))


def calibrate(
    measure: Measure,
    target: float,
    *,
    start: PruneSetting | None = None,
    prune_from: int = 0,
    max_prune_from: int = 0,
    tolerance: float = 0.005,
    max_bisections: int = 20,
) -> Calibration:
    """The setting whose GFLOPs come within `tolerance` (relative) of `target`.

    Args:
        measure: mean GFLOPs per sample at a setting; called 2 to about 30 times.
        target: GFLOPs per sample, as `measure` gives them.
        start: an earlier answer, around which a bracket is tried first.
        prune_from: the first block that prunes; raised up to `max_prune_from` while even the gentlest pruning is below `target`.
    Raises:
        UnreachableTarget: when no temperature and no `prune_from` brackets the target.
    """
    meter = _Meter(measure)
    firsts = list(range(prune_from, max_prune_from + 1))
    if start is not None and start.prune_from > prune_from:
        firsts.insert(0, start.prune_from)  # likely to do again, unless the target fell below what it can reach
    for index, first in enumerate(firsts):
        near = start.temperature if start and start.prune_from == first else None
        bracket = _bracket(lambda t, first=first: meter(t, first), target, tolerance, near)
        if bracket is not None:
            temperature = _bisect(lambda t, first=first: meter(t, first), target, bracket, tolerance, max_bisections)
            return Calibration(PruneSetting(temperature, first), meter(temperature, first), meter.evaluations)
        if first not in firsts[index + 1 :] and min(meter(t, first) for t in COARSE_GRID) > target:
            break  # pruning later only costs more
    raise meter.unreachable(target)


def _bracket(gflops: Callable[[float], float], target: float, tolerance: float, near: float | None) -> tuple[float, float] | None:
    """Two temperatures with the target between their GFLOPs; equal ones when a point of the scan already meets it."""
    grids = [COARSE_GRID]
    if near is not None:
        grids.insert(0, (near, near * 1.15, near / 1.15, near * 1.6, near / 1.6))
    for grid in grids:
        scanned: list[tuple[float, float]] = []
        for temperature in grid:
            value = gflops(temperature)
            if abs(value - target) <= tolerance * target:
                return temperature, temperature
            scanned = sorted([*scanned, (temperature, value)])
            for (low, a), (high, b) in zip(scanned, scanned[1:], strict=False):
                if (a - target) * (b - target) < 0:
                    return low, high
    return None


def _bisect(gflops: Callable[[float], float], target: float, bracket: tuple[float, float], tolerance: float, steps: int) -> float:
    """Bisection on the logarithm of the temperature; the best temperature seen."""
    low, high = bracket
    rising = gflops(high) >= gflops(low)
    best = min(bracket, key=lambda t: abs(gflops(t) - target))
    for _ in range(steps):
        if abs(gflops(best) - target) <= tolerance * target:
            break
        middle = (low * high) ** 0.5
        if (gflops(middle) < target) == rising:
            low = middle
        else:
            high = middle
        best = min(best, middle, key=lambda t: abs(gflops(t) - target))
    return best
