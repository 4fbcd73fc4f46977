"""SIGKILL of training on several ranks: at each call that changes the run folder, at random moments, while resuming.

After each kill, before any repair, every visible checkpoint can be read and equals that of the undisturbed run after
the same step, and the record is exact up to the newest one. Then `--resume auto` runs to the end: final parameters,
optimizer state, record and metrics equal those of the undisturbed run. When only one rank is killed, the others exit on
their own and publish no checkpoint that it had not finished.

The ranks are forked (tests/harness/forked_ranks.py), so a kill, its checks and the rerun take a second or two on an
otherwise idle machine; a test shows that this equals the real command. docs/reliability.md has the numbers.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import shutil
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from killed_runs import STEPS, Bench, Setting, Whole, check, rows
from rank_server import Answer
from running import command
from watched_calls import PHASES, Call

# Half of the 16 combinations, which cover every combination of any three choices.
SETTINGS = [
    Setting(2, "ddp", "full", False),
    Setting(2, "ddp", "sharded", True),
    Setting(2, "fsdp", "full", True),
    Setting(2, "fsdp", "sharded", False),
    Setting(4, "ddp", "full", True),
    Setting(4, "ddp", "sharded", False),
    Setting(4, "fsdp", "full", False),
    Setting(4, "fsdp", "sharded", True),
]
# Minimum number of random kills in each phase.
LEAST = {"step": 10, "validation": 3, "record": 3, "saving": 10, "publishing": 3, "retention": 3, "compaction": 3}
MOMENTS = 50
SYSTEM_CALLS = {
    "rename": ("rename", "renameat", "renameat2", "link", "linkat"),
    "sync": ("fsync", "fdatasync"),
    "write": ("write", "writev", "pwrite64", "pwritev", "sendfile", "copy_file_range", "truncate", "ftruncate"),
    "delete": ("unlink", "unlinkat", "rmdir"),
    "mkdir": ("mkdir", "mkdirat"),
}


class Point(NamedTuple):
    """Where to kill: before a call of a rank, or halfway through it."""

    rank: int
    call: Call
    half: bool
    everyone: bool

    def request(self) -> dict[str, Any]:
        return {"rank": self.rank, "call": list(self.call[:3]), "half": self.half, "everyone": self.everyone}


def points(whole: Whole, writes: int, seed: int) -> list[Point]:
    """Each rename, sync, deletion and new folder after the first step, by rank 0 and one other rank, and `writes` of
    the writes to each file, half of them halfway through.

    Each call that publishes or deletes a checkpoint, and with two ranks each rename and sync, is tried with a kill of
    the rank and with one of all ranks; each other call with one of the two.
    """
    rng, world_size = random.Random(seed), len(whole.answer.calls)
    found = []
    for rank in (0, rng.randrange(1, world_size)):
        of_file: dict[str, list[Call]] = defaultdict(list)
        for call in (c for c in whole.answer.calls[rank] if c.phase != "begin"):
            if call.kind == "write":
                of_file[call.name].append(call)
            elif (call.kind in ("rename", "sync") and world_size == 2) or call.phase in ("publishing", "retention"):
                found += [Point(rank, call, False, everyone) for everyone in (False, True)]
            else:
                found.append(Point(rank, call, False, rng.random() < 0.5))
        for group in of_file.values():
            chosen = rng.sample(group, min(writes, len(group)))
            found += [Point(rank, c, rng.random() < 0.5, rng.random() < 0.5) for c in chosen]
    return found


def starting_points(bench: Bench, setting: Setting, begun: Path | None, changes: dict[str, object]) -> list[Point]:
    """Each call before the first step of a run that resumes a copy of `begun`, on rank 0 and on rank 1; each write
    also halfway through.
    """
    run = bench.folder / "counted"
    if begun is not None:
        shutil.copytree(begun, run, symlinks=True)
    answer = bench.end(setting, run, **changes)
    shutil.rmtree(run)
    found = []
    for rank in (0, 1):
        for i, call in enumerate(c for c in answer.calls[rank] if c.phase == "begin"):
            found.append(Point(rank, call, False, everyone=i % 2 == 0))
            if call.kind == "write":
                found.append(Point(rank, call, True, everyone=i % 2 == 1))
    return found


def some_of(every: int) -> str:
    return "" if every == 1 else f", one in {every}"


class Tally:
    """Counts kills by place, and reports them as a row of the table in docs/reliability.md."""

    def __init__(self, what: str) -> None:
        self.what, self.phases, self.kinds, self.missed = what, Counter[str](), Counter[str](), 0
        self.survived_s, self.faults, self.began = 0.0, list[str](), time.monotonic()

    def add(self, bench: Bench, setting: Setting, about: object, **request: Any) -> Answer | None:
        """Count one kill; a fault is kept and reported with the others."""
        try:
            answer = bench.kill(setting, **request)
        except Exception as error:
            self.faults.append(f"{about}: {type(error).__name__}: {str(error)[:3000]}")
            print(f"\n{self.what}: {self.faults[-1]}", flush=True)  # immediately: the rest may take an hour
            assert len(self.faults) < 10, "\n".join(self.faults)
            return None
        if not answer.killed:
            self.missed += 1
            return None
        self.phases[answer.phase] += 1
        kill = request.get("kill")
        everyone = (kill or request["moment"])["everyone"]
        self.kinds["everyone" if everyone else "one rank"] += 1
        if kill:
            self.kinds[kill["call"][0] + (" half" if kill["half"] else "")] += 1
        if not everyone:
            self.survived_s = max(self.survived_s, answer.survived_s)
        return answer

    def report(self) -> None:
        by_phase = ", ".join(f"{p} {self.phases[p]}" for p in PHASES if self.phases[p])
        by_kind = ", ".join(f"{k} {n}" for k, n in sorted(self.kinds.items()))
        seconds = time.monotonic() - self.began
        print(
            f"\n| {self.what} | {self.phases.total()} | {by_kind} | {by_phase} | {self.survived_s:.1f} "
            f"| {len(self.faults)} | {self.missed} | {seconds:.0f} |"
        )
        assert not self.faults, "\n".join(self.faults)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("kills"))


@pytest.mark.slow
def test_forked_ranks_equal_the_command(bench: Bench, tmp_path: Path) -> None:
    setting = SETTINGS[1]
    command(*setting.arguments(bench.data, tmp_path / "run"))
    whole = bench.whole(setting)
    assert check(tmp_path / "run", whole) == STEPS
    assert rows(tmp_path / "run") == whole.metrics


@pytest.mark.slow
def test_a_few_kills(bench: Bench) -> None:
    """Two of the moments that the chaos suite goes through."""
    setting = SETTINGS[1]
    whole, tally = bench.whole(setting), Tally(f"{setting}: a few")
    for phase, kind, rank, everyone, which in (
        ("saving", "write", 1, True, 0),  # there is no checkpoint yet: the run starts over
        ("record", "sync", 1, False, -2),
    ):
        call = [c for c in whole.answer.calls[rank] if (c.kind, c.phase) == (kind, phase)][which]
        point = Point(rank, call, kind == "write", everyone)
        assert tally.add(bench, setting, point, kill=point.request()) is not None or tally.faults
    tally.report()


@pytest.mark.chaos
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (Debian package strace)")
def test_every_call_is_seen(tmp_path: Path) -> None:
    """The intercepted calls are those that strace sees, including those of torch.save, DCP and pyarrow."""
    log, names = tmp_path / "log", {name: kind for kind, some in SYSTEM_CALLS.items() for name in some}
    bench = Bench(tmp_path, ("strace", "-f", "-y", "-qq", "-o", str(log), "-e", f"trace={','.join(names)}"))
    counted, runs = Counter[tuple[str, str]](), [SETTINGS[0], SETTINGS[1], SETTINGS[3]]
    for setting in runs:
        run = tmp_path / str(setting)
        for calls in bench.end(setting, run).calls:
            counted.update((call.kind, str(setting)) for call in calls)
    bench.server.close()
    seen = Counter[tuple[str, str]]()
    for line in log.read_text().splitlines():
        if (call := re.match(r"\d+ +(\w+)\((?:(?:AT_FDCWD|\d+)<([^>]*)>)?(?:, )?(?:\"([^\"]*)\")?", line)) is None:
            continue  # a signal, an exit, or the end of a call that began on an earlier line
        of_folder = names[call[1]] not in ("write", "sync") and call[3] is not None
        path = os.path.join(call[2] or "", call[3]) if of_folder else call[2] or ""
        seen.update((names[call[1]], str(setting)) for setting in runs if path.startswith(str(tmp_path / str(setting))))
    print("\n" + ", ".join(f"{kind} {setting} {n}" for (kind, setting), n in sorted(seen.items())))
    assert seen == counted and seen["write", str(SETTINGS[0])] > 100


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kill_at_each_call(bench: Bench, setting: Setting, pytestconfig: pytest.Config) -> None:
    every = pytestconfig.getoption("every")
    tally = Tally(f"{setting}: each call{some_of(every)}")
    of_phase: dict[str, list[Point]] = defaultdict(list)
    for point in points(bench.whole(setting), writes=2, seed=SETTINGS.index(setting)):
        of_phase[point.call.phase].append(point)
    chosen = [point for some in of_phase.values() for point in some[::every]]
    for point in chosen:
        tally.add(bench, setting, point, kill=point.request())
    tally.report()
    assert tally.missed <= len(chosen) // 10
    assert min(tally.phases[p] for p in ("saving", "publishing", "retention", "record", "compaction")) > 5 // every


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_kill_at_each_write_of_a_checkpoint(bench: Bench, setting: Setting, pytestconfig: pytest.Config) -> None:
    every = pytestconfig.getoption("every")
    tally = Tally(f"{setting}: each write of one checkpoint{some_of(every)}")
    for rank, calls in enumerate(bench.whole(setting).answer.calls):
        writes = [c for c in calls if c.kind == "write" and c.name.startswith(".iter-00000006-")]
        points = list(itertools.product(writes, (False, True)))
        for call, half in random.Random(rank).sample(points, len(points) // every):
            point = Point(rank, call, half, everyone=(call.number + half) % 2 == 0)
            tally.add(bench, setting, point, kill=point.request())
    tally.report()
    assert tally.missed == 0 and tally.phases["saving"] > 40 // every


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[5], SETTINGS[7]], ids=str)
def test_kill_at_random_moments(bench: Bench, setting: Setting, pytestconfig: pytest.Config) -> None:
    """Uniform over the time from the first step to the end; then in each phase that is below its minimum."""
    every = pytestconfig.getoption("every")
    moments, minimum = MOMENTS // every, {phase: -(-least // every) for phase, least in LEAST.items()}
    whole, tally, rng = bench.whole(setting), Tally(f"{setting}: random moments"), random.Random(str(setting))
    for trial in range(6 * moments):
        lacking = [p for p, least in minimum.items() if tally.phases[p] < least]
        if tally.phases.total() >= moments and not lacking:
            break
        if trial < moments // 2 or not lacking:
            moment = {"phase": "step", "entry": 1, "delay_s": rng.uniform(0, whole.answer.train_s)}
            moment["rank"] = rng.randrange(setting.world_size)
        else:
            phase = rng.choice(lacking)
            able = [rank for rank, entered in enumerate(whole.answer.entered) if entered[phase]]
            rank = rng.choice(able)
            moment = {"phase": phase, "rank": rank, "entry": rng.randint(1, whole.answer.entered[rank][phase])}
            moment["delay_s"] = rng.uniform(0, 0.002)
        moment["everyone"] = rng.random() < 0.5
        tally.add(bench, setting, moment, moment=moment)
    tally.report()
    assert tally.phases.total() >= moments
    assert {p: n for p, n in minimum.items() if tally.phases[p] < n} == {}


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_kill_while_starting(bench: Bench, setting: Setting, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """Before the first step: of a new run, and of runs that were killed while saving, publishing, deleting, merging."""
    every = pytestconfig.getoption("every")
    whole, tally = bench.whole(setting), Tally(f"{setting}: starting{some_of(every)}")
    for phase, kind in (
        (None, ""),
        ("saving", "write"),
        ("publishing", "sync"),
        ("retention", "delete"),
        ("compaction", "delete"),
    ):
        begun = None
        if phase is not None:
            call = [c for c in whole.answer.calls[0] if (c.kind, c.phase) == (kind, phase)][-2]
            begun = tmp_path / phase
            kill = Point(0, call, False, everyone=True).request()
            assert bench.train(setting, begun, kill=kill).killed
        for point in starting_points(bench, setting, begun, {})[::every]:
            tally.add(bench, setting, (phase, point), begun=begun, kill=point.request())
    tally.report()
    assert tally.missed == 0 and tally.phases["begin"] > 50 // every


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[6]], ids=str)
def test_kill_while_going_back(bench: Bench, setting: Setting, tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """A finished run resumes an older checkpoint: killed during the rewind, and at each rename after it."""
    older: dict[str, object] = {"resume": "iter-00000004-ckpt.pth"}
    every = pytestconfig.getoption("every")
    tally = Tally(f"{setting}: going back{some_of(every)}")
    bench.end(setting, tmp_path / "run", save__keep_last=0)
    for point in starting_points(bench, setting, tmp_path / "run", older)[::every]:
        tally.add(bench, setting, point, begun=tmp_path / "run", changes=older, kill=point.request())
    later = [c for c in bench.whole(setting).answer.calls[0] if c.kind == "rename" and c.phase != "begin"]
    counts = Counter((c.kind, c.phase) for c in later)
    for (kind, phase), count in counts.items():
        for number in range(1, count // 2 + 1):  # half of the run remains
            point = Point(0, Call(kind, phase, number, ""), False, everyone=number % 2 == 0)
            tally.add(bench, setting, point, begun=tmp_path / "run", changes=older, kill=point.request())
    tally.report()
    assert tally.phases["begin"] > 10 // every and tally.phases["publishing"] > 0
