"""Results as text: a table for the terminal, and the generated samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lit_eval.score.results import Group, Result, Results

SHARES = ("accuracy", "ties", "chance", "share")
MOST_METRICS = 5
MOST_GROUPS = 30
HIDDEN = {"nats", "tokens", "bytes", "first_token_nats", "end_nats"}
GROUPED_BY = ("phenomenon", "category", "source", "file", "field")
"""The grouping to show: the first of these that a result has."""


def format_metric(name: str, value: float) -> str:
    """`accuracy 71.2 %`, `bits_per_byte 1.2345`."""
    if name.startswith(SHARES) or name.endswith(("_share", "_rate")):
        return f"{name} {100 * value:.1f} %"
    if abs(value) >= 1e6:
        return f"{name} {value:.3g}"
    return f"{name} {value:,.0f}" if abs(value) >= 1e4 or value == int(value) else f"{name} {value:.4g}"


def shown_metrics(metrics: Mapping[str, float]) -> list[str]:
    """The first metrics of a result that are more than a sum."""
    return [format_metric(name, value) for name, value in metrics.items() if name not in HIDDEN][:MOST_METRICS]


def shown_groups(result: Result) -> tuple[str, dict[str, Group]]:
    """The grouping to show and its groups; empty if there is none with several."""
    by = next((name for name in GROUPED_BY if len(result.groups.get(name, {})) > 1), "")
    return by, result.groups.get(by, {})


def table_of(results: Results) -> str:
    """A line for each task, and for the groups of its main grouping."""
    rows: list[tuple[str, str, str]] = []
    for name, result in results.tasks.items():
        rows.append((name, f"{result.n:,}", ", ".join(shown_metrics(result.metrics))))
        _, groups = shown_groups(result)
        for group_name, group in list(groups.items())[:MOST_GROUPS]:
            first = next(iter(group.metrics.items()), None)
            rows.append((f"  {group_name}", f"{group.n:,}", format_metric(*first) if first else ""))
        if len(groups) > MOST_GROUPS:
            rows.append((f"  and {len(groups) - MOST_GROUPS} more", "", ""))
    model = results.model
    size = f"{model.parameters:,} parameters" + (f", {model.tokens:,} tokens" if model.tokens is not None else "")
    if not rows:
        return f"{model.name} ({size}): no results"
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)]
    lines = [f"{name:{widths[0]}}  {n:>{widths[1]}}  {text}".rstrip() for name, n, text in rows]
    return "\n".join([f"{model.name} ({size})", *lines])


def samples_of(results: Results) -> str:
    """The texts that tasks generated, as kept in `details.samples`; empty if there are none."""
    parts = []
    for name, result in results.tasks.items():
        samples: Any = result.details.get("samples", [])
        for number, sample in enumerate(samples if isinstance(samples, list) else [], start=1):
            prompt, text = (sample.get("prompt"), sample.get("text")) if isinstance(sample, dict) else ("", sample)
            if isinstance(text, str):
                parts.append(f"=== {name}, sample {number}\n{f'[{prompt}]' if prompt else ''}{text}\n")
    return "\n".join(parts)
