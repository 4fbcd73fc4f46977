"""A function in a process of its own, and what it is for: trainers of tokenizers, which heed no signal."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from running import ROOT

from lit_data.tokenizers.training import train_on_texts
from lit_files.child import BATCH, in_child


def children(parent: int) -> list[int]:
    found = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(parent)], stdout=subprocess.PIPE, text=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "lit_files.child" in line]


def test_the_result_is_that_of_the_function(capfd: pytest.CaptureFixture[str]) -> None:
    for n in (0, 1, BATCH, 3 * BATCH + 1):
        assert in_child(list, (str(i) for i in range(n))) == [str(i) for i in range(n)]
    assert in_child(b" ".join, [b"a" * 10**7] * 3) == b" ".join([b"a" * 10**7] * 3)
    assert in_child(functools.partial(print, "said", flush=True), []) is None
    assert capfd.readouterr().err.startswith("said")


def test_an_error_of_the_function_is_raised() -> None:
    with pytest.raises(TypeError, match="unsupported operand"):
        in_child(sum, ["a"] * 10**6)


def test_an_error_of_the_items_ends_the_process_at_once() -> None:
    def items() -> Iterator[float]:
        yield from [3600.0] * BATCH
        raise KeyError("of the items")

    with pytest.raises(KeyError, match="of the items"):
        in_child(functools.partial(max, key=time.sleep), items())
    assert children(os.getpid()) == []


def test_a_process_that_was_killed(tmp_path: Path) -> None:
    """For lack of memory, for example."""
    with pytest.raises(
        ValueError, match=r"ended without a result \(status -9\); it may have run out of memory; buy some$"
    ):
        in_child(sum, _killing(os.getpid()), "; buy some")
    texts = (f"Text {i}" for i in _killing(os.getpid()))
    with pytest.raises(ValueError, match=r"\(status -9\).*; train on less text with --max_sample_mb"):
        train_on_texts(texts, 300, "byte_bpe", tmp_path / "tokenizer")
    assert list(tmp_path.iterdir()) == []


def _killing(parent: int) -> Iterator[int]:
    [child] = children(parent)
    os.kill(child, signal.SIGKILL)
    yield from range(10**6)


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text on which a trainer takes minutes."""
    draw = np.random.default_rng(0)
    letters = draw.integers(ord("a"), ord("z") + 1, 30_000_000, dtype=np.uint8)
    letters[draw.random(letters.size) < 0.05] = ord(" ")
    file = tmp_path_factory.mktemp("endless") / "text.jsonl"
    lines = (letters[i : i + 10_000].tobytes().decode() for i in range(0, letters.size, 10_000))
    file.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), encoding="utf-8")
    return file


def begin(text: Path, kind: str, output: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, ROOT / "scripts/train_tokenizer.py", "--input", text, "--type", kind, "--vocab_size", "900000",
         "--output", output],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
@pytest.mark.parametrize(
    ("number", "status", "text"),
    [(signal.SIGINT, 130, "\ninterrupted: nothing was written\n"), (signal.SIGTERM, 143, ""), (signal.SIGKILL, -9, "")],
)
def test_a_signal_ends_the_training_of_a_tokenizer(
    number: signal.Signals, status: int, text: str, kind: str, endless: Path, tmp_path: Path
) -> None:
    """At once, in native code too, and with its process."""
    started = begin(endless, kind, tmp_path / "tokenizer")
    while not (found := children(started.pid)):
        assert started.poll() is None
        time.sleep(0.1)
    time.sleep(2)
    started.send_signal(number)
    _, errors = started.communicate(timeout=60)
    assert (started.returncode, errors) == (status, text)
    assert number == signal.SIGKILL or list(tmp_path.iterdir()) == []
    for child in found:
        wait_until_gone(child)


def wait_until_gone(process: int) -> None:
    for _ in range(100):
        try:
            os.kill(process, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("the trainer runs on")


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece"])
def test_a_damaged_document_ends_the_training_of_a_tokenizer_at_once(kind: str, endless: Path, tmp_path: Path) -> None:
    """Not after training on the documents before it."""
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(endless.read_bytes() + b"{\n")
    started = begin(damaged, kind, tmp_path / "tokenizer")
    _, errors = started.communicate(timeout=60)
    assert started.returncode == 2 and "damaged.jsonl" in errors and "line 3001" in errors
    assert list(tmp_path.iterdir()) == [damaged]
