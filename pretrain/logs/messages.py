"""Prints to standard output and standard error without ever ending the run, even when the log's disk is full."""

from __future__ import annotations

import contextlib
import sys
from typing import Any


def say(message: str) -> None:
    """Print to standard output at once. A full disk or a closed pipe does not end the run."""
    with contextlib.suppress(OSError):
        print(message, flush=True)


def warn(message: str) -> None:
    """Print `warning: MESSAGE` to standard error at once, as `say` does."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)


class Unfailing:
    """A text stream whose writes never raise OSError: for all of a process's output, including that of libraries."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
