"""A preparation that is killed at any point and called again writes the same as an uninterrupted one.

Kills at each rename, sync and write by strace's injection; kills of the whole process group at seeded random moments;
and, since a kill keeps unsynced data and so can't test the order, the order of writes, syncs and renames of a run.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import tokenizers

ROOT = Path(__file__).resolve().parents[2]
SYSCALLS = ("rename", "fsync", "fdatasync", "write", "pwrite64")
WORDS = "der die das Haus und ein Garten mit vielen Bäumen steht am Fluss wo die Vögel singen".split()  # noqa: SIM905

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (Debian package strace)"),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tokenizer and a corpus with repeated paragraphs and documents."""
    folder = tmp_path_factory.mktemp("kill")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate(["</s>", *alphabet])}, []))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.add_special_tokens(["</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    draw = random.Random(0)
    (folder / "corpus").mkdir()
    paragraphs = [" ".join(draw.choices(WORDS, k=12)) for _ in range(2000)]
    for file in range(4):
        documents = ["\n".join(draw.choices(paragraphs, k=draw.randint(1, 9))) for _ in range(400)]
        lines = [json.dumps({"id": f"{file}-{i}", "text": text}) for i, text in enumerate(documents)]
        (folder / "corpus" / f"{file}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def command(setting: Path, output: Path, workers: int = 1) -> list[str]:
    flags = (
        f"--workers {workers} --val_fraction 0.2 --dedup exact --near_dedup 0.7 --parts 2 --shard_tokens 40000 "
        "--commit_seconds 0.02"
    )
    return [
        sys.executable, str(ROOT / "scripts" / "prepare_data.py"), "--input", str(setting / "corpus"), "--tokenizer",
        str(setting / "tokenizer.json"), "--output", str(output), *flags.split(),
    ]  # fmt: skip


def content(folder: Path) -> dict[str, str]:
    return {
        f.relative_to(folder).as_posix(): hashlib.sha256(f.read_bytes()).hexdigest()
        for f in sorted(folder.rglob("*"))
        if f.is_file()
    }


@pytest.fixture(scope="module")
def undisturbed(setting) -> dict[str, str]:
    done = subprocess.run(command(setting, setting / "undisturbed"), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = content(setting / "undisturbed")
    assert {"train/data-00001.bin", "val/data-00000.bin", "report.json", "tokenizer/tokenizer.json"} <= found.keys()
    return found


def phase_of(output: Path) -> str:
    """The phase of a preparation, judged by the contents of its working folder."""
    work = output.with_name(f".{output.name}.preparing")
    if output.exists():
        return "published"
    for phase, name in (("assemble", "output"), ("merge", "merged")):
        if (work / name).exists():
            return phase
    if any(work.glob("part-*/train")):
        return "encode"
    if (work / "join.tmp").exists() or (work / "join.json").exists():
        return "join"
    if any(work.glob("part-*")):
        return "hash"
    return "plan" if (work / "plan.json").exists() else "start"


def go_on(setting: Path, output: Path, expected: dict[str, str], where: str) -> None:
    work = output.with_name(f".{output.name}.preparing")
    if output.exists() and not (work / "assembled.json").exists():  # everything was done except exiting
        assert content(output) == expected and not [p for p in work.glob("*") if p.name != ".lock"], where
        shutil.rmtree(work, ignore_errors=True)
        shutil.rmtree(output)
        return
    done = subprocess.run(command(setting, output), capture_output=True, text=True)
    assert done.returncode == 0, f"{where}: {done.stderr}"
    assert content(output) == expected, where
    left = [p.name for p in output.parent.glob(f".{output.name}*")]
    assert not left, f"{where} leaves {left}"
    shutil.rmtree(output)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("call", SYSCALLS)
def test_killed_at_each_call(setting, undisturbed, call, capsys, pytestconfig):
    """The process dies at the n-th call, for every n. One call at a time: strace counts each by itself."""
    every = pytestconfig.getoption("every")
    output = setting / f"killed-{call}"
    counts: Counter[str] = Counter()
    number = 1
    while True:
        injection = ["strace", "-f", "-qq", "-o", os.devnull, "-e", f"trace={call}",
                     "-e", f"inject={call}:signal=SIGKILL:when={number}"]  # fmt: skip
        killed = subprocess.run([*injection, *command(setting, output)], capture_output=True, text=True)
        if killed.returncode == 0:
            break
        assert killed.returncode in (137, -9), killed.stderr
        counts[phase_of(output)] += 1
        go_on(setting, output, undisturbed, f"{call} {number}")
        number += every
    shutil.rmtree(output)
    with capsys.disabled():
        print(f"\n{call}: killed at {counts.total()} of its calls, one in {every}; by phase: {dict(counts)}")
    phases = ("hash", "join", "encode", "merge", "assemble") if call in ("rename", "fsync") else ("join",)
    assert every > 1 or min(counts[p] for p in phases) >= 1


def test_killed_at_random_moments(setting, undisturbed, capsys):
    """Fifty seeded moments, ten after the start of each phase; all processes die simultaneously."""
    draw = random.Random(1)
    counts: Counter[str] = Counter()
    phases = {"hash": 0.3, "join": 0.1, "encode": 0.4, "merge": 0.1, "assemble": 0.02}
    tries = 0
    while sum(counts.values()) < 50:
        tries += 1
        assert tries < 200, counts
        wanted = min(phases, key=lambda p: counts[p])
        output = setting / f"random-{tries}"
        process = subprocess.Popen(
            command(setting, output, workers=2), start_new_session=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while phase_of(output) != wanted and process.poll() is None:
            time.sleep(0.0005)
        time.sleep(draw.uniform(0, phases[wanted]))
        os.killpg(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            assert content(output) == undisturbed
            shutil.rmtree(output)
            continue
        counts[phase_of(output)] += 1
        go_on(setting, output, undisturbed, f"moment {tries}")
    with capsys.disabled():
        print(f"\nkilled at {sum(counts.values())} moments; by phase: {dict(counts)}")
    assert min(counts[p] for p in ("hash", "join", "encode", "merge")) >= 5


def test_order_of_syncs_and_renames(setting, undisturbed):
    """A renamed file was synced after its last write; after a rename the folder is synced before the next rename."""
    log, output = setting / "trace", setting / "traced"
    calls = f"trace=ftruncate,unlink,unlinkat,renameat,renameat2,writev,{','.join(SYSCALLS)}"
    done = subprocess.run(
        ["strace", "-f", "-y", "-qq", "-s", "0", "-e", calls, "-o", str(log), *command(setting, output)],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    work = str(setting / ".traced.preparing")
    unsynced: set[str] = set()  # files of the preparation that were written since their last sync
    renamed_in: set[str] = set()  # folders whose entries changed by a rename and were not synced
    renames = 0
    for line in log.read_text().splitlines():
        if (match := re.search(r"\b(?:write|writev|pwrite64|ftruncate)\(\d+<([^>]*)>", line)) and " = -1" not in line:
            if match[1].startswith(work) and "/join.tmp/" not in match[1] and not match[1].endswith("/.lock"):
                unsynced.add(match[1])
        elif match := re.search(r'\bunlink(?:at)?\((?:\S*, )?"([^"]*)"', line):
            unsynced -= {f for f in unsynced if f == match[1] or Path(f).name == match[1]}  # unlinkat names no folder
        elif match := re.search(r"\bf(?:data)?sync\(\d+<([^>]*)>", line):
            unsynced.discard(match[1])
            renamed_in.discard(match[1])
        elif match := re.search(
            r'\brename(?:at2?)?\((?:AT_FDCWD<[^>]*>, )?"([^"]*)", (?:AT_FDCWD<[^>]*>, )?"([^"]*)"', line
        ):
            source, target = match[1], match[2]
            if not source.startswith(work):
                continue
            renames += 1
            inside = [f for f in unsynced if f == source or f.startswith(f"{source}/")]
            assert not inside, f"{source} is renamed with {inside} not synced"
            if target == str(output):
                assert not renamed_in, f"published while the entries of {renamed_in} are not synced"
            unsynced = {f"{target}{f[len(source) :]}" if f.startswith(source) else f for f in unsynced}
            renamed_in.add(str(Path(target).parent))
    assert renames > 20 and str(setting) not in renamed_in
    assert content(output) == undisturbed
