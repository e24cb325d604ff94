"""SIGTERM and SIGINT: a run ends at once where that loses nothing, and else when what it is at is done."""

import signal
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

from utils import logger

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interruption(AbstractContextManager):
    """Context manager in which SIGTERM and SIGINT end the program with exit code 128 + signal: 143 or 130.

    received: the signal that has come in `held`; None so far
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._holding = False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # no other may set handlers
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Context manager in which a signal waits for its end, so that what runs there is not cut in the middle."""
        self._holding = True
        try:
            yield
        finally:
            self._holding = False
        if self.received is not None:
            self.leave()

    def leave(self) -> None:
        """Ends the program as by the signal received, or by SIGTERM where only another process has received one."""
        raise SystemExit(128 + (self.received or signal.SIGTERM))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:  # a terminal's Ctrl-C reaches a process twice: from the terminal and from its launcher
            how = "saves and ends after this step" if self._holding else "ends"
            logger.warning("%s: the run %s; go on with --resume", signal.Signals(number).name, how)
        self.received = number
        if not self._holding:
            self.leave()
