"""One log file per rank: events, warnings, uncaught exceptions of threads, stacks.

A line begins with the time in UTC, rank, host and process id. Tracebacks and stacks follow on lines of their own.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import sys
import tempfile
import threading
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from lit_files.run_files import LOGS
from pretrain.logs.messages import warn


class _Handler(logging.FileHandler):
    """Prints one warning if the log can no longer be written."""

    warned = False

    def handleError(self, record: logging.LogRecord) -> None:
        if not self.warned:
            self.warned = True
            warn(f"{self.baseFilename}: {sys.exc_info()[1]}; some lines are missing from it")


class RankLog:
    """Appends to RUN/logs/rank-00000.log.

    While it is open, it also receives warnings, uncaught exceptions of threads, which are still printed as before, and
    the stacks of a process that ends by a segmentation fault or an abort.

    Args:
        folder: the run folder.
        attempt: the id of this start of the run; see `pretrain/failure/first_failure.py`.

    Attributes:
        file: the open file, for faulthandler.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, attempt: str = "") -> None:
        self.run, self.rank, self.world_size, self.attempt = folder, rank, world_size, attempt
        self.host = socket.gethostname()
        self.path = folder / LOGS / f"rank-{rank:05d}.log"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._handler = _Handler(self.path, encoding="utf-8")
        except OSError as error:  # no reason not to train
            self.path = Path(tempfile.mkdtemp(prefix="llammlein-logs-")) / self.path.name
            warn(f"rank {rank}: no log can be written to {folder / LOGS} ({error}); it goes to {self.path}")
            self._handler = _Handler(self.path, encoding="utf-8")
        form = logging.Formatter(
            f"%(asctime)s.%(msecs)03dZ rank {rank} {self.host} {os.getpid()}: %(message)s", "%Y-%m-%dT%H:%M:%S"
        )
        form.converter = time.gmtime
        self._handler.setFormatter(form)
        # Outside the tree of loggers: nothing that a library sets there changes or repeats these lines.
        self._logger = logging.Logger(f"rank-{rank}")
        self._logger.addHandler(self._handler)
        assert self._handler.stream is not None
        self.file: TextIO = self._handler.stream
        self._old_faulthandler = faulthandler.is_enabled()
        faulthandler.enable(self.file)
        self._old_excepthook, self._excepthook = threading.excepthook, self._thread_failed
        threading.excepthook = self._excepthook
        self._old_showwarning, self._showwarning = warnings.showwarning, self._warned
        warnings.showwarning = self._showwarning
        self.event(f"attempt {attempt or '-'}: rank {rank} of {world_size} begins")

    def event(self, text: str) -> None:
        """Write one line (or more, with line breaks) at once."""
        self._logger.info("%s", text)

    def exception(self, error: BaseException) -> None:
        """Write an exception with its traceback."""
        self._logger.error("%s: %s", type(error).__name__, error, exc_info=error)

    def close(self) -> None:
        """Remove the hooks, and close the file."""
        if self._logger.disabled:
            return
        self._logger.disabled = True
        if threading.excepthook is self._excepthook:
            threading.excepthook = self._old_excepthook
        if warnings.showwarning is self._showwarning:
            warnings.showwarning = self._old_showwarning
        if self._old_faulthandler:
            faulthandler.enable(sys.__stderr__ or 2)
        else:
            faulthandler.disable()
        with contextlib.suppress(OSError):  # the disk is full
            self._handler.close()

    def _thread_failed(self, arguments: threading.ExceptHookArgs) -> None:
        if arguments.exc_value is not None and arguments.exc_type is not SystemExit:
            name = arguments.thread.name if arguments.thread is not None else "unknown"
            self.event(f"thread {name} ended by an exception")
            self.exception(arguments.exc_value)
        self._old_excepthook(arguments)

    def _warned(
        self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any, **named: Any
    ) -> None:
        self.event(f"{category.__name__}: {message} ({filename}:{lineno})")
        self._old_showwarning(message, category, filename, lineno, *more, **named)
