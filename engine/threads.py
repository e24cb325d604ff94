"""How many threads a piece of work on a CPU is worth."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

SMALL = 4.0  # GFLOPs: some tenths of a second of one core


@contextmanager
def threads_for(gflops: float, device: torch.device) -> Iterator[None]:
    """Runs small work on a CPU with one thread.

    Each layer is a parallel region, which ends when its slowest thread does. Where layers are small, several threads gain little.
    Beside other busy processes, where any of them may have to wait for its turn, they can lose far more than they gain.
    """
    before = torch.get_num_threads()
    few = device.type == "cpu" and gflops < SMALL
    if few:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        if few:
            torch.set_num_threads(before)
