"""Cuts a run's record at a step, for a resume from an earlier checkpoint; copies steps to another folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa

from lit_data.record.merge import merge
from lit_data.record.parts import committed_parts, group_by_steps, list_parts, select_files
from lit_files.publish import sync_file


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
    whole = list_parts(run / "datapoints")
    for group in group_by_steps(committed_parts(run)):
        if group[0].first_step >= first_step and all(part in whole for part in group):
            for part in group:
                try:
                    os.link(part.path, folder / part.path.name)
                except OSError:
                    shutil.copy2(part.path, folder / part.path.name)
        elif group[0].end_step > first_step:
            merge([replace(part, first_step=max(part.first_step, first_step)) for part in group], folder)
    sync_file(folder)


def merge_steps(run: Path, first_step: int, end_step: int, folder: Path) -> None:
    """Write the committed rows of steps `first_step` to `end_step - 1` to a merged file in `folder` (several from
    MAX_ROWS rows on). The same rows give the same bytes, whichever files hold them.

    Raises ValueError naming the steps that the record lacks.
    """
    at, inside = first_step, []
    for group in group_by_steps(committed_parts(run)):
        first, end = max(first_step, group[0].first_step), min(end_step, group[0].end_step)
        if first >= end:
            continue
        if first > at:
            break
        inside += [replace(part, first_step=first, end_step=end) for part in group]
        at = end
    if at < end_step:
        raise ValueError(f"the datapoint record of {run} ends at step {at}; a checkpoint is at step {end_step}")
    merge(inside, folder)
