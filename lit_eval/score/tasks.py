"""Finds a task by name or path, and runs it. Needs a `Scorer` only, so that it also works inside training."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from pathlib import Path

from lit_eval.model.likelihood import Scorer
from lit_eval.model.text_encoder import TextEncoder
from lit_eval.score.candidates import Candidate, Metrics, Scored, group
from lit_eval.score.choice import is_greedy, is_right, metrics_of_choice, metrics_of_cloze, metrics_of_last_word
from lit_eval.score.german_pairs import german_pairs
from lit_eval.score.pairs import is_won, macro_average, metrics_of_pairs
from lit_eval.score.results import Result
from lit_eval.score.task_files import Kind, Task, is_task_file, read_task, task_of_records
from lit_files.near_names import did_you_mean

NAMED: dict[str, Callable[[], Task]] = {
    "german_pairs": lambda: task_of_records(german_pairs(), "german_pairs", "lit_eval/score/german_pairs.py"),
}
"""Tasks that come with the code: name -> how to make it."""

_KINDS: dict[Kind, tuple[Metrics, Callable[[Scored], float]]] = {
    "pairs": (metrics_of_pairs, is_won),
    "choice": (metrics_of_choice, is_right),
    "cloze": (metrics_of_cloze, is_right),
    "last_word": (metrics_of_last_word, is_greedy),
}
"""The metrics of items of a kind, and the score of one item."""


def find_task(given: str | Path, others: Collection[str] = ()) -> Task:
    """A task by name (NAMED), or from a task file or a folder of them.

    Args:
        others: names that the caller knows beside NAMED, for the message about an unknown one.

    Raises ValueError or FileNotFoundError: an unknown name, with the nearest ones, or a fault in a file.
    """
    name = str(given)
    if name in NAMED:
        return NAMED[name]()
    if Path(given).exists() or is_task_file(Path(given)) or "/" in name:
        return read_task(given)
    raise ValueError(unknown_task(name, {*NAMED, *others}))


def unknown_task(name: str, known: Collection[str]) -> str:
    """The message about a name that is neither a task nor a path."""
    names = ", ".join(sorted(known)) or "none"
    return f"there is no task or file {name!r}{did_you_mean(name, sorted(known))} Tasks: {names}; or give a task file"


def run_task(task: Task, scorer: Scorer, encoder: TextEncoder) -> Result:
    """Score a task's items, on every rank of `scorer.ranks` alike.

    Items with a candidate that has no token, or more than the model's context, are left out: `source.n_skipped` counts
    them and `source.skipped` says why. Raises ValueError if no item can be scored.

    Returns:
        The task's metrics and groups (see lit_eval/score/pairs.py and choice.py); one item score for each scored item.
    """
    begun = time.monotonic()
    pairs = [candidate for item in task.items for candidate in item.candidates]
    spans = iter(encoder.spans(pairs))
    skipped: dict[str, int] = {}
    kept = []
    for item in task.items:
        own = [next(spans) for _ in item.candidates]
        found = [span for span in own if span is not None]
        if len(found) < len(own):
            reason = "a text without a token to score"
        elif max(len(span.continuation) for span in found) > scorer.block_size:
            reason = f"a text to score of more than the model's context of {scorer.block_size} tokens"
        else:
            kept.append((item, found))
            continue
        skipped[reason] = skipped.get(reason, 0) + 1
    if not kept:
        why = "; ".join(f"{n} with {reason}" for reason, n in skipped.items())
        raise ValueError(f"{task.file}: none of the {len(task.items)} items can be scored: {why}")
    scores = iter(scorer.score([span for _, found in kept for span in found]))
    scored = []
    for item, found in kept:
        own_scores = [next(scores) for _ in found]
        scored.append(Scored(item, tuple(Candidate(s.total, len(s.log_probabilities), s.greedy) for s in own_scores)))
    metrics, score = _KINDS[task.kind]
    groups = group(scored, metrics)
    macro = macro_average(groups) if task.kind == "pairs" else {}
    result = Result(task.kind, len(scored), metrics(scored) | macro, groups, [score(one) for one in scored])
    result.source = {"file": task.file, "sha256": task.sha256, "n_items": len(task.items)}
    if skipped:
        result.source |= {"n_skipped": sum(skipped.values()), "skipped": skipped}
    result.seconds = time.monotonic() - begun
    return result
