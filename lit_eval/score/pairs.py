"""Minimal pairs: is the grammatical sentence more probable than the ungrammatical one?

BLiMP: Warstadt et al. 2020, https://aclanthology.org/2020.tacl-1.25.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_eval.score.candidates import Scored, group, mean
from lit_eval.score.results import Result

MACRO_OVER = ("paradigm", "file", "phenomenon", "category", "field")
"""The macro average is over the groups of the first of these groupings that the items have: 67 paradigms in BLiMP."""


def metrics_of_pairs(scored: Sequence[Scored]) -> dict[str, float]:
    """`accuracy`: share of pairs whose good sentence is strictly more probable; `ties`: share with equal scores, which
    lm-evaluation-harness counts as right; `margin_nats`: mean of log p(good) - log p(bad)."""
    margins = [one.candidates[0].total - one.candidates[1].total for one in scored]
    return {
        "accuracy": mean([float(margin > 0) for margin in margins]),
        "ties": mean([float(margin == 0) for margin in margins]),
        "margin_nats": mean(margins),
        "chance": 0.5,
    }


def score_pairs(scored: Sequence[Scored]) -> Result:
    """Metrics: see `metrics_of_pairs`, and `accuracy_macro`, the mean over groups (MACRO_OVER). Items: 1 for a win."""
    groups = group(scored, metrics_of_pairs)
    metrics = metrics_of_pairs(scored)
    by = next((name for name in MACRO_OVER if name in groups), None)
    if by is not None:
        metrics["accuracy_macro"] = mean([found.metrics["accuracy"] for found in groups[by].values()])
    return Result(
        kind="pairs",
        n=len(scored),
        metrics=metrics,
        groups=groups,
        items=[float(one.candidates[0].total > one.candidates[1].total) for one in scored],
    )
