"""Plots scores over tokens seen, several runs in one picture, with bootstrap bands (as in LLäMmlein's paper)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_eval.compare.comparison import score_of
from lit_eval.compare.entries import Entry

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A run's scores on a task.

    Attributes:
        x: tokens seen, or steps where a checkpoint's tokens are not known; ascending.
        values, low, high: the score and its 95 % interval; equal where there is none.
    """

    name: str
    x: FloatArray
    values: FloatArray
    low: FloatArray
    high: FloatArray


@dataclass(frozen=True)
class TaskCurves:
    """A task's curves. `unit`: title of the x axis, tokens or steps."""

    task: str
    metric: str
    unit: str
    curves: list[Curve]


def learning_curves(entries: Sequence[Entry], seed: int = 0) -> list[TaskCurves]:
    """The curves of tasks for which an entry has results of at least two checkpoints."""
    names = dict.fromkeys(task for entry in entries for results in entry.results for task in results.tasks)
    with_tokens = all(results.model.tokens is not None for entry in entries for results in entry.results)
    found = []
    for task in names:
        curves = []
        metric = next(m for e in entries for r in e.results if task in r.tasks for m in [*r.tasks[task].metrics, ""])
        for entry in entries:
            points = []
            for results in entry.results:
                at = results.model.tokens if with_tokens else results.model.step
                score = score_of(results.tasks.get(task), metric, seed)
                if at is not None and score is not None and math.isfinite(score.value):
                    low, high = (score.interval.low, score.interval.high) if score.interval else (score.value,) * 2
                    points.append((float(at), score.value, low, high))
            if points:
                curves.append(Curve(entry.name, *np.array(sorted(points)).T))
        if any(len(curve.x) > 1 for curve in curves):
            found.append(TaskCurves(task, metric, "Tokens seen" if with_tokens else "Steps", curves))
    return found


def draw(tasks: Sequence[TaskCurves], file: Path) -> None:
    """Draw one panel a task; the file's suffix decides the format. Raises ValueError without matplotlib."""
    if not tasks:
        raise ValueError(
            "--png: no learning curve, since no run has results of two checkpoints; write them with "
            "scripts/evaluate.py --all_checkpoints RUN"
        )
    try:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no window
    except ImportError as error:
        raise ValueError("--png needs matplotlib: pip install 'llammlein[plots]'") from error
    across = min(2, len(tasks))
    down = -(-len(tasks) // across)
    figure = Figure(figsize=(6 * across, 3.6 * down), layout="constrained")
    panels = figure.subplots(down, across, squeeze=False)
    colours = ["#0072b2", "#c24e00", "#007a5a", "#a8498a", "#806000", "#4a4f57"]
    names = list(dict.fromkeys(curve.name for task in tasks for curve in task.curves))
    for panel, task in zip(panels.flat, tasks, strict=False):
        for curve in task.curves:
            number = names.index(curve.name)
            colour, pattern = colours[number % 6], ("-", "--", ":")[min(number // 6, 2)]
            panel.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.13, linewidth=0)
            panel.plot(curve.x, curve.values, pattern, color=colour, marker="o", markersize=3.5, label=curve.name)
        panel.set(title=task.task, ylabel=task.metric.replace("_", " "), xlabel=task.unit)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9")
        panel.set_axisbelow(True)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    lines: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, handle)
    figure.legend([*lines.values()], [*lines], loc="outside lower center", ncols=min(4, len(lines)), frameon=False)
    figure.suptitle("Score over training; bands: 95 % bootstrap intervals over items", fontsize="medium")
    figure.savefig(file, dpi=150)
