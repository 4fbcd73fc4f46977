"""One log file per rank: its lines, and the output redirected to it while it is open."""

from __future__ import annotations

import faulthandler
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
from running import ROOT

from pretrain.failure.rank_log import RankLog


def test_lines(tmp_path: Path) -> None:
    for text in ("one", "two"):  # the next start appends to it
        log = RankLog(tmp_path, 3, 8, "a1")
        log.event(text)
        try:
            raise ValueError(f"planted {text}")
        except ValueError as error:
            log.exception(error)
        log.close()
    assert log.path == tmp_path / "logs" / "rank-00003.log"
    lines = log.path.read_text().splitlines()
    stamp = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z rank 3 \S+ \d+: (.*)")
    messages = [m[1] for line in lines if (m := stamp.fullmatch(line))]
    begins = "attempt a1: rank 3 of 8 begins"
    assert messages == [begins, "one", "ValueError: planted one", begins, "two", "ValueError: planted two"]
    assert lines.count("Traceback (most recent call last):") == 2


def test_threads_and_warnings_are_written_there_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(threading, "excepthook", lambda arguments: seen.append(str(arguments.exc_value)))
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: seen.append(str(message)))
    before = threading.excepthook, warnings.showwarning

    def fail() -> None:
        raise KeyError("in a thread")

    log = RankLog(tmp_path, 0, 1)
    thread = threading.Thread(target=fail, name="reader")
    thread.start()
    thread.join()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("look here", stacklevel=1)
    log.close()
    log.close()
    log.event("after its end")
    text = log.path.read_text()
    assert "thread reader ended by an exception" in text and "KeyError: 'in a thread'" in text and ", in fail" in text
    assert f"UserWarning: look here ({__file__}:" in text and "after its end" not in text
    assert seen == ["'in a thread'", "look here"]
    assert (threading.excepthook, warnings.showwarning) == before


def test_a_hook_set_later_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    log = RankLog(tmp_path, 0, 1)
    later = lambda arguments: None  # noqa: E731
    threading.excepthook = later
    log.close()
    assert threading.excepthook is later


def test_faulthandler_is_restored(tmp_path: Path) -> None:
    enabled = faulthandler.is_enabled()
    RankLog(tmp_path, 0, 1).close()
    assert faulthandler.is_enabled() == enabled


def test_the_stacks_of_a_segmentation_fault(tmp_path: Path) -> None:
    code = (
        "import ctypes, pathlib, sys; from pretrain.failure.rank_log import RankLog\n"
        "def break_memory(): ctypes.string_at(0)\n"
        "log = RankLog(pathlib.Path(sys.argv[1]), 0, 1)\n"
        "break_memory()"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, timeout=60, stderr=subprocess.PIPE)
    assert done.returncode == -11
    text = (tmp_path / "logs" / "rank-00000.log").read_text()
    assert "Fatal Python error: Segmentation fault" in text and " in break_memory" in text
