"""Reads the datapoint record in bounded memory: a few steps by the files' bounds, or all of it as a stream."""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from lit_data.record.parts import Part, committed_parts, group_by_steps
from lit_data.record.schema import SCHEMA, sort_rows
from lit_files.parquet import open_table, read_footer

STEP = SCHEMA.get_field_index("step")
BLOCK_STEPS = 64


class _RowGroups:
    """The row groups of one file, by ascending steps. Opened for each read: a step may have 1000 ranks."""

    def __init__(self, part: Part) -> None:
        self.part = part
        self._facts = read_footer(part.path, SCHEMA)

    def holding(self, first: int, end: int) -> range:
        """The row groups with steps in [first, end), by their bounds."""
        groups = range(self._facts.num_row_groups)
        low = bisect.bisect_left(groups, first, key=lambda g: self._bounds(g)[1])
        return range(low, bisect.bisect_left(groups, end, key=lambda g: self._bounds(g)[0]))

    def read(self, group: int, first: int, end: int) -> pa.Table:
        """The rows of a row group with steps in [first, end)."""
        with open_table(self.part.path, self._facts) as file:
            table = file.read_row_group(group, use_threads=False)
        steps = table["step"].to_numpy()
        inside = (steps >= first) & (steps < end)
        return table if inside.all() else table.filter(inside)

    def _bounds(self, group: int) -> tuple[int, int]:
        bounds = self._facts.row_group(group).column(STEP).statistics
        if bounds is None or not bounds.has_min_max:
            raise ValueError(f"{self.part.path} is damaged: its row group {group} has no bounds of its steps")
        return bounds.min, bounds.max


class _PartReader:
    """Reads one file in the order of its steps, a row group at a time."""

    def __init__(self, part: Part) -> None:
        self._groups = _RowGroups(part)
        self._ahead = deque(self._groups.holding(part.first_step, part.end_step))
        self._held = SCHEMA.empty_table()
        self._group_rows = 1
        self.last_step = part.first_step - 1  # the step that may continue in the next row group

    @property
    def more(self) -> bool:
        return bool(self._ahead)

    @property
    def low(self) -> bool:
        """Whether less than half a row group is buffered."""
        return bool(2 * self._held.num_rows < self._group_rows)

    def fill(self) -> None:
        part = self._groups.part
        table = self._groups.read(self._ahead.popleft(), part.first_step, part.end_step)
        if table.num_rows:
            self._group_rows = table.num_rows
            self.last_step = int(table["step"].to_numpy().max())
            self._held = pa.concat_tables([self._held, table]) if self._held.num_rows else table

    def take(self, end: int) -> pa.Table:
        """Take the buffered rows of the steps before `end`."""
        before = self._held["step"].to_numpy() < end
        held, self._held = self._held, SCHEMA.empty_table()
        if before.all():
            return held
        self._held = held.filter(~before)
        return held.filter(before)


def stream(parts: Sequence[Part]) -> Iterator[pa.Table]:
    """Stream the rows of parts of the same steps, sorted, as tables of complete steps. Buffers up to two row groups per
    part.
    """
    readers = [_PartReader(part) for part in parts]
    end = max(part.end_step for part in parts)
    while True:
        lowest = min((r.last_step for r in readers if r.more), default=end)
        for reader in readers:
            # Ranks advance together: one iteration per row group of all ranks, not one per row group.
            if reader.more and (reader.last_step == lowest or reader.low):
                reader.fill()
        bound = min((r.last_step for r in readers if r.more), default=end)
        taken = pa.concat_tables([t for r in readers if (t := r.take(bound)).num_rows] or [SCHEMA.empty_table()])
        if taken.num_rows:
            steps = taken["step"].to_numpy()
            in_order = parts[0].rank is None and bool((steps[1:] >= steps[:-1]).all())
            yield taken if in_order else sort_rows(taken)
        if not any(r.more for r in readers):
            return


def stream_record(run: Path, first_step: int, end_step: int) -> Iterator[pa.Table]:
    """Stream the committed rows of steps `first_step` to `end_step - 1` as sorted tables of complete steps.

    The run may still be active: if a merge removes a file meanwhile, its rows are read from the merged file.
    """
    at = first_step
    while at < end_step:
        inside = [p for p in committed_parts(run) if p.end_step > at and p.first_step < end_step]
        if not inside:
            return
        first, end = max(at, inside[0].first_step), min(inside[0].end_step, end_step)
        parts = [replace(p, first_step=first, end_step=end) for p in group_by_steps(inside)[0]]
        try:
            for table in stream(parts):
                yield table
                at = table["step"][-1].as_py() + 1
            at = end
        except FileNotFoundError:
            continue


def steps_in(table: pa.Table) -> int:
    """The steps of a table of complete steps."""
    return int(table["step"][-1].as_py() - table["step"][0].as_py()) + 1


def read_steps(run: Path, steps: Iterable[int], keep: Callable[[pa.Table], Any] | None = None) -> pa.Table:
    """Read the committed rows of some steps, sorted; reads only their row groups.

    Args:
        keep: returns a mask over a table's rows; only rows where it is true are kept.
    """
    wanted = sorted(set(steps))
    while True:
        try:
            return _read_steps(committed_parts(run), wanted, keep)
        except FileNotFoundError:  # merged in the meantime
            continue


def blocks_of_steps(first_step: int, end_step: int) -> Iterator[range]:
    """Steps `first_step` to `end_step - 1` in ranges to read together, which bounds memory."""
    for begin in range(first_step, end_step, BLOCK_STEPS):
        yield range(begin, min(begin + BLOCK_STEPS, end_step))


def _read_steps(parts: Iterable[Part], wanted: list[int], keep: Callable[[pa.Table], Any] | None) -> pa.Table:
    tables = [SCHEMA.empty_table()]
    for part in parts:
        inside = wanted[bisect.bisect_left(wanted, part.first_step) : bisect.bisect_left(wanted, part.end_step)]
        if not inside:
            continue
        file = _RowGroups(part)
        for group in sorted({g for step in inside for g in file.holding(step, step + 1)}):
            table = file.read(group, inside[0], inside[-1] + 1)
            table = table.filter(pc.is_in(table["step"], pa.array(inside)))
            tables.append(table.filter(keep(table)) if keep is not None else table)
    return sort_rows(pa.concat_tables(tables))
