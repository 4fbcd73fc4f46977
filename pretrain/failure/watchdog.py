"""Detects a hung run, dumps every rank's stacks and names the stuck rank.

Each rank posts a heartbeat to the store and reads those of the others. A rank whose training thread has shown no
progress for `timeout_s` raises the alarm there. Every rank that still can then writes the stacks of its threads to its
log, and exits with status 76 after a message that names the stuck ranks. Clocks of hosts are never compared: the age of
a heartbeat is the time since the reader saw it change.

Two threads, since a call to a store whose host has stopped never returns: one talks to the store, the other decides.
C code that keeps the interpreter's lock stops both; then a timer of faulthandler writes the stacks and ends the process
with status 1.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from pretrain.failure.heartbeats import (
    COLLECTIVES,
    SILENT_INTERVALS,
    Heartbeat,
    HeartbeatExchange,
    blame,
    place,
    stacks,
)
from pretrain.failure.rank_log import RankLog

EXIT_HUNG = 76

GRACE_INTERVALS = 12
"""A run that hangs has ended, on every rank, `timeout_s` plus this many intervals after its last progress: one until
that is seen, up to four until the others know, four for the last heartbeats, three for files that are slow to write."""

RECENT_INTERVALS = 10
"""A suspension of this process that ended longer ago does not explain an error now."""


def control_store(attempt: str) -> dist.Store | None:
    """The process group's store, under a prefix of this attempt. None for one process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    return dist.PrefixStore(f"llammlein-{attempt}", _get_default_store())


def default_interval_s(timeout_s: float, world_size: int) -> float:
    """Seconds between two heartbeats: 20 in the time-out, and not too many for the one process with the store.

    That process answers `world_size` requests an interval, each for as many keys; one for 512 keys takes it 2 ms.
    """
    interval_s = 1 + world_size / 64
    return min(interval_s, timeout_s / 20) if timeout_s else interval_s


