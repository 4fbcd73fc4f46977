"""SIGKILL of training on several ranks: at each call that changes the run folder, at random moments, while resuming.

After each kill, before anything is repaired, every visible checkpoint can be read and equals that of the undisturbed
run after the same step, and the record is exact up to the newest one. Then `--resume auto` goes on to the end: final
parameters, optimizer state, record and metrics are those of the undisturbed run. When one rank alone is killed, the
others end by themselves and publish nothing that it had not finished.

The ranks are forked (tests/zygote.py), which is shown to equal the real command, so that a kill, its checks and the
rerun take a second or two. docs/reliability.md has the numbers.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import torch
from running import ROOT, flags, metrics, train, write_dataset
from torch import Tensor
from watched_calls import KINDS, PHASES, Call

from lit_data.datapoints import read_record
from lit_data.trace import open_run
from lit_data.verify import verify
from lit_model.load import Checkpoint, checkpoint_step, list_checkpoints

STEPS = 8
SURVIVAL_S = 30  # within which the others of a killed rank must end
TRIAL_S = 90
COLUMNS = ("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm", "skipped")
# Of the kills at random moments, so many at least fall into each phase.
LEAST = {"step": 10, "validation": 3, "record": 3, "saving": 10, "publishing": 3, "retention": 3, "compaction": 3}
MOMENTS = 50


class Setting(NamedTuple):
    """How a run is spread over processes and saved."""

    world_size: int
    strategy: str
    kind: str
    asynchronous: bool

    def __str__(self) -> str:
        return f"{self.world_size}-{self.strategy}-{self.kind}-{'asynchronous' if self.asynchronous else 'synchronous'}"

    def arguments(self, data: Path, run: Path, **changes: object) -> list[str]:
        """8 steps, a checkpoint every 2; the newest and every fourth step's stay."""
        settings: dict[str, object] = {
            "resume": "auto",
            "devices": self.world_size,
            "strategy": self.strategy,
            "model__n_layer": 1,
            "model__dropout": 0.1,
            "train__max_steps": STEPS,
            "eval__every_steps": 3,
            "save__every_steps": 2,
            "save__keep_last": 1,
            "save__keep_every": 4,
            "save__state_dict_type": self.kind,
            "save__asynchronous": str(self.asynchronous).lower(),
        }
        return flags(data, run, **(settings | changes))


# Of the 16 combinations each pair of choices.
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


