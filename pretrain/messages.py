"""Lines to standard output and standard error that never end a run, also where the log's disk is full."""

from __future__ import annotations

import contextlib
import sys


def say(message: str) -> None:
    """Print to standard output at once. A full disk under a log, or a pipe that nobody reads, is no reason to stop."""
    with contextlib.suppress(OSError):
        print(message, flush=True)


def warn(message: str) -> None:
    """Print `warning: MESSAGE` to standard error at once, as `say` does."""
    with contextlib.suppress(OSError):
        print(f"warning: {message}", file=sys.stderr, flush=True)
