"""Calls a function in a process of its own, which can be ended at any moment.

For long calls of native code: they heed a signal only once they are done, and may then report another error.
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

    The process is ended at once by Ctrl-C, SIGTERM, and an error while the items are read.

    Args:
        function: defined in a module of the project; picklable, like the items and what the function returns or raises.
        hint: appended to the error of a process that ended before its function.

    Raises what the function raises; ValueError if its process ended before that, killed for lack of memory for example.
    """
    with tempfile.TemporaryFile() as answered:
        process = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(ROOT)], stdin=subprocess.PIPE, stdout=answered,
            process_group=0,  # Ctrl-C reaches only this process
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
                f"a process of this command ended without a result (status {process.returncode}), perhaps for lack of "
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
                return  # the process has ended; its answer says why
    finally:
        with contextlib.suppress(OSError):
            pipe.close()


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, BATCH)):
        yield batch


def answer() -> None:
    """The other process: read a function and its items from standard input, write the result to standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # on Windows, which has no process groups of this kind
    with os.fdopen(os.dup(1), "wb") as output:
        os.dup2(2, 1)  # what native code prints is no result
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
