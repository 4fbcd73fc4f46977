"""Names the rank that failed first: the root cause among all the errors that follow from it.

The failure is kept in RUN/logs/first_failure.json, which one rank alone can create, and under a key of the store, which
one alone can set. The file decides; the store is for a file system that is full or not shared. Either may be out of
reach: the store ends with its host, rank 0.

A failure carries the attempt, a random id of this start of the run. Rank 0 draws it in `begin_attempt`, after it has
removed an earlier attempt's file; the others can't report before they have it. A report from a straggler of an earlier
attempt carries another id, and is ignored.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist

from lit_files.publish import create_json
from lit_files.run_files import LOGS
from pretrain.checkpoint.retention import remove
from pretrain.failure.heartbeats import SILENT_INTERVALS
from pretrain.failure.rank_log import RankLog
from pretrain.failure.watchdog import Watchdog
from pretrain.logs.messages import warn

T = TypeVar("T")

FILE = "first_failure.json"
KEY = "first_failure"
STORE_S = 3.0  # a store whose host has stopped would block the caller forever
# Parts of the messages of gloo, NCCL and the store when another process is gone. gloo raises plain RuntimeError.
LOST = (
    "gloo/transport",
    "closed by peer",
    "Connection closed",
    "Connection reset",
    "Broken pipe",
    "Timed out waiting",
    "ncclRemoteError",
    "communicator was aborted",
    "collective operation timeout",
)
OWN_FAULT = ("unhandled cuda error", "CUDA error")  # in an error of NCCL: of this rank's own device


@dataclass(frozen=True)
class Failure:
    """The first failure of an attempt. Of a rank that another found silent, `step` is the last one it reported,
    and `seen_by` is the rank that found it; else `seen_by` is the rank itself."""

    attempt: str
    rank: int
    host: str
    step: int
    error: str
    message: str
    time: str
    seen_by: int

    def __str__(self) -> str:
        first_line = self.message.strip().partition("\n")[0]
        return f"host {self.host}, step {self.step}, {self.error}: {first_line}"


def begin_attempt(run: Path) -> str:
    """Rank 0, before any other may report: remove an earlier attempt's failure. Returns the name of this attempt."""
    path = run / LOGS / FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(path)
    except OSError as error:
        warn(f"{path} cannot be used ({error}); the first failure is not recorded there")
    return secrets.token_hex(8)


def report_failure(error: BaseException, step: int, watchdog: Watchdog) -> Failure:
    """Write an exception that ends this rank to its log, and name the rank that failed first, there and on standard
    error. Called by the training thread. Every rank that calls this names the same one.

    A lost connection follows from another rank's failure: up to 5 intervals of the watchdog are spent waiting for the
    other's report, or until a rank is found silent. Then the silent rank is named, or this one if it was itself
    suspended for a while and the others have given it up.
    """
    log, lost = watchdog.log, lost_connection(error)
    watchdog.beat(step, f"failed, {type(error).__name__}")
    log.exception(error)
    watchdog.stand_by()
    first = cause_elsewhere(watchdog) if lost else None
    if first is None:
        kind, message = type(error).__name__, str(error)
        first = claim(Failure(log.attempt, log.rank, log.host, step, kind, message, utc_now(), log.rank), watchdog)
    text = f"rank {first.rank} failed first ({first})"
    if first.rank != log.rank:
        text = f"rank {log.rank} stopped because {text}"
        if not lost:
            text += f"; it also has an error of its own: {type(error).__name__}: {error}"
    log.event(text)
    print(f"error: {text}; see {log.path.parent}", file=sys.stderr, flush=True)
    return first


def lost_connection(error: BaseException) -> bool:
    """Whether an exception, or one of its causes, means that another process is gone."""
    link: BaseException | None = error
    while link is not None:
        text = str(link)
        lost = isinstance(link, dist.DistError) or (isinstance(link, RuntimeError) and any(t in text for t in LOST))
        if lost and not any(t in text for t in OWN_FAULT):
            return True
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return False


def cause_elsewhere(watchdog: Watchdog) -> Failure | None:
    """The failure that another rank has reported, or of a silent rank; None if there is neither in time."""
    until = time.monotonic() + (SILENT_INTERVALS + 2) * watchdog.interval_s
    while time.monotonic() < until:
        if (reported := read_failure(watchdog.log)) is not None:
            return reported
        if (stopped_s := watchdog.stopped_s()) > 0:
            return claim(of_stopped(stopped_s, watchdog), watchdog)
        if silent := watchdog.exchange.silent_ranks():
            return claim(of_silent(silent, watchdog), watchdog)
        time.sleep(watchdog.interval_s / 4)
    return None


def of_silent(silent: list[tuple[int, float]], watchdog: Watchdog) -> Failure:
    """The failure of a rank that could not report it."""
    rank, seconds = silent[0]
    heartbeat, log = watchdog.exchange.last(rank), watchdog.log
    also = f", nor from ranks {', '.join(str(r) for r, _ in silent[1:])}" if silent[1:] else ""
    message = f"no heartbeat for {seconds:.1f} s{also}: it was killed or suspended, or its host is down"
    host, step = (heartbeat.host, heartbeat.step) if heartbeat is not None else ("unknown", 0)
    return Failure(log.attempt, rank, host, step, "Silent", message, utc_now(), log.rank)


def of_stopped(seconds: float, watchdog: Watchdog) -> Failure:
    """The failure of this rank, which the others took for a silent one."""
    log = watchdog.log
    message = f"this process itself did not run for {seconds:.1f} s: it or its host was suspended"
    return Failure(log.attempt, log.rank, log.host, watchdog.step, "Silent", message, utc_now(), log.rank)


def claim(failure: Failure, watchdog: Watchdog) -> Failure:
    """Record the failure as the first, unless there is one already. Returns the recorded one."""
    text = json.dumps(vars(failure), indent=1)
    store = watchdog.exchange.store if watchdog.exchange.store_silent_s() == 0 else None
    kept = in_time(lambda: store.compare_set(KEY, "", text).decode()) if store is not None else None
    log = watchdog.log
    try:
        return publish(log.run / LOGS / FILE, to_failure(kept, log.attempt) or failure)
    except OSError as error:
        log.event(f"{FILE} could not be written: {error}")
        return to_failure(kept, log.attempt) or failure


def publish(path: Path, failure: Failure) -> Failure:
    """Create the file, unless one of this attempt exists; then read that."""
    while not create_json(path, vars(failure)):
        with contextlib.suppress(FileNotFoundError):  # another rank has removed it for the same reason
            earlier = to_failure(path.read_text(encoding="utf-8"), failure.attempt)
            if earlier is not None:
                return earlier
            path.unlink()  # written by an attempt that should be over
    return failure


def read_failure(log: RankLog) -> Failure | None:
    """The first failure of this attempt, if its file is there."""
    with contextlib.suppress(OSError):
        return to_failure((log.run / LOGS / FILE).read_text(encoding="utf-8"), log.attempt)
    return None


def in_time(ask: Callable[[], T]) -> T | None:
    """The store's answer; None if there is none in time."""
    answers: list[T] = []

    def work() -> None:
        with contextlib.suppress(RuntimeError):  # the store is gone; the file remains
            answers.append(ask())

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(STORE_S)
    return answers[0] if answers else None


def to_failure(text: str | None, attempt: str) -> Failure | None:
    """A failure from its JSON; None for another attempt's, or none."""
    try:
        facts = json.loads(text) if text else None
        return Failure(**facts) if facts is not None and facts["attempt"] == attempt else None
    except (ValueError, TypeError, KeyError):  # damaged
        return None


def utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
