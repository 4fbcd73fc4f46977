"""Reads what a run folder says of its run: metrics, settings, starts, rollbacks, results, samples.

A run that is still going, was killed or has lost files can be read too: what is missing stays empty, and what cannot be
read is named in `faults`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from lit_eval.metrics_file import Metrics, read_metrics
from lit_eval.score.results import Results, read_results
from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.reading import read_bytes, read_object, read_text
from lit_model.config import ModelConfig
from lit_model.cost import count_active_parameters, count_parameters
from lit_model.load import Checkpoint

METRICS, SETTINGS, ENVIRONMENT, STOPPED = "metrics.csv", "config.yaml", "environment.jsonl", "stopped.json"
ORDER = "datapoints/order.json"
ABANDONED = "abandoned"  # RUN/abandoned/NNN-from-STEP: what a rollback or the resume of an older checkpoint left behind
MOST_RESULTS = 2000  # files of results read from a run
MOST_RESULT_BYTES = 64 << 20
NOT_SEARCHED = {"datapoints", ABANDONED, "tokenizer", "data", "logs", "tensorboard", "wandb", "plans"}


@dataclass(frozen=True)
class Branch:
    """Steps that the run went back on: those after `from_step`."""

    from_step: int
    metrics: Metrics


@dataclass(frozen=True)
class Sample:
    """A text generated during the run."""

    step: int
    tokens: float | None
    prompt: str
    text: str


@dataclass
class RunFacts:
    """A run folder's content.

    Attributes:
        settings: config.yaml, nested as there.
        meta: of the newest checkpoint; empty without one.
        starts: lines of environment.jsonl, in the order of time: one a start or resume.
        skips: samples left out after a spike: `step`, `first_sample`, `end_sample`, `reason`.
        branches: abandoned steps, in the order they were abandoned.
        results: of the run's evaluated checkpoints, by step.
        faults: what could not be read, a sentence each.
    """

    folder: Path
    metrics: Metrics = field(default_factory=Metrics)
    settings: dict[str, Any] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    stopped: dict[str, Any] = field(default_factory=dict)
    skips: list[dict[str, Any]] = field(default_factory=list)
    branches: list[Branch] = field(default_factory=list)
    results: list[Results] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.folder.resolve().name or str(self.folder)

    @property
    def step(self) -> int:
        """Steps done, as far as metrics or a checkpoint say."""
        return int(max(self.metrics.last("step") or 0, _whole(self.meta.get("step")) or 0))

    @property
    def tokens(self) -> int | None:
        """Input tokens seen."""
        known = [value for value in (self.metrics.last("tokens"), _whole(self.meta.get("tokens"))) if value is not None]
        return int(max(known)) if known else None

    @property
    def max_steps(self) -> int | None:
        """The run's length in steps; None if neither a checkpoint nor the settings have it."""
        return _whole(self.meta.get("max_steps")) or _whole(_inside(self.settings, "train", "max_steps"))

    @property
    def model(self) -> ModelConfig | None:
        try:
            return ModelConfig.from_dict(self.meta["model_config"])
        except (KeyError, ValueError, TypeError):
            return None

    @property
    def parameters(self) -> int | None:
        return None if (model := self.model) is None else count_parameters(model)

    @property
    def active_parameters(self) -> int | None:
        """Parameters used for a token, of a model with experts."""
        return None if (model := self.model) is None or not model.n_expert else count_active_parameters(model)

    @property
    def seconds(self) -> float | None:
        """Time spent in training steps that count, over all starts: `seconds` begins anew at each."""
        values, written = self.metrics["seconds"], self.metrics.written.get("seconds")
        if written is None or not written.any():
            return None
        seconds = values[written].tolist()
        total = seconds[-1]
        for before, after in pairwise(seconds):
            if after < before:
                total += before
        return float(total)

    @property
    def status(self) -> str:
        """Whether the run is finished, in words."""
        if self.max_steps is not None and self.step >= self.max_steps:
            return "finished"
        if self.stopped:
            return f"stopped by {self.stopped.get('signal', 'a signal')} after step {self.stopped.get('step', '?')}"
        of = "" if self.max_steps is None else f" of {self.max_steps:,}"
        return f"not finished: step {self.step:,}{of}"


