"""What a run leaves behind: log.txt, TensorBoard scalars, predictions and result.json (formats in the README)."""

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import nn


def write_json(content: object, path: Path) -> None:
    """Written under a temporary name and renamed: a reader never sees half a file."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(temporary, path)


def code_version() -> str:
    """The commit of this code, with a + where files differ from it; empty outside of a git checkout."""
    describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def count_parameters(model: nn.Module) -> dict[str, int]:
    """All parameters that are trained, so not momentum copies, which no user deploys; and those that are not zero."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return {"total": sum(p.numel() for p in trained), "nonzero": sum(int(p.count_nonzero()) for p in trained)}


class RunLog:
    """log.txt (a JSON object a line) and TensorBoard scalars of a run. A silent one when `folder` is None (other ranks)."""

    def __init__(self, folder: Path | None, before: Path | None = None, first_epoch: int = 0):
        """before: the folder of the run that goes on here, whose epochs before `first_epoch` are part of this one's log."""
        self.folder, self._board = folder, None
        if folder is not None:
            from torch.utils.tensorboard import SummaryWriter

            kept = "".join(_lines_before(before / "log.txt", first_epoch)) if before else ""
            (folder / "log.txt").write_text(kept, encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"))

    def write(self, entry: Mapping[str, object]) -> None:
        """One epoch. Nested numbers become scalars named by their path."""
        if self.folder is None:
            return
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        for name, value in _scalars(entry):
            self._board.add_scalar(name, value, entry["epoch"])
        self._board.flush()


def _lines_before(log: Path, epoch: int) -> Iterator[str]:
    """Of whole lines: a run that died may have left half of one."""
    for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if log.is_file() else ():
        try:
            early = line.endswith("\n") and json.loads(line)["epoch"] < epoch
        except json.JSONDecodeError:
            continue
        if early:
            yield line


def _scalars(entry: Mapping[str, object], prefix: str = ""):
    for name, value in entry.items():
        if isinstance(value, Mapping):
            yield from _scalars(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{name}", value
