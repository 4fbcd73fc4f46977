"""Words that a run has seen, and the steps at which it reaches its word budgets (--save.at_words)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from lit_data.loading.order import Segment, first_sample_of_step
from lit_data.loading.words import DatasetWords, words_between
from lit_files.checkpoint_name import budget_name, checkpoint_step
from pretrain.args import RunArgs
from pretrain.checkpoint.contents import word_budgets_in
from pretrain.data import Data
from pretrain.logs.messages import warn
from pretrain.run import Progress, Run

MOST_EPOCHS = 10  # BabyLM's rule since 2025: at most ten passes over the training text


@dataclass
class WordBudgets:
    """Steps at which checkpoints are kept.

    Attributes:
        at: budgets by the first step at or past them.
        kept: steps of checkpoints that retention must not delete, those of `at` included.
        evaluated: steps after which --eval.tasks_every_words evaluates.
        notes: warnings.
    """

    at: dict[int, list[int]] = field(default_factory=dict)
    kept: set[int] = field(default_factory=set)
    evaluated: set[int] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)


def count_words(args: RunArgs, data: Data) -> list[DatasetWords]:
    """The words of each dataset; empty if those of one are not known.

    With a setting that needs them ValueError is raised instead, also for a damaged table of documents, which is
    otherwise a warning.
    """
    needed = bool(args.save.at_words or args.eval.tasks_every_words)
    if args.data.mock or (not needed and any(d.manifest.words is None for d in data.train)):
        return []
    try:
        return [DatasetWords(rows, order) for rows, order in zip(data.rows, data.mixture.orders, strict=True)]
    except (ValueError, OSError) as error:
        if needed:
            raise
        warn(f"words are not counted: {error}")
        return []


def words_after(words: list[DatasetWords], data: Data, progress: Progress, step: int) -> int:
    """Words seen in the first `step` steps of the run; samples left out after a loss spike are not.

    `progress` gives the order, and the words of a step before, counted in the data that the run had then.
    """
    begun, seen = progress.words_at
    first_of: dict[int, Segment] = {}
    for segment in progress.segments:
        if segment.from_step < step:
            first_of.setdefault(segment.from_step, segment)  # of two at one step the first holds, as in `segment_of`
    for segment, following in pairwise([*first_of.values(), Segment(step, 0, 1)]):
        first_step = max(segment.from_step, begun)
        if first_step < following.from_step:
            bounds = [
                segment.first_sample + (s - segment.from_step) * segment.global_batch
                for s in (first_step, following.from_step)
            ]
            if data.end_sample is not None:
                bounds = [min(sample, data.end_sample) for sample in bounds]
            seen += words_between(words, data.mixture, bounds[0], bounds[1])
    return seen


def words_seen(run: Run) -> int | None:
    """Words seen so far; None if unknown, and on ranks other than 0."""
    return words_after(run.words, run.data, run, run.step) if run.words else None


def plan_budgets(args: RunArgs, data: Data, progress: Progress, words: list[DatasetWords], folder: Path) -> WordBudgets:
    """Find the step of each budget from `progress` on, and the checkpoints in the run folder that must be kept.

    A budget that was passed earlier has a checkpoint already, or is missed.
    """
    plan = WordBudgets(notes=epoch_notes(data, progress) if args.save.at_words else [])
    old = word_budgets_in(folder) if args.save.at_words or args.save.keep_last else {}
    had = {budget: step for budget, path in old.items() if (step := checkpoint_step(path) or 0) <= progress.step}
    plan.kept |= set(had.values())
    for budget, step in had.items():
        plan.at.setdefault(step, []).append(budget)
    if not words:
        return plan

    def after(step: int) -> int:
        return words_after(words, data, progress, step)

    now, end, step = after(progress.step), after(data.max_steps), progress.step
    missed = [b for b in args.save.word_budgets if b <= now and b not in had]
    beyond = [b for b in args.save.word_budgets if b > end]
    for budget in args.save.word_budgets:
        if now < budget <= end:
            step = first_step(after, budget, step, data.max_steps)
            plan.at.setdefault(step, []).append(budget)
            plan.kept.add(step)
    step, every = progress.step, args.eval.tasks_every_words
    for multiple in range((now // every + 1) * every, end + 1, every) if every else ():
        step = first_step(after, multiple, step, data.max_steps)
        plan.evaluated.add(step)
    if missed:
        plan.notes.append(f"--save.at_words {names(missed)}: passed before step {progress.step}; no checkpoint is kept")
    if beyond:
        plan.notes.append(f"--save.at_words {names(beyond)}: not reached, the run ends after {end:,} words")
    if not all(dataset.exact for dataset in words):
        plan.notes.append("words seen are estimated from the mean of a row: the data is too large to count each row")
    return plan


def first_step(after: Callable[[int], int], budget: int, low: int, high: int) -> int:
    """The first step in [low, high] after which at least `budget` words were seen; `after(high)` is enough."""
    return bisect_left(range(high), budget, lo=low, key=after)


def epoch_notes(data: Data, progress: Progress) -> list[str]:
    """A warning for a run of more than MOST_EPOCHS epochs, which BabyLM's rules exclude."""
    epochs = data.epochs(first_sample_of_step(progress.segments, data.max_steps)[0])
    worst = max(range(len(epochs)), key=lambda d: epochs[d])
    if epochs[worst] <= MOST_EPOCHS:
        return []
    return [
        f"the run passes {epochs[worst]:.4g} times over {data.train[worst].path}; BabyLM allows at most {MOST_EPOCHS} "
        "epochs"
    ]


def names(budgets: Sequence[int]) -> str:
    """The first of many budgets, readable."""
    shown = ", ".join(budget_name(b) for b in budgets[:3])
    return shown if len(budgets) <= 3 else f"{shown} and {len(budgets) - 3} more"
