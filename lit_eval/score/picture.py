"""Results as one page of bars (PNG): scores of tasks and their groups beside chance, and bits per byte."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_eval.score.results import Group, Results
from lit_eval.score.table import shown_groups
from lit_files.publish import replace_file

BAR_INCHES, PANEL_INCHES, WIDTH_INCHES = 0.24, 0.9, 8.27
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


def panels_of(results: Results) -> list[Bars]:
    """The panels of a page: tasks with an accuracy, the groups of each of them, then bits per byte."""
    scored = {name: r for name, r in results.tasks.items() if "accuracy" in r.metrics}
    panels = []
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
    heights = [PANEL_INCHES + BAR_INCHES * len(panel.bars) for panel in panels]
    figure = Figure(figsize=(WIDTH_INCHES, sum(heights) + 0.5), layout="constrained")
    axes = figure.subplots(len(panels), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    for panel, axis in zip(panels, axes, strict=True):
        _draw_panel(panel, axis)
    figure.suptitle(results.model.name)
    with replace_file(file) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
    return True


def _draw_panel(panel: Bars, axis: Any) -> None:
    places: Sequence[int] = range(len(panel.bars))
    values = [value for _, value, _ in panel.bars]
    drawn = axis.barh(places, values, height=0.7, color=BLUE)
    axis.bar_label(drawn, [f"{100 * v:.1f} %" if panel.share else f"{v:.3f}" for v in values], padding=3, fontsize=7)
    for place, (_, _, chance) in zip(places, panel.bars, strict=True):
        if chance is not None:
            axis.plot([chance, chance], [place - 0.45, place + 0.45], color=CHANCE, linewidth=1.5)
    if any(chance is not None for _, _, chance in panel.bars):
        axis.plot([], [], color=CHANCE, linewidth=1.5, label="chance")
        axis.legend(loc="lower right", fontsize=7, frameon=False)
    axis.set_yticks(places, [name if len(name) <= 48 else f"{name[:45]}..." for name, _, _ in panel.bars], fontsize=7)
    axis.set_xlim(0, 1.12 if panel.share else 1.15 * max([*values, 1e-9]))
    if panel.share:
        axis.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axis.invert_yaxis()
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.set_xlabel(panel.label, fontsize=8)
    axis.tick_params(axis="x", labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
