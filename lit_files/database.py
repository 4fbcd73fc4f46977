"""Opens DuckDB with bounded memory, for tables larger than memory."""

from __future__ import annotations

import contextlib
import functools
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from lit_files.progress import TaskProgress

MEMORY_BYTES = 10**9
POLL_S = 0.25


@contextlib.contextmanager
def open_database(
    file: Path | None = None,
    *,
    folder: Path | None = None,
    memory_bytes: int = MEMORY_BYTES,
    keep_order: bool = True,
    hint: str = "",
) -> Iterator[Any]:
    """A DuckDB connection, in memory or to a file.

    Args:
        folder: parent of a temporary folder for spilled data; default: the system's.
        memory_bytes: DuckDB's limit; the process needs about 200 MB more.
        keep_order: preserve the order in which rows were read; False saves memory, but use ORDER BY.
        hint: appended to DuckDB's error messages (out of memory or disk, an unreadable file).

    Raises ValueError if duckdb is not installed, and for each error of DuckDB.
    """
    try:
        import duckdb
    except ImportError as error:
        raise ValueError("this needs the package duckdb: pip install 'llammlein[data]'") from error
    with tempfile.TemporaryDirectory(dir=folder, prefix=".duckdb-") as spill:
        settings: dict[str, Any] = {
            "memory_limit": f"{memory_bytes}B", "temp_directory": spill, "preserve_insertion_order": keep_order,
        }  # fmt: skip
        connect = functools.partial(duckdb.connect, ":memory:" if file is None else str(file), config=settings)
        try:
            with connect() as database, _signals_end_statements(database):
                database.execute("SET enable_progress_bar = true")  # otherwise `showing` is told nothing
                database.execute("SET enable_progress_bar_print = false")
                yield database
        except duckdb.Error as error:
            raise ValueError(
                f"DuckDB failed with {memory_bytes >> 20} MB of memory, temporary files in {spill}: {error}{hint}"
            ) from error


@contextlib.contextmanager
def _signals_end_statements(database: Any) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the block as they end other code. When a signal handler raises, DuckDB first waits for
    its other threads, which may run the whole statement, unless it is interrupted; and it raises another exception
    instead, which does not name the signal."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual: dict[int, Callable[[int, FrameType | None], Any]] = {}
    raised: list[BaseException] = []

    def handle(number: int, frame: FrameType | None) -> None:
        try:
            usual[number](number, frame)
        except BaseException as error:
            raised.append(error)
            database.interrupt()
            raise

    for number in (signal.SIGINT, signal.SIGTERM):
        if callable(handler := signal.getsignal(number)):
            usual[number] = handler
            signal.signal(number, handle)
    try:
        yield
    except Exception:
        if raised:
            raise raised[-1] from None
        raise
    finally:
        for kept, handler in usual.items():
            signal.signal(kept, handler)


@contextlib.contextmanager
def showing(database: Any, title: str) -> Iterator[None]:
    """Show the progress of each statement that the block executes; DuckDB estimates it."""
    ended = threading.Event()

    def follow() -> None:
        progress = TaskProgress()
        while not ended.is_set():
            last = 0.0
            with progress.task(title):
                # -1: no statement is running, or its progress is unknown. A smaller number is another statement's.
                while not ended.wait(POLL_S) and (percent := database.query_progress()) >= last:
                    progress(percent, 100, "%")
                    last = percent

    thread = threading.Thread(target=follow, name="llammlein-database", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def quoted(path: Path) -> str:
    """A path as a string literal in SQL."""
    return "'" + str(path).replace("'", "''") + "'"
