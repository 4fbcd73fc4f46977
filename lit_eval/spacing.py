"""Chooses some of many items."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def evenly_spaced(items: Sequence[T], n: int | None) -> Sequence[T]:
    """`n` of the items, evenly spaced and in order; all of them for None, or if there are no more than `n`."""
    total = len(items)
    return items if n is None or n >= total else [items[i * total // n] for i in range(n)]
