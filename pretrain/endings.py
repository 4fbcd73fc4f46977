"""The exceptions that end a run, and its exit status. They need no torch, so that the entry can catch them early."""

from __future__ import annotations

from pathlib import Path


class Mistake(ValueError):
    """A mistake of the user that every rank raises alike. Rank 0 prints it; all end with the same status."""


class RunFinished(Exception):
    """--resume names the last checkpoint of a finished run, that of `folder`. Every rank raises it."""

    def __init__(self, folder: Path, steps: int) -> None:
        super().__init__(f"{folder} is finished: all {steps} steps are done; nothing to do")
        self.folder = folder


class AgreedError(RuntimeError):
    """The run must end, at the same step on every rank. `sound`: the state is valid and can be saved first."""

    def __init__(self, message: str, *, sound: bool) -> None:
        super().__init__(message)
        self.sound = sound


class Interrupted(BaseException):
    """A signal arrived before there was anything to save. Like KeyboardInterrupt, not caught by `except Exception`."""

    def __init__(self, name: str, exit_code: int) -> None:
        super().__init__(f"ended by {name} before the first step")
        self.name, self.status = name, 130 if name == "SIGINT" else exit_code


def status_of(error: BaseException) -> int:
    """The exit status of a process that ends by an exception."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return error.status if isinstance(error, Interrupted) else 1
