"""The findings of checks: a line each, printed as they come."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from configs.load import ConfigError
from utils import UserError

T = TypeVar("T")
SHOWN = 20  # details below a finding


class Findings:
    """Prints each finding as one line, `ok`, `warning` or `problem`, and counts them. A problem would stop a run."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._known: set[str] = set()

    def ok(self, name: str, said: str) -> None:
        self._add("ok", name, said)

    def warning(self, name: str, said: str, details: Sequence[str] = ()) -> None:
        self._add("warning", name, said, details)

    def problem(self, name: str, said: str, details: Sequence[str] = ()) -> None:
        """Adds a problem. Another check that stops at the same one says so, and does not count it again."""
        if said in self._known:
            self._add("warning", name, "not checked: it stops at a problem above")
        else:
            self._add("problem", name, said, details)
        self._known |= {said, *details}

    def tried(self, name: str, check: Callable[[], T]) -> T | None:
        """Returns the result of a check; None where it fails, which is a problem."""
        try:
            return check()
        except UserError as error:
            for said in (str(error), *(error.others if isinstance(error, ConfigError) else ())):
                self.problem(name, said)
        except Exception as error:  # an error that nobody foresaw must not hide what the other checks find
            reason = (str(error).splitlines() or [""])[0]
            self.problem(name, f"{type(error).__name__}: {reason}; the entry script shows where it comes from")
        return None

    def summary(self) -> str:
        """Returns the last line."""
        counted = ", ".join(
            f"{number} {level}{'s' if number != 1 and level != 'ok' else ''}"
            for level in ("problem", "warning", "ok")
            if (number := self.counts[level])
        )
        return f"{counted}: {'the run would stop' if self.counts['problem'] else 'nothing was found that would stop the run'}"

    def _add(self, level: str, name: str, said: str, details: Sequence[str] = ()) -> None:
        self.counts[level] += 1
        print(f"{level:<8} {name}: {said}", flush=True)
        for detail in details[:SHOWN]:
            print(f"           {detail}", flush=True)
        if len(details) > SHOWN:
            print(f"           and {len(details) - SHOWN:,} more", flush=True)
