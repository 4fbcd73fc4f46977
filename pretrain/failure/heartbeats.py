"""Heartbeats: each rank reports its step, phase and place in the code; all of them together show which rank hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
SILENT_INTERVALS = 3
"""A rank whose heartbeat has not changed for longer is silent."""

ALARM = "alarm"  # key of the store
COLLECTIVES = os.path.dirname(dist.__file__)


@dataclass(frozen=True)
class Heartbeat:
    """The state of a rank, as it reports it.

    Attributes:
        idle_s: since its last progress.
        frame: the place of its training thread in the code.
        collective: that place is inside torch.distributed.
        alarmed: it knows of the alarm.
        ended: it has closed its watchdog, and sends no more.
        number: counts the heartbeats of this rank, so that each differs from the one before.
    """

    step: int
    phase: str
    idle_s: float
    frame: str
    collective: bool
    host: str
    alarmed: bool
    ended: bool
    number: int

    def __str__(self) -> str:
        return f"in step {self.step}, {self.phase}, without progress for {self.idle_s:.0f} s, at {self.frame}"


def parse_heartbeat(text: bytes) -> Heartbeat:
    return Heartbeat(**json.loads(text))


class HeartbeatExchange:
    """Posts this rank's heartbeats to the store, and reads those of the others and the alarm.

    Args:
        store: calls go over a connection of its own. None: one process, nothing is exchanged.
        interval_s: between two heartbeats.
        own: this rank's heartbeat now.

    Attributes:
        raised: this rank's own alarm.
        alarm: the one that all ranks follow.
        now: set, it starts the next exchange at once.
    """

    def __init__(
        self, store: dist.Store | None, rank: int, world_size: int, interval_s: float, own: Callable[[], Heartbeat]
    ) -> None:
        self.store, self.rank, self.interval_s, self._own = store, rank, interval_s, own
        self.others = [other for other in range(world_size) if other != rank]
        self.raised: str | None = None
        self.alarm: str | None = None
        self.now = threading.Event()
        self._store_failed = False
        self._began = self._round_at = time.monotonic()  # of the last complete exchange
        self._seen: dict[int, tuple[bytes, float]] = {}  # rank: its newest heartbeat, when that was first seen
        if store is not None:
            self._client: dist.Store = store.clone()  # type: ignore[attr-defined]  # missing in torch's stubs

    def run(self) -> str | None:
        """Exchange until this rank has ended (None), or the store fails (its error). Never returns if it hangs."""
        while True:
            heartbeat = self._own()
            try:
                self._client.set(f"rank-{self.rank}", json.dumps(vars(heartbeat)))
                if heartbeat.ended:
                    return None
                self._read()
            except RuntimeError as error:  # torch's DistError is one
                self._store_failed = not heartbeat.ended
                return str(error).splitlines()[0]
            self._round_at = time.monotonic()
            self.now.wait(self.interval_s)
            self.now.clear()

    def _read(self) -> None:
        here = [rank for rank in self.others if rank in self._seen or self._client.check([f"rank-{rank}"])]
        if here:
            for rank, text in zip(here, self._client.multi_get([f"rank-{rank}" for rank in here]), strict=True):
                if rank not in self._seen or self._seen[rank][0] != text:
                    self._seen[rank] = (text, time.monotonic())
        if self.raised is not None:
            self._client.compare_set(ALARM, "", self.raised)
        if self.alarm is None and self._client.check([ALARM]):
            self.alarm = self._client.get(ALARM).decode()

    def raise_alarm(self, text: str) -> None:
        """Raise the alarm on all ranks; where no other rank can be asked, on this one."""
        self.raised = text
        self.now.set()
        if self.store is None or self.store_silent_s() > 0:
            self.alarm = text

    def last(self, rank: int) -> Heartbeat | None:
        """The last heartbeat of another rank; None if there was none."""
        return parse_heartbeat(self._seen[rank][0]) if rank in self._seen else None

    def silent_ranks(self) -> list[tuple[int, float]]:
        """(rank, seconds since its last heartbeat) of ranks from which none came for more than 3 intervals.

        When the store itself is silent nothing is known of the others, except for its host: rank 0, unless torchrun's
        agent hosts it.
        """
        now, patience_s, silent = time.monotonic(), SILENT_INTERVALS * self.interval_s, []
        for rank in self.others:
            text, since = self._seen.get(rank, (None, self._began))
            if self._round_at - since > patience_s and not (text is not None and parse_heartbeat(text).ended):
                silent.append((rank, now - since))
        agent_hosts_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == str(True)
        if self.store_silent_s() > 0 and self.rank != 0 and not agent_hosts_store and 0 not in dict(silent):
            silent.insert(0, (0, now - self._round_at))
        return silent

    def store_silent_s(self) -> float:
        """Seconds for which the store has given no answer; 0.0 while it does."""
        waited_s = time.monotonic() - self._round_at
        if self.store is None or (not self._store_failed and waited_s <= SILENT_INTERVALS * self.interval_s):
            return 0.0
        return waited_s


def blame(heartbeats: Mapping[int, Heartbeat | None], silent: Mapping[int, float]) -> str:
    """The ranks that block the others, as far as can be known, and the place of the others.

    Args:
        heartbeats: the last of each rank; None for a rank that never sent one.
        silent: {rank: seconds} of the ranks that no longer answer.
    """
    known = {r: s for r, s in heartbeats.items() if s is not None and r not in silent and not s.ended}
    found, why, how = dict[int, Heartbeat](), "", "the others"
    if silent:
        parts = []
        for rank, seconds in silent.items():
            heartbeat = heartbeats[rank]
            last = f"; last seen on {heartbeat.host} {heartbeat}" if heartbeat is not None else ""
            parts.append(f"rank {rank} has sent no heartbeat for {seconds:.0f} s{last}")
        why = "; ".join(parts) + " (killed, suspended, its host down, or in C code that holds the interpreter's lock)"
    elif len({s.step for s in known.values()}) > 1:
        least = min(s.step for s in known.values())
        found = {r: s for r, s in known.items() if s.step == least}
        why = f"behind: {places(found)}"
    elif 0 < len(found := {r: s for r, s in known.items() if not s.collective}) < len(known):
        why, how = f"held up by {places(found)}", "waiting in torch.distributed"
    elif len(known) > 1:
        found, why = known, f"all are in the same step: {places(known)}"
    else:
        found, why = known, places(known)
    rest = {r: s for r, s in known.items() if r not in found}
    ended = {r: s for r, s in heartbeats.items() if s is not None and s.ended}
    return why + (f"; {how}: {places(rest)}" if rest else "") + (f"; ended already: {places(ended)}" if ended else "")


def places(heartbeats: Mapping[int, Heartbeat]) -> str:
    """The places of ranks; those in the same place are named together, smallest group first."""
    groups: dict[tuple[int, str, str, str], list[int]] = {}
    for rank, heartbeat in sorted(heartbeats.items()):
        groups.setdefault((heartbeat.step, heartbeat.phase, heartbeat.frame, heartbeat.host), []).append(rank)
    parts = []
    for (_, _, _, host), ranks in sorted(groups.items(), key=lambda item: len(item[1])):
        name = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {spans(ranks)}"
        parts.append(f"{name} on {host} {heartbeats[ranks[0]]}")
    return ", ".join(parts)


def spans(ranks: list[int]) -> str:
    """[0, 2, 3, 4] -> "0, 2-4"."""
    found: list[list[int]] = []
    for rank in ranks:
        if found and rank == found[-1][1] + 1:
            found[-1][1] = rank
        else:
            found.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def place(frame: FrameType | None) -> str:
    """The innermost Python frame of a thread, and the innermost outside of libraries."""
    if frame is None:
        return "no Python frame"
    inner, outer = spot(frame), frame
    while outer.f_code.co_filename.startswith(LIBRARIES) and outer.f_back is not None:
        outer = outer.f_back
    return inner if outer is frame else f"{inner}, from {spot(outer)}"


def spot(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def stacks() -> str:
    """The stacks of all threads. faulthandler keeps the interpreter's lock while it writes, so this goes to a local
    file first: a log that cannot be written to then holds up one thread only."""
    names = ", ".join(f"{thread.name} 0x{thread.ident or 0:016x}" for thread in threading.enumerate())
    with tempfile.TemporaryFile("w+", encoding="utf-8") as f:
        faulthandler.dump_traceback(f, all_threads=True)
        f.seek(0)
        return f"threads: {names}\n{f.read().rstrip()}"
