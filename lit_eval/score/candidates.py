"""The score of each candidate of an item, and metrics over items and their groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from lit_eval.score.results import Group
from lit_eval.score.task_files import Item


class Candidate(NamedTuple):
    """The score of a continuation."""

    total: float
    """log p(continuation | context), in nats."""
    tokens: int
    greedy: bool
    """Whether each of its tokens is the model's most probable one."""


class Scored(NamedTuple):
    """An item and the scores of its candidates, in their order."""

    item: Item
    candidates: tuple[Candidate, ...]


Metrics = Callable[[Sequence[Scored]], dict[str, float]]


def group(scored: Sequence[Scored], metrics: Metrics) -> dict[str, dict[str, Group]]:
    """Metrics of each group of items, by grouping; groups are sorted by name."""
    groups: dict[str, dict[str, list[Scored]]] = {}
    for one in scored:
        for by, name in one.item.groups.items():
            groups.setdefault(by, {}).setdefault(name, []).append(one)
    return {
        by: {name: Group(len(some), metrics(some)) for name, some in sorted(found.items())}
        for by, found in groups.items()
    }


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
