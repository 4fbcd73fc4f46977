"""Reads the entries of a comparison: runs, checkpoints, Hugging Face folders, and files of results."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_eval.metrics_file import Metrics
from lit_eval.run_facts import RunFacts, find_results, flatten, is_run, read_run
from lit_eval.score.results import Results, read_results
from lit_files.checkpoint_name import checkpoint_step
from lit_files.nested_run import did_you_mean_run
from lit_model.cost import count_parameters
from lit_model.load import is_hf_folder, load_tensors

ACCEPTED = "give runs, checkpoints, Hugging Face folders, or results that scripts/evaluate.py wrote (JSON)"


@dataclass
class Entry:
    """One model or run of a comparison.

    Attributes:
        name: unique in the comparison.
        val_loss, val_bits_per_byte: the newest in metrics.csv; train_loss likewise.
        tokens_per_s: median of the logged ones.
        seconds: time in training, over all starts.
        val_data: fingerprint of the validation data; losses on different data don't compare.
        settings: flag -> value of its run; empty without one.
        results: of its checkpoints, by step.
        run: the run folder's content, if it is one.
        step: of a single checkpoint; None for a whole run.
    """

    name: str
    path: Path
    parameters: int | None = None
    tokens: int | None = None
    step: int | None = None
    val_loss: float | None = None
    val_bits_per_byte: float | None = None
    train_loss: float | None = None
    tokens_per_s: float | None = None
    seconds: float | None = None
    val_data: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    results: list[Results] = field(default_factory=list)
    run: RunFacts | None = None


def read_entries(paths: Sequence[Path]) -> list[Entry]:
    """Read the entries at some paths; one given twice is read once, with a warning on stderr.

    Raises FileNotFoundError or ValueError naming a path that is not one.
    """
    first: dict[Path, Path] = {}
    again = [path for path in paths if first.setdefault(path.resolve(), path) is not path]
    entries = [read_entry(path) for path in first.values()]
    for path in again:
        other = first[path.resolve()]
        also = f", also as {other}" if str(other) != str(path) else ""
        print(f"warning: {path} is given twice{also}; it is listed once", file=sys.stderr)
    for count in (1, 2, 3):  # equal names are prefixed with their parent folders
        repeated = {name for name, n in Counter(entry.name for entry in entries).items() if n > 1}
        for entry in entries:
            parents = entry.path.resolve().parts[1:][-1 - count : -count]
            if entry.name in repeated and parents:
                entry.name = f"{parents[0]}/{entry.name}"
    seen: Counter[str] = Counter()
    for entry in entries:
        seen[entry.name] += 1
        if seen[entry.name] > 1:
            entry.name = f"{entry.name} ({seen[entry.name]})"
    return entries


def read_entry(path: Path) -> Entry:
    """Read a run, a checkpoint, a Hugging Face folder, a file of results, or a folder of such files."""
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}: {ACCEPTED}")
    if path.is_file() and path.suffix == ".json":
        return _of_results(path, [read_results(path)])
    if (step := checkpoint_step(path)) is not None:
        return _of_checkpoint(path, step)
    if path.is_dir() and is_run(path):
        return _of_run(read_run(path))
    found, faults = find_results(path) if path.is_dir() else ([], [])
    if is_hf_folder(path) or (path / "meta.json").is_file() or path.is_file():
        parameters = count_parameters(load_tensors(path)[0])
        entry = Entry(path.resolve().name, path, parameters, results=found)
        entry.tokens = found[-1].model.tokens if found else None
        return entry
    if found:
        return _of_results(path, found)
    raise ValueError(faults[0] if faults else f"{path} holds nothing to compare: {ACCEPTED}{did_you_mean_run(path)}")


def _of_results(path: Path, results: list[Results]) -> Entry:
    model = results[-1].model
    name = model.name if path.is_file() else path.resolve().name
    return Entry(name, path, model.parameters, model.tokens, model.step if path.is_file() else None, results=results)


def _of_run(run: RunFacts) -> Entry:
    entry = Entry(run.name, run.folder, run.parameters, run.tokens, run=run, results=run.results)
    _add_metrics(entry, run.metrics)
    entry.seconds = run.seconds
    return entry


def _of_checkpoint(path: Path, step: int) -> Entry:
    """A checkpoint with the metrics and results of its step, where its run has them."""
    run = read_run(path.parent)
    entry = Entry(f"{run.name} step {step}", path, count_parameters(load_tensors(path)[0]), step=step, run=run)
    keep = run.metrics["step"] <= step
    rows = Metrics(
        {name: column[keep] for name, column in run.metrics.columns.items()},
        {name: column[keep] for name, column in run.metrics.written.items()},
    )
    tokens = rows.last("tokens")
    entry.tokens = None if tokens is None else int(tokens)
    entry.results = [results for results in run.results if results.model.step == step]
    _add_metrics(entry, rows)
    return entry


def _add_metrics(entry: Entry, metrics: Metrics) -> None:
    assert entry.run is not None
    entry.val_loss, entry.train_loss = metrics.last("val_loss"), metrics.last("train_loss")
    entry.val_bits_per_byte = metrics.last("val_bits_per_byte")
    entry.tokens_per_s = metrics.median("tokens_per_s")
    entry.settings = flatten(entry.run.settings)
    data = entry.run.meta.get("data")
    val = data.get("val") if isinstance(data, dict) else None
    entry.val_data = None if val is None else str(val)
