"""Results as one page of bars (PNG): scores of tasks and their groups beside chance, and bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_eval.evaluation.table import shown_groups
from lit_eval.score.results import Group, Results
from lit_files.publish import replace_file

BAR_INCHES, PANEL_INCHES, CALIBRATION_INCHES, WIDTH_INCHES = 0.24, 0.9, 3.0, 8.27
MOST_BARS = 40  # of a panel
BLUE, CHANCE = "#0072b2", "#c24e00"


@dataclass(frozen=True)
class Bars:
    """A panel.

    Attributes:
        bars: (name, value, chance or None) of each, from the top.
        share: whether the axis runs from 0 to 1.
    """

    title: str
    label: str
    bars: list[tuple[str, float, float | None]]
    share: bool


@dataclass(frozen=True)
class Calibration:
    """A panel: the accuracy of predictions over their confidence, of which `points` has a pair for each bin."""

    title: str
    points: list[tuple[float, float]]


def panels_of(results: Results) -> list[Bars | Calibration]:
    """The panels of a page: tasks with an accuracy, the groups of each of them, then bits per byte."""
    scored = {name: r for name, r in results.tasks.items() if "accuracy" in r.metrics}
    panels: list[Bars | Calibration] = []
    if scored:
        bars = [(name, r.metrics["accuracy"], r.metrics.get("chance")) for name, r in scored.items()]
        panels.append(Bars("Tasks", "accuracy", bars, True))
    for name, result in scored.items():
        by, groups = shown_groups(result)
        if groups:
            panels.append(Bars(f"{name} by {by}", "accuracy", _bars(groups, "accuracy"), True))
    texts = {name: r for name, r in results.tasks.items() if "bits_per_byte" in r.metrics}
    if texts:
        whole: list[tuple[str, float, float | None]] = [
            (name, r.metrics["bits_per_byte"], None) for name, r in texts.items()
        ]
        panels.append(Bars("Bits per byte", "bits per byte", whole, False))
    for name, result in texts.items():
        for by, title in (("source", "source"), ("length", "length of the document (tokens)")):
            bars = _bars(result.groups.get(by, {}), "bits_per_byte")
            if len(bars) > 1:
                panels.append(Bars(f"{name} by {title}", "bits per byte", bars, False))
    for name, result in results.tasks.items():
        bins: Any = result.details.get("calibration")
        points = [(b["confidence"], b["accuracy"]) for b in bins if b.get("n")] if isinstance(bins, list) else []
        if points:
            panels.append(Calibration(f"{name}: calibration", points))
    return panels


def _bars(groups: dict[str, Group], metric: str) -> list[tuple[str, float, float | None]]:
    found = [(n, g.metrics[metric], g.metrics.get("chance")) for n, g in groups.items() if metric in g.metrics]
    return found[:MOST_BARS]


def draw(results: Results, file: Path) -> bool:
    """Draw the page; False if there is nothing to draw. Raises ValueError without matplotlib."""
    panels = panels_of(results)
    if not panels:
        return False
    try:
        from matplotlib.figure import Figure  # no pyplot: nothing global, no window
    except ImportError as error:
        raise ValueError("the picture needs matplotlib: pip install 'llammlein[plots]'") from error
    heights = [PANEL_INCHES + BAR_INCHES * len(p.bars) if isinstance(p, Bars) else CALIBRATION_INCHES for p in panels]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        if isinstance(panel, Bars):
            _draw_bars(panel, axis)
        else:
            _draw_calibration(panel, axis)
        axis.set_title(panel.title, fontsize=9, loc="left")
        axis.tick_params(axis="x", labelsize=7)
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(results.model.name)
    with replace_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def _draw_bars(panel: Bars, axis: Any) -> None:
    places: Sequence[int] = range(len(panel.bars))
    values = [value for _, value, _ in panel.bars]
    drawn = axis.barh(places, values, height=0.7, color=BLUE)
    axis.bar_label(drawn, [f"{100 * v:.1f} %" if panel.share else f"{v:.3f}" for v in values], padding=3, fontsize=7)
    for place, (_, _, chance) in zip(places, panel.bars, strict=True):
        if chance is not None:
            axis.plot([chance, chance], [place - 0.5, place + 0.5], color=CHANCE, linewidth=1.5)
    if any(chance is not None for _, _, chance in panel.bars):
        axis.plot([], [], color=CHANCE, linewidth=1.5, label="chance")
        axis.legend(loc="lower right", fontsize=7, frameon=False)
    axis.set_yticks(places, [name if len(name) <= 48 else f"{name[:45]}..." for name, _, _ in panel.bars], fontsize=7)
    axis.set_xlim(0, 1.12 if panel.share else 1.15 * max([*values, 1e-9]))
    if panel.share:
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.set_ylim(len(panel.bars) - 0.5, -0.5)
    axis.set_xlabel(panel.label, fontsize=8)


def _draw_calibration(panel: Calibration, axis: Any) -> None:
    axis.plot([0, 1], [0, 1], color=CHANCE, linewidth=1, label="calibrated")
    axis.plot(*zip(*panel.points, strict=True), color=BLUE, marker="o", markersize=4, label="model")
    axis.set(xlim=(0, 1.02), ylim=(0, 1.02))
    axis.set_xlabel("probability of the most probable token", fontsize=8)
    axis.set_ylabel("share that is right", fontsize=8)
    axis.tick_params(axis="y", labelsize=7)
    axis.legend(loc="upper left", fontsize=7, frameon=False)
