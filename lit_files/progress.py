"""Shows the progress of work that takes more than some seconds: a bar on a terminal, else a line now and then, with the
time left. All on standard error.
"""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
APPEARS_S = 1.0  # shorter work shows nothing
QUIET_S = 30.0  # between two lines in a log


class TaskProgress:
    """The progress of one task after another.

    Args:
        clock: returns seconds; replaced in tests.
    """

    def __init__(self, show: bool = True, clock: Callable[[], float] = time.monotonic) -> None:
        self._show, self._clock = show, clock
        self._title = ""
        self._bar: Any = None  # of rich, which is imported only once there is something to show
        self._began = self._line = 0.0
        self._first: float | None = None

    @contextmanager
    def task(self, title: str) -> Iterator[None]:
        """Show a task while the block runs."""
        self._title, self._began, self._first = title, self._clock(), None
        self._line = self._began
        try:
            yield
        finally:
            if self._bar is not None:
                self._bar.stop()
                atexit.unregister(self._bar.stop)
                self._bar = None

    def __call__(self, done: float, total: float | None = None, unit: str = "batches") -> None:
        """`done` of `total` are done; None: it is not known how many there are. What was done before does not count
        for the time left."""
        if self._first is None:
            self._first = done
        now = self._clock()
        if not self._show or now - self._began < APPEARS_S:
            return
        text = f"{done:,.0f} {unit}" if total is None else f"{done:,.0f}/{total:,.0f} {unit}"
        if sys.stderr.isatty():
            if self._bar is None:
                self._bar = make_bar(self._title)
            self._bar.update(
                self._bar.task_ids[0], completed=done, total=total, done=text, left=self._left(done, total)
            )
        elif now - self._line > QUIET_S:
            self._line = now
            print(": ".join([self._title, ", ".join(filter(None, [text, self._left(done, total)]))]), file=sys.stderr)
            sys.stderr.flush()

    def _left(self, done: float, total: float | None) -> str:
        assert self._first is not None
        if total is None or done <= self._first or done >= total:
            return ""
        seconds = (self._clock() - self._began) / (done - self._first) * (total - done)
        return f"{timedelta(seconds=round(seconds))} left"


def make_bar(title: str) -> Any:
    """A started bar of rich, which honours NO_COLOR, with one task."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    columns = [TextColumn("[bold]{task.description}"), BarColumn(), TextColumn("{task.fields[done]}")]
    bar = Progress(*columns, TextColumn("{task.fields[left]}"), console=Console(stderr=True), transient=True)
    bar.add_task(title, total=None, done="", left="")
    atexit.register(bar.stop)  # shows the cursor again
    bar.start()
    return bar


def track(
    items: Iterable[T],
    title: str,
    unit: str,
    total: float | None = None,
    size: Callable[[T], float] = lambda _: 1,
    show: bool = True,
) -> Iterator[T]:
    """Iterate over `items`, and show the progress once it takes long.

    Args:
        total: the sum of the sizes; None: the number of items if they have one, else unknown.
        size: of an item, in `unit`.
    """
    if total is None and isinstance(items, Sized):
        total = len(items)
    progress, done = TaskProgress(show), 0.0
    with progress.task(title):
        for item in items:
            progress(done, total, unit)
            yield item
            done += size(item)
            del item  # before the next one is made: it may be large
        progress(done, total, unit)
