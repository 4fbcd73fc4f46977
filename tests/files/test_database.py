"""The progress of DuckDB's statements."""

from __future__ import annotations

import re

import pytest

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
