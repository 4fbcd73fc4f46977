"""The names that an unknown one may have been meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean a or b?` with up to three of the known names, the nearest first; "" if none is near.

    Case does not count. `cutoff`: the least similarity, from 0 to 1.
    """
    by_lower: dict[str, list[str]] = {}
    for one in known:
        by_lower.setdefault(one.lower(), []).append(one)
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)
    names = [one for lower in near for one in by_lower[lower]][:3]
    return f"; did you mean {' or '.join(names)}?" if names else ""
