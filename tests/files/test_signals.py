"""Signals that arrive during an import."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from running import ROOT

from lit_files.signals import send_again

MODULE = """
import os, signal, time
for _ in range(3):
    os.kill(os.getpid(), {number})
    time.sleep(0.1)
"""
SCRIPT = """
import sys, time
sys.path[:1] = sys.argv[1:3]
from pretrain.cli.command_line import end_on_ctrl_c, run_script

end_on_ctrl_c()

def main():
    import interrupted_module
    print("imported", flush=True)
    time.sleep(60)

run_script(main, "stopped by hand")
"""


@pytest.mark.parametrize(
    ("number", "status", "text"), [(signal.SIGINT, 130, "\nstopped by hand\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_waits_for_the_end_of_an_import(
    number: signal.Signals, status: int, text: str, tmp_path: Path
) -> None:
    """An exception in the middle of one ended torch's import by abort, and numpy's by an ImportError."""
    (tmp_path / "interrupted_module.py").write_text(MODULE.format(number=int(number)))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, ROOT, tmp_path], capture_output=True, text=True, check=False,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (status, "imported\n", text)


def test_a_signal_that_is_sent_again_early_can_be_sent_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """The timer may end before `send_again` does; a later signal must not be taken for one that still waits."""
    monkeypatch.setattr(threading.Timer, "start", lambda timer: timer.function())
    arrived: list[int] = []
    usual = signal.signal(signal.SIGUSR1, lambda number, frame: arrived.append(number))
    try:
        for count in (1, 2):
            send_again(signal.SIGUSR1)
            assert arrived == [signal.SIGUSR1] * count
    finally:
        signal.signal(signal.SIGUSR1, usual)
