"""Calls a function in a separate process, which can be killed at any moment.

For long calls into native code: these respond to a signal only after they return, and may then report another error.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, TypeVar

from lit_files.platform import end_with_parent

T = TypeVar("T")
R = TypeVar("R")
ROOT = Path(__file__).resolve().parent.parent
CHILD = "import sys; sys.path[0] = sys.argv[1]; from lit_files.child import answer; answer()"
BATCH = 64  # items sent at once
POLL_S = 0.1


def in_child(function: Callable[[Iterator[T]], R], items: Iterable[T], hint: str = "") -> R:
    """Return function(items), computed by another process, to which the items are sent as they are read here.

    Ctrl-C, SIGTERM and an error while reading the items kill that process at once.

    Args:
        function: defined in a module of the project; picklable, like the items and what the function returns or raises.
        hint: appended to the error message if the process dies.

    Raises what the function raises, or ValueError if its process dies first, for example for lack of memory.
    """
    with tempfile.TemporaryFile() as answered:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT)], stdin=subprocess.PIPE, stdout=answered,
            process_group=0,  # a Ctrl-C in the terminal reaches only the parent
            preexec_fn=end_with_parent(),
        )  # fmt: skip
        try:
            assert process.stdin is not None
            _send(function, items, process.stdin)
            while process.returncode is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL_S)
        finally:
            process.kill()
            process.wait()
        answered.seek(0)
        try:
            failed, result = pickle.load(answered)
        except (EOFError, pickle.UnpicklingError):
            raise ValueError(
                f"a subprocess ended without a result (status {process.returncode}); it may have run out of "
                f"memory{hint}"
            ) from None
    if failed:
        raise result
    return result  # type: ignore[no-any-return]


def _send(function: Callable[[Iterator[T]], R], items: Iterable[T], pipe: IO[bytes]) -> None:
    try:
        for message in itertools.chain([function], _batches(items), [[]]):
            try:
                pickle.dump(message, pipe)
            except OSError:
                return  # the process has ended; its result says why
    finally:
        with contextlib.suppress(OSError):
            pipe.close()


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def answer() -> None:
    """In the other process: read a function and its items from standard input, write its result to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # for Windows, where `process_group` has no effect
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # so that what native code prints does not mix with the result
        source = sys.stdin.buffer
        function = pickle.load(source)
        result: tuple[bool, object]
        try:
            result = False, function(_received(source))
        except Exception as error:
            result = True, error
        pickle.dump(result, output)


def _received(source: IO[bytes]) -> Iterator[object]:
    while batch := pickle.load(source):
        yield from batch
