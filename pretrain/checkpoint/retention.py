"""Deletes old checkpoints after a save, and cuts a run folder back to the step that a run resumes from."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Collection, Sequence
from pathlib import Path

from lit_data.record.rewind import copy_record, cut_record
from lit_data.record.writer import remove_temporaries
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.publish import sync_file
from lit_files.run_files import ABANDONED, DATAPOINTS, LAYERS, METRICS
from pretrain.args import SaveArgs
from pretrain.logs.messages import warn
from pretrain.logs.metrics import COLUMNS, cut_metrics, set_aside


def rewind(run: Path, step: int, columns: Sequence[str] = COLUMNS, *, again: bool = False) -> None:
    """Restore a run folder to its state after `step` steps. Rank 0 calls this before any rank writes.

    Later checkpoints and their part of the record move to abandoned/; parts that no checkpoint had committed, which
    a killed run leaves, are removed; metrics.csv, whose `columns` are given, and layers.csv are cut, the former before
    the row of `step` if that is to be written `again`. Killed on the way, the run can be resumed from any checkpoint
    that is still in its place.
    """
    datapoints = run / DATAPOINTS
    for leftover in [*run.glob(".iter-*.tmp"), *run.glob(".deleting-*")]:
        remove_if_possible(leftover)
    remove_temporaries(datapoints)
    later = [p for p in list_checkpoints(run) if (checkpoint_step(p) or 0) > step]
    if later:
        grave = new_grave(run / ABANDONED, step)
        for name in (METRICS, LAYERS):
            with contextlib.suppress(OSError):  # damaged: cut_metrics handles it
                if (run / name).is_file():
                    shutil.copy2(run / name, grave / name)
        # Copied, not moved: until the later checkpoints have moved, the record must reach up to them.
        if datapoints.is_dir():
            try:
                copy_record(run, step, grave / DATAPOINTS)
            except Exception as error:  # a damaged part may raise anything; the run keeps none of its steps
                warn(f"the record from step {step} on could not be copied completely to {grave}: {error}")
        for path in reversed(later):
            os.rename(path, grave / path.name)
        sync_file(run)
    if datapoints.is_dir():
        for damage in cut_record(datapoints, step):
            warn(damage)
    cut_metrics(run / METRICS, step, columns, again=again)
    cut_metrics(run / LAYERS, step)


def new_grave(abandoned: Path, step: int) -> Path:
    """A new folder in abandoned/ for what comes after `step`, with a folder `datapoints` in it."""
    if os.path.lexists(abandoned) and not abandoned.is_dir():
        warn(f"{abandoned} is not a folder; kept as {set_aside(abandoned).name}")
    for number in itertools.count(sum(1 for _ in abandoned.iterdir()) if abandoned.is_dir() else 0):
        grave = abandoned / f"{number:03d}-from-{step:08d}"
        with contextlib.suppress(FileExistsError):  # the numbers have gaps where some were deleted
            (grave / DATAPOINTS).mkdir(parents=True)
            return grave
    raise AssertionError


def retain(run: Path, args: SaveArgs, undeletable: set[Path], kept: Collection[int] = ()) -> None:
    """Delete old checkpoints: keep the newest `keep_last`, multiples of `keep_every`, and those of the steps `kept`.
    Never the newest one.

    Warns once of each that can't be deleted, and adds it to `undeletable`.
    """
    if args.keep_last == 0:
        return
    for path in list_checkpoints(run)[: -args.keep_last]:
        step = checkpoint_step(path) or 0
        if path in undeletable or step in kept or (args.keep_every and step % args.keep_every == 0):
            continue
        try:
            aside = path.with_name(f".deleting-{path.name}")
            os.rename(path, aside)  # a name that exists is whole, also while it is being deleted
            remove(aside)
        except OSError as error:
            undeletable.add(path)
            warn(f"{path} could not be deleted: {error}")


def remove_if_possible(path: Path) -> None:
    """Remove a file or folder that nothing depends on; warn on failure."""
    try:
        remove(path)
    except OSError as error:
        warn(f"{path} could not be deleted: {error}")


def remove(path: Path) -> None:
    """Remove a file or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
