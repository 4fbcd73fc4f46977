"""Sends a signal again later where the exception that its handler raises would be lost or do damage."""

from __future__ import annotations

import functools
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

from lit_files.platform import signal_main_thread

AGAIN_S = 0.05  # until a signal is sent again

Handler = Callable[[int, FrameType | None], Any]
_waiting: set[int] = set()


def send_again(number: int) -> None:
    """Send a signal to the main thread after AGAIN_S; only once, however often this is called until then."""
    if number in _waiting:
        return

    def send() -> None:
        _waiting.discard(number)
        signal_main_thread(signal.Signals(number))

    timer = threading.Timer(AGAIN_S, send)
    timer.daemon = True
    _waiting.add(number)  # before the start: the timer removes it
    try:
        timer.start()
    except RuntimeError:  # Python is shutting down and starts no threads
        _waiting.discard(number)


def after_imports(handler: Handler) -> Handler:
    """Wrap a signal handler so that it waits until the main thread has finished importing: an exception in the middle
    of an import can abort the process (torch, in C++) or turn into another one (an ImportError of numpy's)."""

    @functools.wraps(handler)
    def handle(number: int, frame: FrameType | None) -> None:
        if _importing(frame):
            send_again(number)
        else:
            handler(number, frame)

    return handle


def _importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def repeat_ignored_signals() -> None:
    """Send a signal again whose exception Python ignored, with a traceback, since a finalizer (`__del__`) or a callback
    of the garbage collector happened to be running."""
    usual = sys.unraisablehook
    sent: dict[type[BaseException], signal.Signals] = {
        SystemExit: signal.SIGTERM,
        KeyboardInterrupt: signal.SIGINT,
    }

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        if ignored.exc_type in sent:
            send_again(sent[ignored.exc_type])  # at once, its exception would be ignored again
        else:
            usual(ignored)

    sys.unraisablehook = hook
