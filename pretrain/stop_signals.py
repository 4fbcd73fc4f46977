"""Handles the signals that stop a run. Imports no torch, so that handlers are installed before torch is."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from types import FrameType
from typing import Any

from lit_files.platform import STOP_SIGNALS
from lit_files.signals import after_imports
from pretrain.endings import Interrupted
from pretrain.launch import is_first_process

RELAYED_S = 2.0
"""torchrun relays Ctrl-C to ranks that already got it from the terminal; a later one counts as a second Ctrl-C."""


class StopSignals:
    """Handles the signals that stop a run; a context manager around the entire run.

    Before training starts, a signal raises Interrupted. From then on it is kept until the ranks agree on a step to stop
    at, and a second SIGINT exits immediately.

    Attributes:
        received: the name of the first signal.
        kept: whether training has started.
        exit_code: exit code for Interrupted by a signal other than SIGINT.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.kept, self.exit_code = False, 0
        self._received_at = 0.0
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._old = {s: signal.signal(s, after_imports(self._receive)) for s in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is None:
            self.received, self._received_at = signal.Signals(number).name, now
            if not self.kept:
                raise Interrupted(self.received, self.exit_code)
            if number == signal.SIGINT:
                say("Ctrl-C: saving after this step, then ending; press it again to end at once, without saving")
        elif number == signal.SIGINT and now - self._received_at > RELAYED_S * ("TORCHELASTIC_RUN_ID" in os.environ):
            say("Ctrl-C again: ending without saving")
            os._exit(130)


def say(text: str) -> None:
    """Write a line from a signal handler, where print() may interrupt another print(); rank 0 only."""
    if is_first_process():
        with contextlib.suppress(OSError):
            os.write(2, f"\n{text}\n".encode())
