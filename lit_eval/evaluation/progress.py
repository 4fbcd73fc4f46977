"""Shows the progress of an evaluation: a bar on a terminal, else a line now and then. All on standard error."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

QUIET_S = 30.0  # between two lines of a task in a log


class TaskProgress:
    """The progress of one task after another."""

    def __init__(self, show: bool = True) -> None:
        console = Console(stderr=True)
        self._show = show
        self._bar: Progress | None = None
        if show and console.is_terminal:
            columns = [TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[done]}")]
            self._bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self._title = ""
        self._id: TaskID | None = None
        self._line = 0.0

    @contextmanager
    def task(self, title: str) -> Iterator[None]:
        """Show a task while the block runs."""
        self._title, self._line = title, time.monotonic()
        if self._bar is None:
            yield
            return
        with self._bar:
            self._id = shown = self._bar.add_task(title, total=None, done="")
            try:
                yield
            finally:
                self._bar.remove_task(shown)
                self._id = None

    def __call__(self, done: int, total: int | None = None, unit: str = "batches") -> None:
        """`done` of `total` are done; None: it is not known how many there are."""
        text = f"{done:,} {unit}" if total is None else f"{done:,}/{total:,} {unit}"
        if self._bar is not None and self._id is not None:
            self._bar.update(self._id, completed=done, total=total, done=text)
        elif self._show and time.monotonic() - self._line > QUIET_S:
            self._line = time.monotonic()
            print(f"{self._title}: {text}", file=sys.stderr, flush=True)