class Zygote:
    """Starts tests/zygote.py, and asks it for runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # One thread: the arithmetic of all other tests. Arrow's allocator would start a thread, which no fork survives.
        environment = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
        environment["PYTHONPATH"] = str(ROOT)
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "zygote.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | environment,
        )

    def run(self, world_size: int, run: Path, arguments: list[str], **request: Any) -> dict[str, Any]:
        """Train by forked ranks. The request and the answer are those of `trial` there."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request |= {"world_size": world_size, "run": str(run), "arguments": arguments, "timeout_s": TRIAL_S}
        for old in self.folder.glob("rank-*"):
            old.unlink()
        self._process.stdin.write(json.dumps(request | {"log": str(self.folder / "rank")}) + "\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        return answer

    def output(self, rank: int = 0) -> str:
        """What a rank of the last run printed."""
        return (self.folder / f"rank-{rank}").read_text()

    def calls(self, rank: int) -> list[Call]:
        """The calls of a rank of the last run."""
        lines = (self.folder / f"rank-calls-{rank}").read_text().splitlines()
        return [Call(*json.loads(line)) for line in lines if line.endswith("]")]

    def close(self) -> None:
        self._process.communicate()


class Whole(NamedTuple):
    """An undisturbed run: the state after each checkpoint, what it left, what its ranks called."""

    states: dict[int, dict[str, Tensor]]
    record: pa.Table
    metrics: list[list[str]]
    names: list[str]
    calls: list[list[Call]]
    entered: list[dict[str, int]]
    train_s: float


class Bench:
    """Runs trials of settings, and checks them against the undisturbed run of each."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.zygote = folder, Zygote(folder)
        self.data, self.killed = folder / "data", folder / "killed"
        rng = np.random.default_rng(7)
        write_dataset(self.data / "train", rng.integers(1, 90, size=60).tolist())
        write_dataset(self.data / "val", rng.integers(1, 90, size=5).tolist(), seed=1)
        self._wholes: dict[Setting, Whole] = {}
        self.late = 0  # publications of survivors after the kill

    def train(self, setting: Setting, run: Path, changes: dict[str, object] | None = None, **request: Any) -> Any:
        return self.zygote.run(setting.world_size, run, setting.arguments(self.data, run, **(changes or {})), **request)

    def whole(self, setting: Setting) -> Whole:
        """The undisturbed run, made once."""
        if setting not in self._wholes:
            every, run = self.folder / "every", self.folder / "whole"
            self.end(setting, every, save__keep_last=0)
            states = {checkpoint_step(p) or 0: read_state(p) for p in list_checkpoints(every)}
            answer = self.end(setting, run)
            self._wholes[setting] = Whole(
                states,
                read_record(run),
                rows(run),
                [p.name for p in list_checkpoints(run)],
                [self.zygote.calls(rank) for rank in range(setting.world_size)],
                answer["entered"],
                answer["train_s"],
            )
            assert read_record(every).equals(read_record(run)) and rows(every) == rows(run)
            shutil.rmtree(every)
            shutil.rmtree(run)
        return self._wholes[setting]

    def end(self, setting: Setting, run: Path, **changes: object) -> dict[str, Any]:
        """Train to the end, undisturbed."""
        answer: dict[str, Any] = self.train(setting, run, changes)
        assert answer["statuses"] == [0] * setting.world_size, f"{answer}\n{self.zygote.output()[-3000:]}"
        return answer

    def kill(
        self, setting: Setting, begun: Path | None = None, changes: dict[str, object] | None = None, **request: Any
    ) -> dict[str, Any]:
        """Kill a run, which goes on from a copy of `begun` if that is given; check what is left, resume it, check all.

        Returns the answer of the killed run.
        """
        whole, run = self.whole(setting), self.killed
        shutil.rmtree(run, ignore_errors=True)
        if begun is not None:
            shutil.copytree(begun, run, symlinks=True)
        answer = self.train(setting, run, changes, **request)
        if not answer["killed"]:
            assert answer["statuses"] == [0] * setting.world_size, self.zygote.output()[-3000:]
            return answer
        assert not answer["exceeded"] and answer["survived_s"] < SURVIVAL_S, answer
        newest = check(run, whole)
        if answer["phase"] != "begin":  # a run that is only going back has later checkpoints
            assert newest <= answer["step"], f"{newest} was published after the kill: {answer}"
        self.end(setting, run)
        resumed = re.search(r"resumed after step (\d+)|is finished", self.zygote.output())
        assert resumed is not None or newest == 0, self.zygote.output()
        if resumed is not None:
            assert int(resumed[1] or STEPS) == newest
        assert check(run, whole) == STEPS
        assert rows(run) == whole.metrics
        names = [p.name for p in list_checkpoints(run)]
        # A finished run is left alone: a checkpoint that its last retention did not come to stays.
        assert names == whole.names or (newest == STEPS and set(names) > set(whole.names)), names
        if newest < STEPS:
            assert not [p for p in run.rglob(".*") if p.name != ".lock" and ".pth" not in p.parent.name]
        return answer


def check(run: Path, whole: Whole) -> int:
    """What is visible is readable and true. Returns the newest checkpoint's step, 0 if there is none."""
    checkpoints = list_checkpoints(run)
    for path in checkpoints:
        step = checkpoint_step(path) or 0
        state = read_state(path)
        assert state.keys() == whole.states[step].keys()
        for name, tensor in state.items():
            assert torch.equal(tensor, whole.states[step][name]), f"{path.name}: {name}"
    if not checkpoints:
        return 0
    assert verify(open_run(run)) == []
    assert read_record(run).equals(whole.record.filter(pc.less(whole.record["step"], step)))
    return step


def read_state(path: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, its checksums verified."""
    checkpoint = Checkpoint(path)
    if hasattr(checkpoint, "verify"):
        checkpoint.verify()
    return {name: checkpoint.tensor(name).clone() for name in checkpoint.names()}


def rows(run: Path) -> list[list[str]]:
    """metrics.csv without what depends on the clock."""
    return [[row[column] for column in COLUMNS] for row in metrics(run)]


class Point(NamedTuple):
    """Where a kill falls: before a call of a rank, or in the middle of it."""

    rank: int
    call: Call
    half: bool
    everyone: bool

    def request(self) -> dict[str, Any]:
        return {"rank": self.rank, "call": list(self.call[:3]), "half": self.half, "everyone": self.everyone}


def points(whole: Whole, writes: int | None, seed: int) -> list[Point]:
    """Each rename, sync, deletion and new folder after the first step, of rank 0 and of one other rank, and `writes` of
    the writes to each file (None: all), half of these in the middle. Each as a kill of the rank and of everyone, but
    for writes, deletions and folders, which are the one or the other in turn.
    """
    rng = random.Random(seed)
    found = []
    for rank in (0, rng.randrange(1, len(whole.calls))):
        calls = [c for c in whole.calls[rank] if c.phase != "begin"]
        of_file: dict[str, list[Call]] = defaultdict(list)
        for call in calls:
            if call.kind == "write":
                of_file[call.name].append(call)
        for group in of_file.values():
            chosen = group if writes is None else rng.sample(group, min(writes, len(group)))
            found += [Point(rank, c, rng.random() < 0.5, rng.random() < 0.5) for c in chosen]
        for call in calls:
            if call.kind in ("rename", "sync"):
                found += [Point(rank, call, False, everyone) for everyone in (False, True)]
            elif call.kind != "write":
                found.append(Point(rank, call, False, rng.random() < 0.5))
    return found


def starting_points(bench: Bench, setting: Setting, begun: Path | None, changes: dict[str, object]) -> list[Point]:
    """Each call before the first step of a run that goes on from a copy of `begun`, on rank 0 and on rank 1; each write
    also in the middle.
    """
    run = bench.folder / "counted"
    if begun is not None:
        shutil.copytree(begun, run, symlinks=True)
    bench.end(setting, run, **changes)
    shutil.rmtree(run)
    found = []
    for rank in (0, 1):
        for i, call in enumerate(c for c in bench.zygote.calls(rank) if c.phase == "begin"):
            found.append(Point(rank, call, False, everyone=i % 2 == 0))
            if call.kind == "write":
                found.append(Point(rank, call, True, everyone=i % 2 == 1))
    return found


class Tally:
    """Counts kills, and says at the end how many fell where, as a row of the table in docs/reliability.md."""

    def __init__(self, what: str) -> None:
        self.what, self.phases, self.kinds, self.missed = what, Counter[str](), Counter[str](), 0
        self.survived_s, self.faults, self.began = 0.0, list[str](), time.monotonic()

    def add(self, bench: Bench, setting: Setting, about: object, **request: Any) -> dict[str, Any] | None:
        """One kill; a fault is kept, to be reported with the others."""
        try:
            answer = bench.kill(setting, **request)
        except Exception as error:
            outputs = "\n".join(bench.zygote.output(rank)[-1500:] for rank in range(setting.world_size))
            self.faults.append(f"{about}: {type(error).__name__}: {str(error)[:1000]}\n{outputs}")
            assert len(self.faults) < 10, "\n".join(self.faults)
            return None
        if not answer["killed"]:
            self.missed += 1
            return None
        self.phases[answer["phase"]] += 1
        kill = request.get("kill")
        everyone = (kill or request["moment"])["everyone"]
        self.kinds["everyone" if everyone else "one rank"] += 1
        if kill:
            self.kinds[kill["call"][0] + (" half" if kill["half"] else "")] += 1
        if not everyone:
            self.survived_s = max(self.survived_s, answer["survived_s"])
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
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("kills"))
    yield bench
    bench.zygote.close()


def test_forked_ranks_equal_the_command(bench: Bench, tmp_path: Path) -> None:
    setting = SETTINGS[0]
    train(*setting.arguments(bench.data, tmp_path / "run"))
    whole = bench.whole(setting)
    assert check(tmp_path / "run", whole) == STEPS
    assert rows(tmp_path / "run") == whole.metrics


@pytest.mark.parametrize("setting", [SETTINGS[2], SETTINGS[3]], ids=str)
def test_a_few_kills(bench: Bench, setting: Setting) -> None:
    whole, tally = bench.whole(setting), Tally(f"{setting}: a few")
    for phase, kind, rank, everyone in (
        ("saving", "write", 0, True),
        ("publishing", "rename", 0, True),
        ("record", "sync", 1, False),
    ):
        call = [c for c in whole.calls[rank] if (c.kind, c.phase) == (kind, phase)][-2]
        point = Point(rank, call, kind == "write", everyone)
        assert tally.add(bench, setting, point, kill=point.request()) is not None or tally.faults
    tally.report()


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_kill_at_each_call(bench: Bench, setting: Setting) -> None:
    tally = Tally(f"{setting}: each call")
    chosen = points(bench.whole(setting), writes=2, seed=SETTINGS.index(setting))
    for point in chosen:
        tally.add(bench, setting, point, kill=point.request())
    tally.report()
    assert tally.missed < len(chosen) // 10
    assert min(tally.phases[p] for p in ("saving", "publishing", "retention", "record", "compaction")) > 5


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_kill_at_each_write_of_a_checkpoint(bench: Bench, setting: Setting) -> None:
    tally = Tally(f"{setting}: each write of one checkpoint")
    for rank, calls in enumerate(bench.whole(setting).calls):
        writes = [c for c in calls if c.kind == "write" and c.name.startswith(".iter-00000006-")]
        for call, half in itertools.product(writes, (False, True)):
            point = Point(rank, call, half, everyone=(call.number + half) % 2 == 0)
            tally.add(bench, setting, point, kill=point.request())
    tally.report()
    assert tally.missed == 0 and tally.phases["saving"] > 40


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[2], SETTINGS[5], SETTINGS[7]], ids=str)
def test_kill_at_random_moments(bench: Bench, setting: Setting) -> None:
    """Uniform over the time from the first step to the end; and, until each phase has its minimum, within such phases."""
    whole, tally, rng = bench.whole(setting), Tally(f"{setting}: random moments"), random.Random(str(setting))
    for trial in range(6 * MOMENTS):
        lacking = [p for p, least in LEAST.items() if tally.phases[p] < least]
        if tally.phases.total() >= MOMENTS and not lacking:
            break
        if trial < MOMENTS // 2 or not lacking:
            moment = {"phase": "step", "entry": 1, "delay_s": rng.uniform(0, whole.train_s)}
            moment["rank"] = rng.randrange(setting.world_size)
        else:
            phase = rng.choice(lacking)
            able = [rank for rank, entered in enumerate(whole.entered) if entered[phase]]
            rank = rng.choice(able)
            moment = {"phase": phase, "rank": rank, "entry": rng.randint(1, whole.entered[rank][phase])}
            moment["delay_s"] = rng.uniform(0, 0.002)
        moment["everyone"] = rng.random() < 0.5
        tally.add(bench, setting, moment, moment=moment)
    tally.report()
    assert tally.phases.total() >= MOMENTS
    assert {p: n for p, n in LEAST.items() if tally.phases[p] < n} == {}


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[0], SETTINGS[3]], ids=str)
def test_kill_while_starting(bench: Bench, setting: Setting, tmp_path: Path) -> None:
    """Before the first step: of a new run, and of runs that were killed while saving, publishing, deleting, merging."""
    whole, tally = bench.whole(setting), Tally(f"{setting}: starting")
    for phase, kind in ((None, ""), ("saving", "write"), ("publishing", "sync"), ("retention", "delete"), ("compaction", "delete")):
        begun = None
        if phase is not None:
            call = [c for c in whole.calls[0] if (c.kind, c.phase) == (kind, phase)][-2]
            begun = tmp_path / phase
            kill = Point(0, call, False, everyone=True).request()
            assert bench.train(setting, begun, kill=kill)["killed"]
        for point in starting_points(bench, setting, begun, {}):
            tally.add(bench, setting, (phase, point), begun=begun, kill=point.request())
    tally.report()
    assert tally.missed == 0 and tally.phases["begin"] > 50


@pytest.mark.chaos
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("setting", [SETTINGS[1], SETTINGS[6]], ids=str)
def test_kill_of_a_run_that_goes_back(bench: Bench, setting: Setting, tmp_path: Path) -> None:
    """A finished run goes on from an older checkpoint: killed on the way back, and at each rename after that."""
    older: dict[str, object] = {"resume": "iter-00000004-ckpt.pth"}
    tally = Tally(f"{setting}: going back")
    bench.end(setting, tmp_path / "run", save__keep_last=0)
    for point in starting_points(bench, setting, tmp_path / "run", older):
        tally.add(bench, setting, point, begun=tmp_path / "run", changes=older, kill=point.request())
    later = [c for c in bench.whole(setting).calls[0] if c.kind == "rename" and c.phase != "begin"]
    counts = Counter((c.kind, c.phase) for c in later)
    for (kind, phase), count in counts.items():
        for number in range(1, count // 2 + 1):  # half of the run is left
            point = Point(0, Call(kind, phase, number, ""), False, everyone=number % 2 == 0)
            tally.add(bench, setting, point, begun=tmp_path / "run", changes=older, kill=point.request())
    tally.report()
    assert tally.phases["begin"] > 10 and tally.phases["publishing"] > 0
