"""The progress of DuckDB's statements."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from running import ROOT

from lit_files import database as module
from lit_files import progress
from lit_files.database import open_database, showing

NUMBERS = "CREATE TABLE numbers AS SELECT range AS n FROM range(4000000)"
LONG = "CREATE TABLE sums AS SELECT hash(n) % 100000 AS k, sum(n) AS s FROM numbers GROUP BY k ORDER BY s"


def test_the_progress_of_a_long_statement_is_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of each of several statements, growing; nothing on standard output, and nothing for short ones."""
    with open_database() as database, showing(database, "adding"):
        database.execute("SELECT 1").fetchone()
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(progress, "APPEARS_S", 0.0)
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(module, "POLL_S", 0.02)
    with open_database() as database:
        database.execute(NUMBERS)
        with showing(database, "adding"):
            database.execute(LONG)
        assert database.execute("SELECT count(*) FROM sums").fetchone() == (100000,)
    out, err = capsys.readouterr()
    percents = [int(n) for n in re.findall(r"^adding: (\d+)/100 %", err, re.M)]
    assert out == "" and len(percents) >= 2 and percents == sorted(percents) and percents[-1] > percents[0]


def test_a_failed_statement_ends_the_progress() -> None:
    with (
        pytest.raises(ValueError, match="no_such_table"),
        open_database() as database,
        showing(database, "reading"),
    ):
        database.execute("SELECT * FROM no_such_table")


INTERRUPTED = """
import sys
sys.path[0] = sys.argv[1]
from lit_files.database import open_database, showing
from pretrain.cli.command_line import run_script

def main():
    with open_database(folder=sys.argv[2]) as database, showing(database, "adding"):
        print("began", flush=True)
        database.execute("SELECT count(*) FROM (SELECT DISTINCT hash(range) FROM range(1000000000))")

run_script(main, "stopped by hand")
"""


@pytest.mark.parametrize(
    ("number", "status", "text"), [(signal.SIGINT, 130, "\nstopped by hand\n"), (signal.SIGTERM, 143, "")]
)
def test_a_signal_ends_a_long_statement(number: signal.Signals, status: int, text: str, tmp_path: Path) -> None:
    """At once, as it ends other code, and without temporary files."""
    command = [sys.executable, "-c", INTERRUPTED, str(ROOT), str(tmp_path)]
    started = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert started.stdout is not None and started.stdout.readline() == "began\n"
    time.sleep(0.5)
    started.send_signal(number)
    _, errors = started.communicate(timeout=60)
    assert (started.returncode, errors) == (status, text) and list(tmp_path.iterdir()) == []


def test_a_signal_whose_handler_raises_nothing_ends_no_statement() -> None:
    """As the trainer's, which ends the run after its step."""
    statement = "SELECT count(*) FROM (SELECT DISTINCT hash(range) FROM range(3000000))"
    arrived: list[int] = []
    usual = signal.signal(signal.SIGTERM, lambda number, frame: arrived.append(number))
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    try:
        with open_database() as database:
            timer.start()
            while not arrived:
                row = database.execute(statement).fetchone()
        assert row == (3000000,) and arrived == [signal.SIGTERM]
    finally:
        timer.join()
        signal.signal(signal.SIGTERM, usual)
