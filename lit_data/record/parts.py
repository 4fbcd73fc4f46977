"""Finds the files of a run's datapoint record, and selects the ones to read each step from.

A part `part-A-B-rankR.parquet` holds steps A to B - 1 of one rank. It counts once the checkpoint after step B exists;
until then readers ignore it, and a resume removes it. `lit_data/record/merge.py` merges committed parts into files
`steps-A-B.parquet` of all ranks.

The selection depends on the names alone (`select_files`), so that a merge may be killed at any moment: a merged file
takes precedence over the parts in it, a longer one over a shorter one.
"""

from __future__ import annotations

import bisect
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.run_files import DATAPOINTS

PART_NAME = re.compile(r"part-(\d{8,})-(\d{8,})-rank(\d{5,})\.parquet")
MERGED_NAME = re.compile(r"steps-(\d{8,})-(\d{8,})\.parquet")


@dataclass(frozen=True)
class Part:
    """Steps `first_step` to `end_step - 1` of one file of the record.

    Attributes:
        rank: the rank whose rows it holds; None for a merged file, with the rows of all ranks.
    """

    path: Path
    first_step: int
    end_step: int
    rank: int | None


def list_parts(folder: Path) -> list[Part]:
    """All published files of a record folder, with all their steps, by step and rank."""
    parts = []
    for name in os.listdir(folder):
        if match := PART_NAME.fullmatch(name):
            parts.append(Part(folder / name, int(match[1]), int(match[2]), int(match[3])))
        elif match := MERGED_NAME.fullmatch(name):
            parts.append(Part(folder / name, int(match[1]), int(match[2]), None))
    return sorted(parts, key=_by_step_and_rank)


def _by_step_and_rank(part: Part) -> tuple[int, int, int]:
    return part.first_step, part.end_step, -1 if part.rank is None else part.rank


def select_files(parts: Iterable[Part], steps: int) -> list[Part]:
    """Select the files for the first `steps` steps: each step from one merged file, or one part of each rank.

    Returns parts restricted to the steps to read from them; parts of the same steps are adjacent.
    """
    groups: dict[tuple[bool, int, int], list[Part]] = {}
    for part in parts:
        merged = part.rank is None
        if part.first_step < steps and (merged or part.end_step <= steps):
            groups.setdefault((not merged, part.first_step - part.end_step, part.first_step), []).append(part)
    covered: list[tuple[int, int]] = []  # disjoint, ascending
    found: list[Part] = []
    for (_, minus_length, first), group in sorted(groups.items(), key=lambda item: item[0]):
        at, end = first, min(first - minus_length, steps)
        index = max(0, bisect.bisect_right(covered, (at, at)) - 1)
        gaps = []
        while at < end:
            low, high = covered[index] if index < len(covered) else (end, end)
            if min(low, end) > at:
                gaps.append((at, min(low, end)))
            at, index = max(at, high), index + 1
        found.extend(replace(p, first_step=a, end_step=b) for a, b in gaps for p in group)
        for gap in gaps:
            bisect.insort(covered, gap)
    return sorted(found, key=_by_step_and_rank)


def newest_checkpoint_step(run: Path) -> int:
    """Steps completed in the newest checkpoint of a run folder; 0 if there is none."""
    return max((checkpoint_step(path) or 0 for path in list_checkpoints(run)), default=0)


def committed_parts(run: Path) -> list[Part]:
    """The parts of a run's record committed by a checkpoint, from `select_files`."""
    steps = newest_checkpoint_step(run)
    return select_files(list_parts(run / DATAPOINTS), steps)


def covered_until(run: Path, first_step: int) -> int:
    """The first step from `first_step` on that a run's committed record lacks."""
    at = first_step
    for part in committed_parts(run):
        if part.first_step <= at:
            at = max(at, part.end_step)
    return at


def group_by_steps(parts: Iterable[Part]) -> list[list[Part]]:
    """Group parts from `select_files` by the steps to read from them."""
    return [list(group) for _, group in groupby(parts, key=lambda p: (p.first_step, p.end_step))]
