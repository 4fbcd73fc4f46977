"""Cuts a run's record at a step, for a resume from an earlier checkpoint; copies steps to another folder."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from lit_data.record.merge import merge
from lit_data.record.parts import committed_parts, covered_until, group_by_steps, list_parts, select_files
from lit_files.publish import link_or_copy, sync_file
from lit_files.run_files import DATAPOINTS


def cut_record(folder: Path, steps: int) -> list[str]:
    """Remove everything after the first `steps` steps. Safe to repeat if killed.

    A damaged file with earlier steps that are still needed is kept under another name. Returns one line for each.
    """
    parts, damaged = list_parts(folder), []
    later = {part.path for part in parts if part.end_step > steps}
    for part in select_files(parts, steps):
        if part.path in later:
            try:
                merge([part], folder)
            except (pa.ArrowException, OSError, ValueError, EOFError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # a file system error; Arrow's errors for damage have no errno
                aside = part.path.with_name(part.path.name + ".damaged")
                os.rename(part.path, aside)
                later.discard(part.path)
                steps_of = f"steps {part.first_step} to {part.end_step - 1}"
                damaged.append(f"the record of {steps_of} is damaged ({error}); kept as {aside}")
    for path in later:
        try:
            path.unlink()
        except OSError:  # rename what must not be read
            os.rename(path, path.with_name(path.name + ".deleting"))
    sync_file(folder)  # before new rows for the same steps are written
    return damaged


def copy_record(run: Path, first_step: int, folder: Path) -> None:
    """Copy the committed record from `first_step` on to another folder, by hard links where possible."""
    whole = list_parts(run / DATAPOINTS)
    for group in group_by_steps(committed_parts(run)):
        if group[0].first_step >= first_step and all(part in whole for part in group):
            for part in group:
                link_or_copy(part.path, folder / part.path.name)
        elif group[0].end_step > first_step:
            merge([replace(part, first_step=max(part.first_step, first_step)) for part in group], folder)
    sync_file(folder)


def merge_steps(run: Path, first_step: int, end_step: int, folder: Path) -> None:
    """Write the committed rows of steps `first_step` to `end_step - 1` to a merged file in `folder` (several from
    MAX_ROWS rows on). The same rows give the same bytes, whichever files hold them.

    Raises ValueError naming the steps that the record lacks.
    """
    if (at := covered_until(run, first_step)) < end_step:
        raise ValueError(f"the datapoint record of {run} ends at step {at}; a checkpoint is at step {end_step}")
    inside = [part for part in committed_parts(run) if part.first_step < end_step and part.end_step > first_step]
    bounds = [(max(part.first_step, first_step), min(part.end_step, end_step)) for part in inside]
    merge([replace(p, first_step=a, end_step=b) for p, (a, b) in zip(inside, bounds, strict=True)], folder)
