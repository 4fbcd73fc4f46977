"""Multiple choice, cloze and last-word items, with the metrics of lm-evaluation-harness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lit_eval.score.candidates import Candidate, Scored, mean

Normalise = Callable[[Candidate, str], float]
NORMALISED: dict[str, Normalise] = {
    "accuracy": lambda candidate, choice: candidate.total,
    "accuracy_norm": lambda candidate, choice: candidate.total / len(choice),
    "accuracy_bytes": lambda candidate, choice: candidate.total / len(choice.encode("utf-8")),
    "accuracy_tokens": lambda candidate, choice: candidate.total / candidate.tokens,
}


def is_right(one: Scored, normalise: Normalise = NORMALISED["accuracy"]) -> float:
    """1.0 if the right candidate has the highest score; of equal ones the first counts, as in the harness."""
    scores = [normalise(c, text) for c, text in zip(one.candidates, one.item.choices, strict=True)]
    return float(scores.index(max(scores)) == one.item.label)


def is_greedy(one: Scored) -> float:
    """1.0 if the only candidate is the greedy continuation."""
    return float(one.candidates[0].greedy)


def chance(scored: Sequence[Scored]) -> float:
    """The accuracy of choosing at random."""
    return mean([1 / len(one.candidates) for one in scored])


def metrics_of_choice(scored: Sequence[Scored]) -> dict[str, float]:
    """Share of items whose right choice has the highest log-probability: as it is (`accuracy`, the harness' `acc`), by
    the choice's length in characters (`accuracy_norm`, its `acc_norm`), in bytes (`accuracy_bytes`, its `acc_bytes`)
    and by the number of scored tokens (`accuracy_tokens`)."""
    found = {name: mean([is_right(one, how) for one in scored]) for name, how in NORMALISED.items()}
    return {**found, "chance": chance(scored)}


def metrics_of_cloze(scored: Sequence[Scored]) -> dict[str, float]:
    """`accuracy`: share of items whose right option gives the most probable text, from the blank to its end."""
    return {"accuracy": mean([is_right(one) for one in scored]), "chance": chance(scored)}


def metrics_of_last_word(scored: Sequence[Scored]) -> dict[str, float]:
    """`accuracy`: share of items whose last word is the greedy continuation; `perplexity` of the last word, per word
    and not per token, as in LAMBADA."""
    totals = [one.candidates[0].total for one in scored]
    return {
        "accuracy": mean([is_greedy(one) for one in scored]),
        "perplexity": math.exp(min(-mean(totals), 700.0)),  # JSON knows no infinity
    }
