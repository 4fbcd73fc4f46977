"""SIGKILL at every rename, sync, write and deletion of the record's publication, compaction and rewinding.

After each kill, before any repair, the record is exact up to the newest checkpoint, and after the rerun up to the last
step. strace kills at the n-th call of a kind; it also sees pyarrow's calls.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from record_writer import EVERY, RANKS, STEPS
from recorded_run import WRITER, check, prepare
from running import ROOT
from whole_record import read_record

from lit_data.record.parts import list_parts, select_files
from lit_data.record.schema import SCHEMA

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

CALLS = {
    "rename": "rename,renameat,renameat2",
    "sync": "fsync,fdatasync",
    "write": "write,pwrite64,writev",
    "delete": "unlink,unlinkat",
}
REWIND = (
    "import sys; from pathlib import Path; sys.path.insert(0, sys.argv[1]); "
    "from pretrain.checkpoint.retention import rewind; rewind(Path(sys.argv[2]), int(sys.argv[3]))"
)
REWOUND = 14  # in the middle of a merged file
PARTS = tuple(f".part-rank{rank:05d}.tmp" for rank in range(RANKS))
MERGED = tuple(f".steps-{step:08d}.tmp" for step in range(STEPS))


def strace_reason() -> str | None:
    """Why strace cannot be used here, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed"
    tried = subprocess.run(["strace", "-f", "-qq", "-e", "inject=fsync:signal=SIGKILL", "true"], capture_output=True)
    return None if tried.returncode == 0 else f"strace does not work here: {tried.stderr.decode().strip()[-200:]}"


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """A run folder before its first step, and the record it must have at the end."""
    if reason := strace_reason():
        pytest.skip(reason)
    return prepare(tmp_path_factory.mktemp("begun"))


def run_to_the_end(run: Path) -> None:
    subprocess.run([sys.executable, str(WRITER), str(run)], check=True, timeout=120)


def rewind_command(run: Path) -> list[str]:
    return [sys.executable, "-c", REWIND, str(ROOT), str(run), str(REWOUND)]


def only(paths: Sequence[Path]) -> list[str]:
    """The options that make strace look only at calls on these paths."""
    return [part for path in paths for part in ("-P", str(path))]


def count_calls(command: list[str], call: str, log: Path, paths: Sequence[Path] = ()) -> int:
    """How often an undisturbed command makes a kind of call: the maximum over its threads."""
    traced = ["strace", "-f", "-qq", "-o", str(log), *only(paths), "-e", f"trace={CALLS[call]}", *command]
    subprocess.run(traced, check=True, timeout=300)
    threads = Counter(line.split()[0] for line in log.read_text().splitlines() if "(" in line)
    return max(threads.values())


def kill_at(command: list[str], call: str, number: int, log: Path, paths: Sequence[Path] = ()) -> bool:
    """Run a command and kill it when the first of its threads makes its n-th call; True if one did."""
    inject = f"inject={CALLS[call]}:signal=SIGKILL:when={number}"
    traced = ["strace", "-f", "-qq", "-o", str(log), *only(paths), "-e", f"trace={CALLS[call]}", "-e", inject, *command]
    return subprocess.run(traced, capture_output=True, timeout=300).returncode in (-signal.SIGKILL, 137)


def phase(run: Path) -> str:
    """What the writer was about to do when it was killed."""
    entered = sorted(path.name for path in (run / "phases").iterdir()) if (run / "phases").is_dir() else []
    return entered[-1].split("-")[1] if entered else "before"


def report(title: str, hits: Counter[str]) -> None:
    print(f"\n{title}: {sum(hits.values())} kills; " + ", ".join(f"{k} {n}" for k, n in sorted(hits.items())))


@pytest.mark.parametrize(
    ("call", "written"),
    [
        ("rename", PARTS),
        ("rename", ()),
        ("sync", PARTS),
        ("sync", ()),
        ("write", PARTS),
        ("write", MERGED),
        ("delete", ()),
    ],
    ids=lambda value: value if isinstance(value, str) else {PARTS: "parts", MERGED: "merged"}.get(value, "any"),
)
def test_kill_at_each_call_while_a_run_is_recorded(
    begun: tuple[Path, pa.Table], tmp_path: Path, call: str, written: tuple[str, ...]
) -> None:
    """strace counts calls per thread, and parts are written by separate threads, so their calls are counted
    separately. Without names the main thread, which makes most calls, decides."""
    template, expected = begun
    run = tmp_path / "run"
    paths = [run / "datapoints" / name for name in written]
    shutil.copytree(template, run)
    number = count_calls([sys.executable, str(WRITER), str(run)], call, tmp_path / "log", paths)
    hits: Counter[str] = Counter()
    for n in range(1, number + 1):
        shutil.rmtree(run)
        shutil.copytree(template, run)
        if not kill_at([sys.executable, str(WRITER), str(run)], call, n, tmp_path / "log", paths):
            continue
        hits[phase(run)] += 1
        check(run, expected)
        run_to_the_end(run)
        assert check(run, expected) == STEPS
        assert not list((run / "datapoints").glob(".*"))
    report(f"each {call} of {'parts' if written == PARTS else 'merged files' if written else 'any'}", hits)
    assert hits["publication"] >= STEPS // EVERY if written == PARTS else hits["compaction"] >= 6


