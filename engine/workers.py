"""Forward passes of several batches side by side on a CPU, each with one thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import nn

from madtp.pruning import TokenPruner

Batch, Result = TypeVar("Batch"), TypeVar("Result")


def side_by_side(
    function: Callable[[Batch], Result], batches: Iterable[Batch], device: torch.device, model: Any, in_turn: bool = False
) -> Iterator[Result]:
    """Yields what `function` returns for each batch, in order. On a CPU, as many batches run at a time as there are threads.

    With all threads in one batch, every layer waits for the slowest of them, a thousand times in a pass. With a batch for each,
    none waits for another, which matters most beside other busy processes. The mode of gradients and of autocast is the caller's.

    Args:
        model: that the function runs. One whose pruning draws random numbers takes the batches in turn, and so does one that is
            no module but an inference engine, with threads of its own.
        in_turn: take them in turn in any case, for a function that seeds random numbers or writes texts by a decoder of
            transformers.
    """
    threads = torch.get_num_threads()
    if in_turn or device.type != "cpu" or threads == 1 or not isinstance(model, nn.Module) or _draws(model):
        yield from map(function, batches)
        return
    gradients, mixed, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def call(batch: Batch) -> Result:
        with torch.set_grad_enabled(gradients), torch.autocast("cpu", dtype, mixed):
            return function(batch)

    running: deque[Future[Result]] = deque()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    try:
        for batch in batches:
            running.append(pool.submit(call, batch))
            if len(running) > threads:  # no more than one batch waits: each holds memory
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # of threads that start later


def _draws(model: nn.Module) -> bool:
    return any(isinstance(module, TokenPruner) and module.rule.method == "random" for module in model.modules())
