"""Merges the record's parts in the background into few files, sorted by step, row, document and start.

Each checkpoint adds one part per rank. Committed parts are merged into one file of all ranks; adjacent files are merged
again once the result is at least twice its largest source, up to MAX_ROWS. A row is thus rewritten at most
log2(MAX_ROWS / rows between two checkpoints) + 1 times, and n rows take about 2 n / MAX_ROWS large files and a few
small ones.

A merged file is written under a temporary name, synced, renamed, and the folder synced, before its sources are deleted.
In between both exist, and `select_files` reads each step from the merged file.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa

from lit_data.record.parts import (
    Part,
    committed_parts,
    group_by_steps,
    list_parts,
    newest_checkpoint_step,
    select_files,
)
from lit_data.record.reader import stream
from lit_data.record.schema import ROWS_PER_GROUP, SCHEMA, open_writer
from lit_files.parquet import read_footer
from lit_files.publish import publish, sync_file
from lit_files.run_files import DATAPOINTS

MAX_ROWS = 1 << 26  # rows of a merged file: about 2 GB
FAN_IN = 4  # merge again once this many files have accumulated


class MergeStoppedError(Exception):
    """Raised when the run ends: an unfinished merge is abandoned."""


class MergedFile:
    """Writes one merged file, in row groups of ROWS_PER_GROUP."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self.folder, self.first_step = folder, first_step
        self.rows = 0
        self._temporary = folder / f".steps-{first_step:08d}.tmp"
        self._file: BinaryIO = open(self._temporary, "wb")  # noqa: SIM115 - closed by publish or abandon
        self._writer = open_writer(self._file)
        self._pending: list[pa.Table] = []
        self._pending_rows = 0

    def add(self, table: pa.Table) -> None:
        self.rows += table.num_rows
        self._pending.append(table)
        self._pending_rows += table.num_rows
        if self._pending_rows >= ROWS_PER_GROUP:
            self._write(self._pending_rows // ROWS_PER_GROUP * ROWS_PER_GROUP)

    def publish(self, end_step: int) -> None:
        """Publish the file under the name of its steps."""
        self._write(self._pending_rows)
        self._writer.close()
        sync_file(self._file)
        self._file.close()
        publish(self._temporary, self.folder / f"steps-{self.first_step:08d}-{end_step:08d}.parquet")

    def abandon(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # the disk may be full
            self._writer.close()
        self._file.close()
        self._temporary.unlink(missing_ok=True)

    def _write(self, rows: int) -> None:
        table = pa.concat_tables(self._pending) if self._pending else SCHEMA.empty_table()
        if rows:  # in one chunk: pages, and so the file's bytes, then depend on the rows alone
            self._writer.write_table(table.slice(0, rows).combine_chunks(), row_group_size=ROWS_PER_GROUP)
        self._pending, self._pending_rows = [table.slice(rows)], self._pending_rows - rows


def merge(
    sources: list[Part],
    folder: Path,
    max_rows: int = MAX_ROWS,
    stopped: Callable[[], bool] = lambda: False,
) -> None:
    """Write the rows of adjacent parts to merged files in `folder`, starting a new one at `max_rows`.

    Memory: about one row group of each rank. Raises MergeStoppedError when `stopped()`.
    """
    first_step, end_step = sources[0].first_step, sources[-1].end_step
    out = MergedFile(folder, first_step)
    try:
        for table in (table for group in group_by_steps(sources) for table in stream(group)):
            if stopped():
                raise MergeStoppedError
            for whole in _split(table, max_rows):
                if out.rows and out.rows + whole.num_rows > max_rows:
                    at = whole["step"][0].as_py()
                    out.publish(at)
                    out = MergedFile(folder, at)
                out.add(whole)
        out.publish(end_step)
    except BaseException:
        out.abandon()
        raise


def _split(table: pa.Table, max_rows: int) -> Iterator[pa.Table]:
    """Split a table at step boundaries into tables of at most `max_rows` rows (more if one step has more)."""
    steps = table["step"].to_numpy()
    begins = [0, *(np.flatnonzero(steps[1:] != steps[:-1]) + 1).tolist(), len(steps)]
    start = 0
    for at, after in pairwise(begins):
        if after - start > max_rows and at > start:
            yield table.slice(start, at - start)
            start = at
    yield table.slice(start)


def next_merge(parts: list[Part], count_rows: Callable[[Path], int], max_rows: int = MAX_ROWS) -> list[Part]:
    """The parts to merge next, adjacent and in step order; empty if none are due.

    Args:
        parts: the committed parts, from `select_files`.
        count_rows: returns the number of rows of a merged file.
    """
    fresh: list[Part] = []
    merged: list[Part] = []
    for part in parts:
        if part.rank is not None:
            if fresh and part.first_step not in (fresh[-1].first_step, fresh[-1].end_step):
                break
            fresh.append(part)
        elif fresh:
            break
        else:
            if merged and part.first_step != merged[-1].end_step:
                merged = []
            merged.append(part)
    if fresh:
        return fresh
    rows = [count_rows(part.path) for part in merged]
    for i in range(len(merged) - 1):
        total = sum(rows[i:])
        enough = len(merged) - i >= FAN_IN or 2 * total >= max_rows
        if enough and total <= max_rows and total >= 2 * max(rows[i:]):
            return merged[i:]
    return []


def compact(run: Path, max_rows: int = MAX_ROWS, stopped: Callable[[], bool] = lambda: False) -> int:
    """Run all due merges of a run's record; returns the number of merges. Raises MergeStoppedError and OSError."""
    folder, merges = run / DATAPOINTS, 0
    rows: dict[Path, int] = {}

    def count_rows(path: Path) -> int:
        if path not in rows:
            rows[path] = read_footer(path).num_rows
        return rows[path]

    remove_covered(folder, newest_checkpoint_step(run))
    while sources := next_merge(committed_parts(run), count_rows, max_rows):
        merge(sources, folder, max_rows, stopped)
        remove_covered(folder, newest_checkpoint_step(run))
        merges += 1
    return merges


def remove_covered(folder: Path, steps: int) -> None:
    """Delete files of the first `steps` steps that are no longer selected."""
    parts = list_parts(folder)
    selected = {part.path for part in select_files(parts, steps)}
    for part in parts:
        if part.end_step <= steps and part.path not in selected:
            part.path.unlink()


class Compactor:
    """Merges a run's record in a background thread, so that training never waits for it.

    An error is reported once and only stops compaction: the parts stay as they are.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._due, self._stopped = threading.Event(), threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._work, name="llammlein-compaction", daemon=True)
        self._thread.start()

    def start(self) -> None:
        """Start merging what checkpoints have committed so far. Returns immediately."""
        self._due.set()

    def close(self, finish: bool) -> None:
        """Stop the thread: with `finish` after all due merges, else immediately."""
        if not finish:
            self._stopped.set()
        self._ending = True
        self._due.set()
        self._thread.join()

    def _work(self) -> None:
        try:
            ending = False
            while not ending:
                self._due.wait()
                self._due.clear()
                ending = self._ending
                compact(self.run, stopped=self._stopped.is_set)
        except MergeStoppedError:
            pass
        except Exception as error:  # the record is complete without merging, so no error here may end the run
            print(f"warning: parts of {self.run / 'datapoints'} stay unmerged: {error!r}", file=sys.stderr)