def test_kill_at_random_moments(begun: tuple[Path, pa.Table], tmp_path: Path) -> None:
    """50 moments, uniform over the time from the first step to the end."""
    template, expected = begun
    run = tmp_path / "run"
    rng = random.Random(3)
    hits: Counter[str] = Counter()
    lasts = 0.0
    for moment in range(51):  # the first run is undisturbed, to measure its duration
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(template, run)
        process = subprocess.Popen([sys.executable, str(WRITER), str(run)])
        while not (run / "phases").is_dir():
            time.sleep(0.001)
        began = time.monotonic()
        if moment == 0:
            assert process.wait(timeout=120) == 0
            lasts = time.monotonic() - began
            continue
        time.sleep(rng.uniform(0, 0.9 * lasts))
        process.kill()
        process.wait()
        hits[phase(run)] += 1
        check(run, expected)
        run_to_the_end(run)
        assert check(run, expected) == STEPS
    report("random moments", hits)
    assert hits["compaction"] >= 5 and hits["publication"] >= 5


@pytest.mark.parametrize("call", ["rename", "sync", "delete"])
def test_kill_while_rewinding(begun: tuple[Path, pa.Table], tmp_path: Path, call: str) -> None:
    """The record matches whichever checkpoint is then the newest; abandoned parts are complete at the end."""
    template, expected = begun
    whole, run = tmp_path / "whole", tmp_path / "run"
    shutil.copytree(template, whole)
    run_to_the_end(whole)
    shutil.copytree(whole, run)
    number = count_calls(rewind_command(run), call, tmp_path / "log")
    hits = 0
    for n in range(1, number + 1):
        shutil.rmtree(run)
        shutil.copytree(whole, run)
        if not kill_at(rewind_command(run), call, n, tmp_path / "log"):
            continue
        hits += 1
        assert check(run, expected) >= REWOUND
        subprocess.run(rewind_command(run), check=True, timeout=120)
        assert check(run, expected) == REWOUND
        graves = sorted((run / "abandoned").iterdir())
        if (graves[-1] / f"iter-{STEPS:08d}-ckpt.pth").exists():
            files = select_files(list_parts(graves[-1] / "datapoints"), STEPS)
            kept = pa.concat_tables([SCHEMA.empty_table(), *(pq.read_table(p.path) for p in files)])
            assert kept.equals(expected.filter(pc.greater_equal(expected["step"], REWOUND)))
        run_to_the_end(run)
        assert check(run, expected) == STEPS
    print(f"\nrewinding, each {call}: {hits} kills")
    assert hits == number
    assert read_record(whole).equals(expected)


def test_every_file_is_synced_before_its_rename_and_its_folder_after(
    begun: tuple[Path, pa.Table], tmp_path: Path
) -> None:
    """A kill cannot test this, since the kernel survives it: the order of syncs, renames and deletions."""
    run = tmp_path / "run"
    shutil.copytree(begun[0], run)
    log = tmp_path / "log"
    calls = ",".join(CALLS[k] for k in ("rename", "sync", "delete"))
    traced = [
        "strace",
        "-f",
        "-y",
        "-qq",
        "-o",
        str(log),
        "-e",
        f"trace={calls}",
        sys.executable,
        str(WRITER),
        str(run),
    ]
    subprocess.run(traced, check=True, timeout=300)
    synced: set[str] = set()
    unsynced_names: set[str] = set()  # folders with a rename that is not yet durable
    renames = deletions = 0
    for line in log.read_text().splitlines():
        if path := re.search(r"sync\(\d+<([^>]*)>", line):
            synced.add(path[1])
            unsynced_names.discard(path[1])
        elif paths := re.search(r'rename[^(]*\([^"]*"([^"]*)"[^"]*"([^"]*)"', line):
            assert paths[1] in synced, line
            synced.discard(paths[1])
            assert not unsynced_names, line
            unsynced_names.add(str(Path(paths[2]).parent))
            renames += 1
        elif (path := re.search(r'unlink[^(]*\([^"]*"([^"]*)"', line)) and path[1].endswith(".parquet"):
            assert not unsynced_names, line
            deletions += 1
    assert renames > 3 * STEPS // 2 and deletions > 0
