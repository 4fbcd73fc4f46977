"""The names that an unknown one may have been meant to be, for error messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean a or b?` with up to three of the known names, the nearest first; "" if none is near.

    Case does not count. `cutoff`: the least similarity, from 0 to 1.
    """
    names = near_names(name, known, cutoff)
    return f"; did you mean {' or '.join(names)}?" if names else ""


def did_you_mean_file(path: Path, configs: Path) -> str:
    """The same for a YAML file that does not exist: files of its folder, and those of `configs`, also by bare names."""
    folders = {folder.resolve(): folder for folder in (configs, path.parent)}
    files = [file for folder in folders.values() for file in sorted(folder.glob("*.yaml"))]
    names = near_names(path.name.removesuffix(".yaml"), [file.name.removesuffix(".yaml") for file in files], 0.8)
    near = [str(file) for name in dict.fromkeys(names) for file in files if file.name == f"{name}.yaml"][:3]
    return f"; did you mean {' or '.join(near)}?" if near else ""


def near_names(name: str, known: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Up to three of the known names, the nearest first; as `did_you_mean`."""
    by_lower: dict[str, list[str]] = {}
    for one in known:
        by_lower.setdefault(one.lower(), []).append(one)
    near = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)
    return [one for lower in near for one in by_lower[lower]][:3]
