"""The ranks of a preflight: each does a piece of work, and learns the outcome on every rank."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from pretrain.fabric import Fabric

T = TypeVar("T")

POLL_S = 0.2
GRACE_S = 10.0  # for the other ranks to finish, after one has failed in work that they share
WAITING = "waits for the other ranks"
FAULT_LENGTH = 400  # characters of an exception's message that are reported


@dataclass
class Outcome(Generic[T]):
    """The outcome of a piece of work on one rank: its result, or its error."""

    rank: int
    host: str
    fault: str | None
    result: T | None

    @property
    def who(self) -> str:
        return f"rank {self.rank} (host {self.host})"


class RankLostError(RuntimeError):
    """A rank no longer answers: no collective can succeed any more."""


class Ranks:
    """The processes that were launched, or this one alone (`fabric` None or of one device).

    They use their own gloo group, so that verdicts are exchanged even where NCCL does not work, and while a rank waits
    in training's group for another that has failed.
    """

    def __init__(self, fabric: Fabric | None, timeout: timedelta) -> None:
        self.fabric, self.host = fabric, socket.gethostname()
        several = dist.is_initialized() and dist.get_world_size() > 1
        self.rank = dist.get_rank() if several else 0
        self.world_size = dist.get_world_size() if several else 1
        self.group = dist.new_group(backend="gloo", timeout=timeout) if several else None

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, on all ranks. Raises RankLostError."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        try:
            dist.all_gather_object(values, value, group=self.group)
        except RuntimeError as error:
            raise RankLostError(f"lost the connection to a rank: {str(error)[:FAULT_LENGTH]}") from error
        return values

    def together(self, work: Callable[[], T]) -> list[Outcome[T]]:
        """Do work on every rank that needs no other rank."""
        return self.gather(self._outcome(work))

    def watched(self, work: Callable[[], T], give_up: Callable[[list[Outcome[Any]]], None]) -> list[Outcome[T]]:
        """Do work on every rank in which ranks wait for each other.

        If one raises, others may wait for it till their timeout. A thread on each rank therefore watches; after
        GRACE_S it calls `give_up` with the outcomes so far, on every rank, which must end the process.
        """
        if self.group is None:
            return self.together(work)
        ended: list[Outcome[T]] = []
        watch = threading.Thread(target=self._watch, args=(ended, give_up), name="llammlein-preflight", daemon=True)
        watch.start()
        ended.append(self._outcome(work))
        watch.join()
        return self.gather(ended[0])

    def failed(self, fault: str) -> Outcome[Any]:
        """The outcome of work that failed on this rank."""
        return Outcome(self.rank, self.host, fault, None)

    def _outcome(self, work: Callable[[], T]) -> Outcome[T]:
        try:
            return Outcome(self.rank, self.host, None, work())
        except Exception as error:
            return self.failed(describe(error))

    def _watch(self, ended: list[Outcome[Any]], give_up: Callable[[list[Outcome[Any]]], None]) -> None:
        waiting = self.failed(WAITING)
        rounds = 0  # since a rank failed; the same on all ranks, so that they give up in the same round
        try:
            while True:
                # A long step is not interrupted; watching it costs one small exchange a round.
                outcomes = self.gather((ended or [waiting])[0])
                waits = [outcome.fault == WAITING for outcome in outcomes]
                if not any(waits):
                    return
                rounds += any(o.fault is not None and not w for o, w in zip(outcomes, waits, strict=True))
                if rounds * POLL_S > GRACE_S:
                    break
                time.sleep(POLL_S)
        except RankLostError as error:
            give_up([self.failed(str(error))])
            return
        give_up([o for o, w in zip(outcomes, waits, strict=True) if o.fault is not None and not w])


def describe(error: BaseException) -> str:
    """An exception in a line or two: the type is named, except for mistakes of the user."""
    text = " ".join(str(error).split())[:FAULT_LENGTH]
    return text if isinstance(error, (ValueError, FileNotFoundError)) else f"{type(error).__name__}: {text}"