class Watchdog:
    """Watches the training thread, which must be the one that creates it.

    Args:
        store: where the ranks meet; calls go over a connection of its own. None: one process, nothing is exchanged.
        timeout_s: without progress, until the alarm. 0: no alarm is raised; heartbeats are exchanged all the same.
        interval_s: between two heartbeats. None: as `default_interval_s` says.
    """

    def __init__(
        self,
        store: dist.Store | None,
        rank: int,
        world_size: int,
        log: RankLog,
        timeout_s: float,
        interval_s: float | None = None,
    ) -> None:
        self.rank, self.log, self.timeout_s = rank, log, timeout_s
        self.interval_s = interval_s if interval_s is not None else default_interval_s(timeout_s, world_size)
        self.exchange = HeartbeatExchange(store, rank, world_size, self.interval_s, self._heartbeat)
        self.grace_s = GRACE_INTERVALS * self.interval_s
        self._training_thread = threading.get_ident()
        self._beat = (0, "set-up", time.monotonic())
        self._number = 0
        self._final: Heartbeat | None = None  # of the moment of the alarm
        self._watch_at: float | None = None  # when the watching thread ran last
        self._stopped = (0.0, 0.0)  # the last time in which it did not run: seconds, and when that ended
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        if store is not None:
            self._start(self._exchange, "llammlein-heartbeats")
        if timeout_s:
            self._arm()
            self._start(self._watch, "llammlein-watchdog")

    def _start(self, work: Callable[[], None], name: str) -> None:
        self._threads.append(threading.Thread(target=work, name=name, daemon=True))
        self._threads[-1].start()

    def beat(self, step: int, phase: str) -> None:
        """Report progress: at each step, validation batch and save. Takes about 0.1 microseconds."""
        self._beat = (step, phase, time.monotonic())

    @property
    def step(self) -> int:
        """Of the last beat."""
        return self._beat[0]

    def stopped_s(self) -> float:
        """Seconds for which this process did not run, until just now: it was stopped, or its host was. 0.0 if that was
        less than 3 intervals, or ended more than 10 ago. Not known without a time-out."""
        now, watch_at = time.monotonic(), self._watch_at
        if watch_at is not None and self._is_stop(now - watch_at):
            return now - watch_at
        seconds, until = self._stopped
        return seconds if now - until <= RECENT_INTERVALS * self.interval_s else 0.0

    def _is_stop(self, seconds: float) -> bool:
        return seconds - self.interval_s > SILENT_INTERVALS * self.interval_s

    def stand_by(self) -> None:
        """After an alarm this does not return, since the process is about to end: errors of collectives that fail
        because the first ranks have ended are not reported."""
        while self.timeout_s and (self.exchange.alarm is not None or self.exchange.raised is not None):
            time.sleep(self.interval_s)

    def close(self) -> None:
        """End the threads and the timer, and announce to the other ranks that this one is done. Call it before the last
        barrier: torch prints warnings if the store's host has ended."""
        self._closing.set()
        self.exchange.now.set()
        for thread in self._threads:
            thread.join(timeout=SILENT_INTERVALS * self.interval_s)  # one that waits for a dead store is left behind
        if self.timeout_s:
            faulthandler.cancel_dump_traceback_later()

    def _heartbeat(self) -> Heartbeat:
        """This rank now; after an alarm as it was then, since its collectives fail when the first ranks end."""
        self._number += 1
        if self._final is not None:
            return dataclasses.replace(self._final, number=self._number)
        step, phase, at = self._beat
        frame = sys._current_frames().get(self._training_thread)
        heartbeat = Heartbeat(
            step=step,
            phase=phase,
            idle_s=time.monotonic() - at,
            frame=place(frame),
            collective=frame is not None and frame.f_code.co_filename.startswith(COLLECTIVES),
            host=self.log.host,
            alarmed=self.exchange.alarm is not None,
            ended=self._closing.is_set(),
            number=self._number,
        )
        if heartbeat.alarmed:
            self._final = heartbeat
        return heartbeat

    def _exchange(self) -> None:
        """The thread that talks to the store."""
        error = self.exchange.run()
        if error is not None and not self._closing.is_set():
            self.log.event(f"the store is gone ({error}): its process has ended, or the network failed")

    def _arm(self) -> None:
        """Let faulthandler end the process unless this is called again in time."""
        faulthandler.dump_traceback_later(self.timeout_s + self.grace_s, exit=True, file=self.log.file)

    def _watch(self) -> None:
        """The thread that raises the alarm and ends the process."""
        self._watch_at = time.monotonic()
        while not self._closing.wait(self.interval_s):
            self._arm()
            now = time.monotonic()
            if self._is_stop(now - self._watch_at):
                self._stopped = (now - self._watch_at, now)
            self._watch_at = now
            exchange, idle_s = self.exchange, time.monotonic() - self._beat[2]
            if exchange.alarm is None and idle_s > self.timeout_s:
                exchange.raise_alarm(f"rank {self.rank} made no progress for {idle_s:.0f} s")
            if exchange.alarm is not None:
                self._end(exchange.alarm)

    def _end(self, alarm: str) -> NoReturn:
        """Write the stacks, wait for the last heartbeats, name the stuck rank, end the process."""
        until = time.monotonic() + SILENT_INTERVALS * self.interval_s
        if self.rank == 0:
            until += self.interval_s  # the store may end with this process
        self.exchange.now.set()
        try:
            dump = stacks()
        except OSError as error:
            dump = f"the stacks could not be dumped: {error}"
        in_background(lambda: self.log.event(f"alarm: {alarm}; this rank is {self._heartbeat()}\n{dump}"))
        time.sleep(max(0.0, until - time.monotonic()))
        heartbeats = {r: self.exchange.last(r) for r in self.exchange.others} | {self.rank: self._heartbeat()}
        silent = {r: s for r, s in self.exchange.silent_ranks() if (last := heartbeats[r]) is None or not last.alarmed}
        text = f"error: the run hangs: {alarm} (--guard.hang_timeout_s {self.timeout_s:g}); {blame(heartbeats, silent)}"
        if (silent_s := self.exchange.store_silent_s()) > 0:
            text += f"; the store has given no answer for {silent_s:.0f} s, so this is the last known state"
        if (stopped_s := self.stopped_s()) > 0:
            text += f"; this process itself did not run for {stopped_s:.0f} s"
        text += f"; the stacks are in {self.log.path.parent}"
        printed = in_background(lambda: print(f"rank {self.rank}: {text}", file=sys.stderr, flush=True))
        logged = in_background(lambda: self.log.event(text))
        printed.join(self.interval_s)
        logged.join(2 * self.interval_s)
        os._exit(EXIT_HUNG)


def in_background(write: Callable[[], None]) -> threading.Thread:
    """Write in a thread: the file may be blocked by the cause of the hang."""
    thread = threading.Thread(target=write, daemon=True)
    thread.start()
    return thread