def is_run(path: Path) -> bool:
    """Whether a path is a run folder."""
    return (path.is_dir() and any((path / name).is_file() for name in (METRICS, SETTINGS))) or bool(
        list_checkpoints(path)
    )


def read_run(folder: Path) -> RunFacts:
    """Read a run folder. Raises FileNotFoundError or ValueError if there is no run."""
    if not folder.exists():
        raise FileNotFoundError(f"no run at {folder}: give the folder that training wrote (--out_dir)")
    if not is_run(folder):
        raise ValueError(f"{folder} holds no run: it has neither {METRICS} nor {SETTINGS} nor a checkpoint")
    run = RunFacts(folder)
    with _Faults(run):
        if (folder / METRICS).exists():
            run.metrics = read_metrics(folder / METRICS)
    if run.metrics.left_out:
        run.faults.append(f"{METRICS}: {run.metrics.left_out} lines cannot be read and are left out")
    with _Faults(run):
        if (folder / SETTINGS).exists():
            run.settings = read_settings(folder / SETTINGS)
    for path in reversed(list_checkpoints(folder)):
        with _Faults(run):
            run.meta = Checkpoint(path).meta
            break
    with _Faults(run):
        if (folder / ENVIRONMENT).exists():
            run.starts = list(_lines(folder / ENVIRONMENT))
    with _Faults(run):
        if (folder / STOPPED).exists():
            run.stopped = read_object(folder / STOPPED)
    with _Faults(run):
        skips = read_object(folder / ORDER).get("skips") if (folder / ORDER).exists() else run.meta.get("skips")
        run.skips = [skip for skip in skips or [] if isinstance(skip, dict) and _whole(skip.get("step")) is not None]
    run.branches = list(_branches(run))
    run.results, faults = find_results(folder)
    run.faults += faults
    return run


def read_settings(path: Path) -> dict[str, Any]:
    """Read a run's config.yaml. Raises ValueError that names the file."""
    try:
        settings = yaml.safe_load(read_text(path))
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: it is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: it is no mapping of settings")
    return settings


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"train": {"max_steps": 3}} -> {"train.max_steps": 3}."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


class _Faults:
    """Keeps an error of reading as one of the run's faults."""

    def __init__(self, run: RunFacts) -> None:
        self.run = run

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if isinstance(error, (OSError, ValueError, TypeError, RecursionError)):
            message = f"{error}".splitlines()[0] if f"{error}" else type(error).__name__
            self.run.faults.append(message.replace(f"{self.run.folder}{os.sep}", ""))
            return True
        return False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; lines that are none are left out."""
    for line in read_bytes(path).splitlines():
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            yield value


def _branches(run: RunFacts) -> Iterator[Branch]:
    if not (run.folder / ABANDONED).is_dir():
        return
    for path in sorted((run.folder / ABANDONED).iterdir()):
        number, _, step = path.name.partition("-from-")
        if number.isdigit() and step.isdigit() and (path / METRICS).is_file():
            with _Faults(run):
                yield Branch(int(step), read_metrics(path / METRICS))


def find_results(top: Path) -> tuple[list[Results], list[str]]:
    """The results in a folder, of whatever depth, by step; and what could not be read."""
    found: list[Results] = []
    faults: list[str] = []
    for folder, below, names in os.walk(top):
        below[:] = sorted(b for b in below if b not in NOT_SEARCHED and checkpoint_step(Path(b)) is None)
        for name in sorted(names):
            path = Path(folder, name)
            if path.suffix != ".json" or name == STOPPED or len(found) >= MOST_RESULTS:
                continue
            try:
                if path.stat().st_size <= MOST_RESULT_BYTES and looks_like_results(path):
                    found.append(read_results(path))
            except (OSError, ValueError) as error:
                faults.append(str(error).splitlines()[0])
    return sorted(found, key=lambda results: (results.model.step or 0, results.model.name)), faults


def looks_like_results(path: Path) -> bool:
    """Whether a JSON file has the keys of results; damaged ones have not."""
    try:
        value = json.loads(read_bytes(path, MOST_RESULT_BYTES))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(value, dict) and {"format", "model", "tasks"} <= value.keys()


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _inside(nested: Any, *keys: str) -> Any:
    for key in keys:
        nested = nested.get(key) if isinstance(nested, dict) else None
    return nested
