"""The folder of a run: whose it is, that it is one run's at a time, and what a new run removes from it."""

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.load import save_config
from configs.schema import Config
from engine.checkpoint import BEST, LAST, PREVIOUS
from engine.results import RunLog
from utils import Run, UserError, barrier, logger

CHECKPOINTS = (BEST, LAST, PREVIOUS)
RESULTS = ("result.json", "predictions_val.json", "predictions_test.json")
LOCK = ".lock"
PATIENCE = 10.0  # seconds that a run waits for the lock of one that is just ending


def check_free(config: Config) -> None:
    """Refuses a folder with the results of another run, unless `overwrite` is set.

    A run that is resumed in its own folder goes on there.
    """
    folder = Path(config.output_dir)
    if config.overwrite:
        return
    own = config.resume and config.resume_path.parent.resolve() == folder.resolve()
    if config.evaluate:
        if (folder / "result.json").is_file():
            raise UserError(f"{folder}: holds a result.json; replace it with --overwrite, or give another folder with --output_dir")
    elif not own and (found := next((name for name in (*CHECKPOINTS, "result.json") if (folder / name).is_file()), None)):
        raise UserError(
            f"{folder}: holds the {found} of another run; go on with that run by --resume, start anew with --overwrite, or give"
            " another folder with --output_dir"
        )


def check_sources(config: Config) -> None:
    """Refuses to start from a checkpoint that the new run would remove, because it lies in the same folder."""
    folder = Path(config.output_dir)
    for source in filter(None, () if config.resume else (config.pretrained, config.teacher)):
        if Path(source).resolve() in [(folder / name).resolve() for name in CHECKPOINTS]:
            raise UserError(f"{source}: a new run in {folder} would remove it; give another folder with --output_dir")


class RunFolder:
    """The folder that a run writes to. Only the main process locks it and writes."""

    def __init__(self, config: Config, run: Run):
        self.config, self.run, self.path = config, run, Path(config.output_dir)
        self._lock: int | None = None

    @contextmanager
    def used(self) -> Iterator["RunFolder"]:
        """Context manager of a run: locks a folder that is not another run's, and gives it up at the end.

        A folder that does not exist yet is made and locked by `prepare`, after all checks that are possible before training.
        """
        if not self.config.evaluate:
            check_sources(self.config)
        try:
            if self.run.is_main and self.path.is_dir() and os.access(self.path, os.W_OK):
                self._claim()
            yield self
        finally:
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None

    def prepare(self) -> None:
        """Makes the folder and writes config.yaml. An evaluation does not overwrite the config.yaml of a training run.

        Called only after all checks that are possible before training: the folder may hold an earlier run, which a bad config
        must not overwrite.
        """
        folder, advice = self.path, "give another folder with --output_dir"
        if self.run.is_main:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                if not os.access(folder, os.W_OK):
                    raise UserError(f"{folder}: may not be written to; {advice}")
                if self._lock is None:
                    self._claim()
                if not (self.config.evaluate and any((folder / name).is_file() for name in (LAST, PREVIOUS))):
                    save_config(self.config.model_copy(update={"resume": "", "overwrite": False}), folder / "config.yaml")
            except OSError as error:
                raise UserError(f"{folder}: {error.strerror or error}; {advice}") from None
        barrier()

    def open_log(self, first_epoch: int) -> RunLog:
        """Opens the log of a training run and removes what other runs left.

        A run that is resumed in another folder copies its best checkpoint and its log there.
        """
        config, folder = self.config, self.path
        begun_in = config.resume_path.parent if config.resume else None
        if self.run.is_main:
            names = [f"{name}.tmp" for name in (*CHECKPOINTS, *RESULTS)]  # of a run that was killed while it wrote
            if begun_in is None or begun_in.resolve() != folder.resolve():
                names += (*CHECKPOINTS, *RESULTS)  # what an earlier run left must not be mistaken for this one's
            for name in names:
                (folder / name).unlink(missing_ok=True)
            if begun_in is not None and (begun_in / BEST).is_file() and not (folder / BEST).is_file():
                shutil.copy(begun_in / BEST, folder)
        if begun_in is not None and not (begun_in / "log.txt").is_file():
            begun_in = folder  # the checkpoint was moved, the log stayed
        return RunLog(folder if self.run.is_main else None, begun_in, first_epoch)

    def _claim(self) -> None:
        """Locks the folder for this process, by a lock that the system gives up when the process ends, however it ends.

        Then refuses a folder with the results of another run. A record lock, unlike flock's, is not inherited by the processes
        that load data, which may outlive a killed run.
        """
        lock = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        until = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except (BlockingIOError, PermissionError):
                if time.monotonic() > until:
                    owner = os.read(lock, 200).decode(errors="replace").strip() or "another process"
                    os.close(lock)
                    raise UserError(
                        f"{self.path}: {owner} is running in this folder; wait for it, or give another folder with --output_dir"
                    ) from None
                time.sleep(0.2)
            except OSError as error:
                logger.warning("%s: cannot be locked (%s): take care that no other run uses it", self.path, error.strerror)
                break
        self._lock = lock
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        check_free(self.config)
