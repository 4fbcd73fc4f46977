"""Minimal pairs: is the grammatical sentence more probable than the ungrammatical one?

BLiMP: Warstadt et al. 2020, https://aclanthology.org/2020.tacl-1.25.
"""

from __future__ import annotations

from collections.abc import Sequence

from lit_eval.score.candidates import Scored, mean
from lit_eval.score.results import Group

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


def is_won(one: Scored) -> float:
    """1.0 if the good sentence is strictly more probable."""
    return float(one.candidates[0].total > one.candidates[1].total)


def macro_average(groups: dict[str, dict[str, Group]]) -> dict[str, float]:
    """`accuracy_macro`, the mean over groups; empty if the items have none of MACRO_OVER."""
    by = next((name for name in MACRO_OVER if name in groups), None)
    return {} if by is None else {"accuracy_macro": mean([g.metrics["accuracy"] for g in groups[by].values()])}
