"""Heartbeats: each rank reports its step, phase and place in the code; all of them together show which rank hangs."""

from __future__ import annotations

import faulthandler
import json
import os
import sysconfig
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from types import FrameType

import torch.distributed as dist

LIBRARIES = tuple(sysconfig.get_paths()[name] for name in ("stdlib", "purelib", "platlib"))
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
        why = "; ".join(parts) + " (killed, stopped, its host gone, or in C code that keeps the interpreter's lock)"
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
    with tempfile.TemporaryFile("w+") as f:
        faulthandler.dump_traceback(f, all_threads=True)
        f.seek(0)
        return f"threads: {names}\n{f.read().rstrip()}"
