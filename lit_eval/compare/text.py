"""A comparison as text for the terminal, and as JSON."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from lit_eval.compare.comparison import MISSING, Comparison, Score
from lit_eval.compare.statistics import PairedTest
from lit_eval.formats import duration, loss, number, perplexity, short, whole


def as_text(comparison: Comparison) -> str:
    """Tables: ranks and sizes, scores with intervals, paired tests, settings that differ."""
    entries = comparison.entries
    parts = [
        _table(
            [
                "",
                "name",
                "val loss",
                "perplexity",
                "bits/byte",
                "train loss",
                "tokens",
                "parameters",
                "tokens/s",
                "time",
            ],
            [
                [
                    f"{i}." if e.val_loss is not None else "",
                    e.name,
                    loss(e.val_loss),
                    number(perplexity(e.val_loss)),
                    loss(e.val_bits_per_byte),
                    loss(e.train_loss),
                    short(e.tokens),
                    short(e.parameters),
                    whole(e.tokens_per_s),
                    duration(e.seconds),
                ]
                for i, e in enumerate(entries, start=1)
            ],
            left=2,
        )
    ]
    if comparison.tasks:
        rows = [
            [f"{t.name} ({t.metric})", *map(score_text, t.scores), "" if (b := t.best()) is None else entries[b].name]
            for t in comparison.tasks
        ]
        parts.append("Scores, with 95 % bootstrap intervals\n" + _table(["", *(e.name for e in entries), "best"], rows))
    if comparison.tests:
        rows = [
            [
                test.task,
                f"{test.first} - {test.second}",
                difference_text(test.result),
                f"{test.result.wins}:{test.result.losses}",
                p_text(test.result.p),
                p_text(test.adjusted),
                test.result.test,
            ]
            for test in comparison.tests
        ]
        head = ["task", "pair", "difference", "better:worse", "p", "p (Holm)", "test"]
        parts.append("Paired tests on the same items\n" + _table(head, rows, left=2))
    if comparison.settings:
        rows = [[flag, *map(str, values)] for flag, values in comparison.settings.items()]
        parts.append("Settings that differ\n" + _table(["", *(e.name for e in entries)], rows))
    parts += [f"note: {remark}" for remark in comparison.remarks]
    return "\n\n".join(parts)


def score_text(score: Score | None) -> str:
    if score is None:
        return "–"
    if score.interval is None:
        return f"{number(score.value)} ({score.no_interval})" if score.no_interval else number(score.value)
    return f"{number(score.value)} [{number(score.interval.low)}, {number(score.interval.high)}]"


def difference_text(test: PairedTest) -> str:
    found = test.difference
    shown = f"({test.no_interval})" if test.no_interval else f"[{number(found.low, 3)}, {number(found.high, 3)}]"
    return f"{number(found.mean, 3)} {shown}"


def p_text(p: float) -> str:
    return "<0.0001" if p < 1e-4 else f"{p:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Align columns to their widest cell: the first `left` columns on the left, the others on the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def as_json(comparison: Comparison) -> Any:
    """The comparison as JSON; NaN and infinity become null."""
    entries = []
    for rank, e in enumerate(comparison.entries, start=1):
        facts = {f: getattr(e, f) for f in ("name", "parameters", "tokens", "step", "val_loss", "val_bits_per_byte")}
        facts |= {f: getattr(e, f) for f in ("train_loss", "tokens_per_s", "seconds")}
        facts["perplexity"] = perplexity(e.val_loss)
        entries.append({"rank": rank if e.val_loss is not None else None, "path": str(e.path), **facts})
    return _finite(
        {
            "entries": entries,
            "scores": [
                {
                    "task": task.name,
                    "metric": task.metric,
                    "lower_is_better": task.lower_is_better,
                    "best": None if (best := task.best()) is None else comparison.entries[best].name,
                    "by_entry": {
                        e.name: dataclasses.asdict(s) if s is not None else None
                        for e, s in zip(comparison.entries, task.scores, strict=True)
                    },
                }
                for task in comparison.tasks
            ],
            "tests": [dataclasses.asdict(test) for test in comparison.tests],
            "settings": {
                flag: {
                    e.name: value for e, value in zip(comparison.entries, values, strict=True) if value is not MISSING
                }
                for flag, values in comparison.settings.items()
            },
            "remarks": comparison.remarks,
        }
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
