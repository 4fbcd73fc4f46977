"""The results of an evaluation: one JSON file per model, written after every task, so that a repeated call runs only
the missing tasks.

A file holds `format`, `model`, `environment`, and `tasks` by name, each with the fields of `Result`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_eval.model.eval_model import ModelFacts
from lit_files.publish import write_json
from lit_files.reading import read_dataclass

FORMAT = 1


@dataclass
class Group:
    """Some items of a task.

    Attributes:
        n: items.
        metrics: by name, as in `Result`.
    """

    n: int
    metrics: dict[str, float]


@dataclass
class Result:
    """The result of one task.

    Attributes:
        kind: how it is scored: `perplexity`, `pairs`, `choice`, `cloze`, `last_word`, `generation`, ...
        n: items scored.
        metrics: numbers by name. Shares are in 0..1; the first is the one to show where there is room for one.
        groups: by the field items are grouped by (`phenomenon`, `source`), then by its value.
        items: one value an item, of the first metric: what a paired test compares. Empty if the task has none.
        source: `file` and `sha256` of the items' file, `n_items` in it, `n_skipped` and the reasons (`skipped`), or
            other facts that identify the scored data.
        settings: those that change the numbers. A stored result with other settings, or of another source, is replaced.
        seconds: how long it took.
        details: anything else worth keeping: samples, curves.
    """

    kind: str
    n: int
    metrics: dict[str, float]
    groups: dict[str, dict[str, Group]] = field(default_factory=dict)
    items: list[float] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class Results:
    """The content of a file of results."""

    model: ModelFacts
    tasks: dict[str, Result] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(self))

    def has(self, name: str, source: dict[str, Any], settings: dict[str, Any]) -> bool:
        """Whether the task was done with these settings, and with a source of which all of this is true."""
        done = self.tasks.get(name)
        return done is not None and done.source | source == done.source and done.settings == settings


def read_results(path: Path) -> Results:
    """Read a file of results. Raises ValueError that names the file and the fault, FileNotFoundError."""
    results = read_dataclass(Results, path)
    if results.format != FORMAT:
        raise ValueError(f"{path} has format {results.format}; this version reads format {FORMAT}")
    return results
