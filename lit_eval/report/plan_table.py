"""The table of plan and reality in a run's report."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_eval.formats import duration, number, whole
from lit_eval.report.elements import Column, number_cell, table, text_cell
from lit_eval.run_facts import RunFacts
from lit_files.checkpoint_name import list_checkpoints
from lit_files.run_files import DATAPOINTS

MOST = 1e24  # no figure of a plan is larger, unless its file is damaged


class Figure(NamedTuple):
    """A planned figure and its measured value. `planned`: a number or [low, likely, high], as recorded, unchecked."""

    name: str
    planned: Any
    factor: float
    measured: float | None
    shown: Callable[[float | None], str]


def plan_table(run: RunFacts) -> str:
    """The plan that the newest start recorded beside the run's figures; "" for a run without a plan."""
    plan = run.starts[-1].get("plan") if run.starts else None
    if not isinstance(plan, dict):
        return ""
    rows = []
    for name, planned, factor, measured, shown in _figures(run, plan):
        values = planned if isinstance(planned, list) and len(planned) == 3 else [planned] * 3
        if measured is None or not all(isinstance(value, (int, float)) and 0 < value < MOST for value in values):
            continue
        low, likely, high = (value * factor for value in values)
        if likely == 0:  # no step is done
            continue
        cells = [
            text_cell(name),
            number_cell(shown(likely), likely),
            number_cell(f"{shown(low)} to {shown(high)}" if low < high else "", likely),
            number_cell(shown(measured), measured),
            number_cell(f"{measured / likely:.2f}", measured / likely),
        ]
        rows.append(cells)
    columns = [Column("Figure", numeric=False), Column("Plan"), Column("Range"), Column("Run")]
    columns.append(Column("Run / plan", hint="1: as planned"))
    return "<h3>Plan and reality</h3>" + table("Plan and reality", columns, rows, sortable=False) if rows else ""


def _figures(run: RunFacts, plan: dict[str, Any]) -> Iterator[Figure]:
    m, done = run.metrics, run.step / run.max_steps if run.max_steps else 1.0
    peak = max(m.finite("memory_gib").tolist(), default=None)
    if run.starts[-1].get("gpus"):
        yield Figure("Peak memory of a device, GiB", plan.get("memory_bytes"), 2**-30, peak, number)
    elif peak is not None and isinstance(resident := plan.get("resident_bytes"), int) and resident < MOST:
        growth = peak - resident / 2**30
        yield Figure("Peak memory beside the imports, GiB", plan.get("memory_bytes"), 2**-30, growth, number)
    yield Figure("Tokens per second, median", plan.get("tokens_per_s"), 1.0, m.median("tokens_per_s"), whole)
    yield Figure("Time of the steps done", plan.get("seconds"), done, run.seconds, duration)
    megabytes = _megabytes(list_checkpoints(run.folder)[-1:])
    yield Figure("Checkpoint, MB", plan.get("checkpoint_bytes"), 1e-6, megabytes, number)
    megabytes = _megabytes([run.folder / DATAPOINTS])
    yield Figure("Record of the steps done, MB", plan.get("record_bytes"), 1e-6 * done, megabytes, number)


def _megabytes(paths: Iterable[Path]) -> float | None:
    """Size of files and of all files in folders; None if there are none."""
    total = 0
    for file in (file for path in paths for file in ([path] if path.is_file() else path.rglob("*"))):
        with contextlib.suppress(OSError):  # a run in progress may replace it
            total += file.stat().st_size if file.is_file() else 0
    return total / 1e6 or None
