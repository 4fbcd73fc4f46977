"""Counts how often a run's tokens were seen, over its steps, and plots it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lit_data.packed.index import IntArray
from lit_data.record.reader import steps_in, stream_record
from lit_data.record.trace import TracedRun
from lit_files.progress import track

POINTS = 200  # points along the steps
MAX_TIMES = 8  # seen this often or more: one class


@dataclass(frozen=True)
class Exposures:
    """Exposure counts of the tokens of one dataset.

    Attributes:
        steps: int64 [S], steps completed, ascending from 0.
        shares: float64 [S, K + 1], share of the dataset's tokens seen exactly 0, 1, ... times by then; last column: K
            times or more; rows sum to 1. K is the largest number that occurs, at most MAX_TIMES.
    """

    path: Path
    steps: npt.NDArray[np.int64]
    shares: npt.NDArray[np.float64]


def count_exposures(run: TracedRun) -> list[Exposures]:
    """Count how often each token was an input in the first 0, 1, ... steps, per dataset. Streams the record."""
    width = -(-run.steps // POINTS)
    points = -(-run.steps // width)
    steps = np.minimum(np.arange(points + 1) * width, run.steps)
    new = np.zeros((len(run.datasets), points + 1, MAX_TIMES + 2), dtype=np.int64)
    for table in track(stream_record(run.folder, 0, run.steps), "counting", "steps", run.steps, size=steps_in):
        step, row, sample, length = (table[k].to_numpy() for k in ("step", "row", "sample", "length"))
        begins = np.flatnonzero(np.append(True, (step[1:] != step[:-1]) | (row[1:] != row[:-1])))
        tokens = np.add.reduceat(length.astype(np.int64), begins)
        dataset, times = times_seen(run, sample[begins], step[begins])
        shown = times <= MAX_TIMES
        at = (dataset[shown], step[begins][shown] // width + 1, times[shown])
        np.add.at(new, at, tokens[shown])
    found = []
    for number, packed in enumerate(run.datasets):
        at_least = np.cumsum(new[number], axis=0)  # tokens seen this often or more; column 0 counts all
        at_least[:, 0] = packed.n_tokens
        most = int(np.flatnonzero(at_least[-1])[-1])
        shares = (at_least[:, : most + 1] - at_least[:, 1 : most + 2]) / packed.n_tokens
        found.append(Exposures(packed.path, steps, shares))
    return found


def times_seen(run: TracedRun, samples: IntArray, steps: IntArray) -> tuple[IntArray, IntArray]:
    """For samples and the steps that used them: (dataset, how many times its window had been used by then, from 1).

    A window is one sample in each epoch. The number used before follows from the segments, which may skip or repeat
    samples.
    """
    mixture = run.mixture
    datasets, epochs, windows = mixture.locate(samples)
    times = np.ones_like(samples)
    ordered = sorted(run.segments, key=lambda s: s.from_step)
    ends = [*(s.from_step for s in ordered[1:]), run.steps]
    firsts = [s.first_sample for s in ordered]
    stop = max(s.first_sample + (end - s.from_step) * s.global_batch for s, end in zip(ordered, ends, strict=True))
    for number in np.unique(datasets).tolist():
        n_epochs = -(-int(mixture.counts(stop)[number]) // mixture.orders[number].n_windows)
        for epoch in range(n_epochs):
            # If samples only ascend, no later epoch was used before.
            mine = (datasets == number) & (epochs >= epoch if firsts == sorted(firsts) else True)
            here = np.flatnonzero(mine)
            other = mixture.sample(number, np.full(len(here), epoch, dtype=np.int64), windows[here])
            for segment, end in zip(ordered, ends, strict=True):
                offset = other - segment.first_sample
                used = segment.from_step + offset // segment.global_batch
                times[here] += (offset >= 0) & (used < np.minimum(end, steps[here]))
    return datasets, times


def draw_exposures(exposures: Sequence[Exposures], file: Path) -> None:
    """Plot one panel per dataset: stacked shares of its tokens seen 0, 1, 2, ... times, over the steps."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--picture needs matplotlib: pip install 'llammlein[plots]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(len(exposures), 1, figsize=(8, 3 * len(exposures)), squeeze=False, sharex=True)
    for panel, seen in zip(panels[:, 0], exposures, strict=True):
        most = seen.shares.shape[1] - 1
        labels = ["never", "once", *(f"{n} times" for n in range(2, most + 1))][: most + 1]
        if most == MAX_TIMES:
            labels[-1] += " or more"
        colours = pyplot.get_cmap("viridis")(np.linspace(0.9, 0.1, max(most, 1)))
        panel.stackplot(seen.steps, seen.shares.T, labels=labels, colors=["0.9", *colours])
        panel.set(title=f"{seen.path.parent.name}/{seen.path.name}", ylabel="share of tokens", ylim=(0, 1))
        panel.set_xlim(0, int(seen.steps[-1]))
        panel.legend(loc="center left", bbox_to_anchor=(1, 0.5), title="seen", frameon=False)
    panels[-1, 0].set_xlabel("steps")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
