"""Losses and gradients that are not finite: found, counted and skipped without waiting for the device."""

from collections.abc import Sequence

import torch
from torch import Tensor

from utils import SharedError, all_reduce_max, gather_objects


class _Later:
    """Numbers of a device, read when it has computed them and not when it has done all that it was given since."""

    def __init__(self, values: Tensor):
        self.values, self.event = values, None
        if values.is_cuda:
            self.values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def read(self) -> list[float]:
        if self.event is not None:
            self.event.synchronize()
        return self.values.tolist()


class BadSteps:
    """Counts the updates that were skipped because a loss or a gradient was not finite.

    total: of the run; in_a_row: up to the last step, without those that only lowered the loss scale of float16
    """

    def __init__(self, limit: int = 10):
        """limit: number of skipped updates in a row that stops the run."""
        self.limit, self.total, self.in_a_row = limit, torch.zeros(()), torch.zeros(())
        self._waiting: tuple[_Later, Sequence[str]] | None = None

    def agree(self, losses: Tensor, wishes: Sequence[bool]) -> tuple[Tensor, Tensor]:
        """Shares among all processes whether a loss of any of them is not finite, and what any of them wishes.

        Args:
            losses: (N,) those of this process in this step.
            wishes: of this process.
        Returns:
            () bool, and the numbers for `count`, on the device
        """
        bad = ~losses.detach().isfinite().all()
        shared = torch.stack([bad.float(), *(torch.full((), float(wish), device=bad.device) for wish in wishes)])
        shared = all_reduce_max(shared)
        return shared[0] > 0, torch.cat([shared[1:], bad.float().unsqueeze(0)])

    def count(self, skipped: Tensor, severe: Tensor, shared: Tensor, step: int, ids: Sequence[str]) -> list[bool]:
        """Counts a step, and looks at the step before, which the device has done by now.

        Args:
            skipped: () bool, the update was skipped.
            severe: () bool, and not only to lower a loss scale.
            shared: from `agree`.
            step: number of the step, from 1.
            ids: of the samples of this process.
        Returns:
            what any process wished in the step before
        Raises:
            SharedError: when that was the last of `limit` severe ones in a row; names the samples.
        """
        self.total = self.total.to(skipped.device) + skipped
        self.in_a_row = (self.in_a_row.to(skipped.device) + 1) * severe
        before, self._waiting = self._waiting, (_Later(torch.cat([self.in_a_row.unsqueeze(0), shared])), ids)
        if before is None:
            return [False] * (len(shared) - 1)
        in_a_row, *wished, own = before[0].read()
        if in_a_row >= self.limit:
            self._stop(step - 1, before[1], own > 0)
        return [wish > 0 for wish in wished]

    def finish(self, step: int) -> None:
        """Looks at the last step of an epoch, `step`. Raises as `count` does."""
        before, self._waiting = self._waiting, None
        if before is not None:
            in_a_row, *_, own = before[0].read()
            if in_a_row >= self.limit:
                self._stop(step, before[1], own > 0)

    def _stop(self, step: int, ids: Sequence[str], own: bool) -> None:
        everyones = gather_objects((own, list(ids)))
        named = [part for bad, part in everyones if bad] or [part for _, part in everyones]
        samples = ", ".join(map(str, sum(named, [])))
        raise SharedError(
            f"the loss or its gradient is not finite at step {step}, as in the {self.limit - 1} steps before; lower 'init_lr' or"
            " switch 'amp' off, and go on from the last checkpoint with --resume"
            + (f"; samples of the last batch: {samples}" if samples else "")
        )
