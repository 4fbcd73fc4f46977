"""Ranks the entries of a comparison, finds settings that differ, and tests score differences for significance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from lit_eval.compare.entries import Entry
from lit_eval.compare.statistics import Interval, PairedTest, bootstrap_interval, holm, paired_test, without_interval
from lit_eval.score.results import Result

# Parts of the names of such metrics; every other metric is better the higher it is.
LOWER_IS_BETTER = ("loss", "perplexity", "bits", "nll", "repetition", "longest", "over_generator")
ALL_PAIRS = 6  # entries; above, only the best one is tested against each of the others
NOT_COMPARED = ("out_dir", "resume", "config", "log.run_name", "log.project", "log.trackers", "log.report")


@dataclass(frozen=True)
class Score:
    """A task's first metric for one entry.

    Attributes:
        interval: None if the metric is not the mean of its items, and for items that do not vary.
        no_interval: why not, for the latter.
    """

    value: float
    n: int
    interval: Interval | None
    no_interval: str = ""


@dataclass(frozen=True)
class Task:
    """One task over the entries, in their order."""

    name: str
    metric: str
    scores: list[Score | None]

    @property
    def lower_is_better(self) -> bool:
        return lower_is_better(self.metric)

    def best(self) -> int | None:
        """Index of the entry with the best score; of equal ones the first. None unless two or more have a score."""
        sign = 1 if self.lower_is_better else -1
        known = [(sign * score.value, i) for i, score in enumerate(self.scores) if score and math.isfinite(score.value)]
        return min(known)[1] if len(known) > 1 else None


@dataclass(frozen=True)
class Test:
    """A paired test of two entries on a task; `adjusted` is p after Holm's correction over all tests."""

    task: str
    metric: str
    first: str
    second: str
    result: PairedTest
    adjusted: float


@dataclass
class Comparison:
    """The result of a comparison.

    Attributes:
        entries: by validation loss, lowest first; those without one last.
        settings: flag -> its value in each entry, where they differ; MISSING for an entry without settings.
        remarks: caveats about comparing these entries.
    """

    entries: list[Entry]
    settings: dict[str, list[Any]]
    tasks: list[Task]
    tests: list[Test]
    remarks: list[str]


def lower_is_better(metric: str) -> bool:
    """Whether a metric is better the lower it is, by its name."""
    return any(word in metric for word in LOWER_IS_BETTER)


class _Missing:
    def __repr__(self) -> str:
        return "–"


MISSING = _Missing()


def compare(entries: Sequence[Entry], seed: int = 0) -> Comparison:
    """Compare entries. `seed`: of the bootstrap."""
    ranked = sorted(entries, key=lambda e: (e.val_loss is None, e.val_loss or 0.0))
    return Comparison(
        ranked, differing_settings(ranked), tasks_of(ranked, seed), tests_of(ranked, seed), remarks_of(ranked)
    )


def differing_settings(entries: Sequence[Entry]) -> dict[str, list[Any]]:
    """Settings whose values differ between the runs, except those of NOT_COMPARED: paths and logging."""
    known = [entry for entry in entries if entry.settings]
    flags = dict.fromkeys(flag for entry in known for flag in entry.settings if flag not in NOT_COMPARED)
    found: dict[str, list[Any]] = {}
    for flag in flags:
        values = [entry.settings.get(flag) for entry in known]
        if any(value != values[0] for value in values[1:]):
            found[flag] = [entry.settings.get(flag) if entry.settings else MISSING for entry in entries]
    return found


def result_of(entry: Entry, task: str) -> Result | None:
    """A task's result for the newest checkpoint that has one."""
    return next((r.tasks[task] for r in reversed(entry.results) if task in r.tasks), None)


def tasks_of(entries: Sequence[Entry], seed: int = 0) -> list[Task]:
    """Every task that an entry has results of."""
    names = dict.fromkeys(task for entry in entries for results in entry.results for task in results.tasks)
    found = []
    for name in names:
        results = [result_of(entry, name) for entry in entries]
        metric = next((key for result in results if result for key in result.metrics), None)
        if metric is not None:
            found.append(Task(name, metric, [score_of(result, metric, seed) for result in results]))
    return found


def score_of(result: Result | None, metric: str, seed: int = 0) -> Score | None:
    """A metric with the bootstrap interval of its items, if the metric is their mean."""
    if result is None or metric not in result.metrics:
        return None
    value, interval = result.metrics[metric], None
    items = np.array(result.items, dtype=np.float64)
    usable = len(items) > 0 and bool(np.isfinite(items).all()) and next(iter(result.metrics)) == metric
    if usable and math.isclose(float(items.mean()), value, rel_tol=1e-6, abs_tol=1e-9):
        if reason := without_interval(items):
            return Score(value, result.n, None, reason)
        interval = bootstrap_interval(items, seed=seed)
    return Score(value, result.n, interval)


def same_items(first: Result, second: Result) -> bool:
    """Whether two results are over the same items: of the same file, equally many, and by the same metric."""
    same_file = first.source.get("sha256") == second.source.get("sha256")
    same_metric = next(iter(first.metrics), None) == next(iter(second.metrics), None)
    return bool(first.items) and len(first.items) == len(second.items) and same_file and same_metric


def tests_of(entries: Sequence[Entry], seed: int = 0) -> list[Test]:
    """Paired tests on shared tasks: of all pairs of entries, or of the first with each of more than ALL_PAIRS."""
    pairs = list(combinations(entries, 2)) if len(entries) <= ALL_PAIRS else [(entries[0], e) for e in entries[1:]]
    names = dict.fromkeys(task for entry in entries for results in entry.results for task in results.tasks)
    found: list[tuple[str, str, str, str, PairedTest]] = []
    for task in names:
        for a, b in pairs:
            first, second = result_of(a, task), result_of(b, task)
            if first is None or second is None or not same_items(first, second):
                continue
            x, y = np.array(first.items), np.array(second.items)
            both = np.isfinite(x) & np.isfinite(y)
            if both.any():
                metric = next(iter(first.metrics))
                test = paired_test(x[both], y[both], seed, lower_is_better=lower_is_better(metric))
                found.append((task, metric, a.name, b.name, test))
    adjusted = holm([entry[-1].p for entry in found])
    return [Test(*entry, p) for entry, p in zip(found, adjusted, strict=True)]


def remarks_of(entries: Sequence[Entry]) -> list[str]:
    """Caveats: differences between the entries that make their numbers hard to compare."""
    remarks = []
    with_loss = [entry for entry in entries if entry.val_loss is not None]
    if len({entry.val_data for entry in with_loss if entry.val_data is not None}) > 1:
        remarks.append("The validation losses are of different data or tokenizers; bits per byte compare better")
    tokens = [entry.tokens for entry in with_loss if entry.tokens]
    if tokens and max(tokens) > 1.05 * min(tokens):
        remarks.append("The runs have seen different numbers of tokens")
    for entry in entries:
        run = entry.run if entry.step is None else None
        if run is not None and run.max_steps is not None and run.step < run.max_steps:
            remarks.append(f"{entry.name}: {run.status}")
    return remarks
