"""The facts of a revision's card: losses, results, hardware and device hours, as the run recorded them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from lit_eval.metrics_file import Metrics
from lit_eval.run_facts import EVALUATION_COLUMN, RunFacts, parse_settings
from lit_eval.score.results import Results
from pretrain.convert.export import CardAdditions
from pretrain.release.manifest import MANIFEST, Previous

NO_REPO = "FOLDER"  # in the card's command, where no repository is named
SHOWN_METRICS = ("train_loss", "val_loss", "val_bits_per_byte")
LABELS = {
    "train_loss": "Training loss (nats per token)",
    "val_loss": "Validation loss (nats per token)",
    "val_bits_per_byte": "Validation bits per byte",
}


def card_additions(
    cut: RunFacts,
    results: Sequence[Results],
    revision: str,
    repo: str | None,
    licence: str | None,
    previous: Previous | None,
) -> CardAdditions:
    """The additions to a revision's model card.

    Args:
        cut: the revision's run/ folder, which ends at its step.
        results: of its checkpoint.
        licence: for the card's front matter; None leaves it out.
    """
    facts = [("Revision", f"`{revision}`")]
    if (words := cut.meta.get("words")) is not None:
        facts.append(("Words seen", f"{words:,}"))
    for name in SHOWN_METRICS:
        if (value := cut.metrics.last(name)) is not None:
            step = cut.metrics["step"][np.isfinite(cut.metrics[name])][-1]
            facts.append((LABELS[name], f"{value:.4f}" + (f" (at step {step:.0f})" if step != cut.step else "")))
    facts += hardware(cut)
    chain = f"The manifest before it is that of `{previous.revision}`, `{previous.sha256}`." if previous else ""
    where = repo or NO_REPO
    check = (
        "## Checking this revision\n\n"
        f"`{MANIFEST}` lists the SHA-256 of every file, of the record of the training data up to this step, and of the "
        f"manifest before it; `run/` holds the record, the settings and the metrics. {chain}\n\n"
        f"```\npython scripts/publish.py --verify {where}\n```"
    )
    stated = {} if licence is None else {"license": licence}
    return CardAdditions(stated, facts, [check, *results_section(cut, results)])


def stated_options(card: str, source: str) -> dict[str, str | None]:
    """The options of publish.py that a revision's card states: `license` and `repo`, None if it does not.

    Raises ValueError naming `source` for a card without front matter.
    """
    _, front, text = [*card.split("---\n", 2), "", ""][:3]
    licence = parse_settings(front.encode(), source).get("license")
    repo = re.search(r"^python scripts/publish\.py --verify (\S+)$", text, re.MULTILINE)
    return {
        "license": None if licence is None else str(licence),
        "repo": None if repo is None or repo[1] == NO_REPO else repo[1],
    }


def hardware(cut: RunFacts) -> Iterator[tuple[str, str]]:
    """Devices of the newest start, and device hours, as far as the run recorded them."""
    if not cut.starts:
        return
    last = cut.starts[-1]
    gpus, world_size, hosts = last.get("gpus"), last.get("world_size"), last.get("hosts")
    if isinstance(world_size, int):
        device = ", ".join(gpus) if gpus else f"CPU processes ({last.get('cpu') or 'unknown model'})"
        on = f" on {len(hosts)} hosts" if isinstance(hosts, list) and len(hosts) > 1 else ""
        yield "Hardware", f"{world_size} x {device}{on}"
    spent = cut.spent("device_seconds")
    hours = device_hours(cut.metrics, cut.starts) if spent is None else spent / 3600
    if hours is not None:
        yield "Device hours of training steps", f"{hours:,.2f}"
        if gpus and isinstance(watts := last.get("gpu_power_limit_w"), float):
            energy = f"at most {hours * watts / 1000:,.1f} kWh at the GPUs' power limit of {watts:.0f} W"
            yield "Energy of training steps", f"{energy}, without hosts and cooling"


def device_hours(metrics: Metrics, starts: list[dict[str, Any]]) -> float | None:
    """Hours that all ranks together spent in training steps, over all starts; None if the run did not record them.

    From the rows of metrics.csv, for a run whose checkpoints do not have them.

    The column `seconds` restarts from 0 at each start, whose line in environment.jsonl has the number of ranks.
    """
    written = metrics.written.get("seconds")
    if written is None or not written.any():
        return None
    steps, seconds = metrics["step"][written].tolist(), metrics["seconds"][written].tolist()
    begins: list[tuple[int, int]] = []
    for start in starts:
        step, ranks = start.get("step"), start.get("world_size")
        if not isinstance(step, int) or not isinstance(ranks, int):
            return None
        begins.append((step, ranks))
    if not begins:
        return None

    def ranks_at(done: float) -> int:
        return next((ranks for begin, ranks in reversed(begins) if begin < done), begins[0][1])

    total = seconds[0] * ranks_at(steps[0])
    for (_, before), (done, now) in pairwise(zip(steps, seconds, strict=True)):
        total += (now - before if now >= before else now) * ranks_at(done)
    return float(total) / 3600


def results_section(cut: RunFacts, results: Sequence[Results]) -> Iterator[str]:
    """The results of this step's checkpoint, one row per task and metric."""
    rows = [
        f"| {task} | {metric} | {value:.4f} | {result.n:,} |"
        for some in results
        for task, result in some.tasks.items()
        for metric, value in result.metrics.items()
    ]
    steps = cut.metrics["step"]
    for column, values in cut.metrics.columns.items():
        if column.startswith(EVALUATION_COLUMN) and len(steps) and np.isfinite(values[-1]):
            rows.append(f"| {column.removeprefix(EVALUATION_COLUMN)}, evaluated in training | | {values[-1]:.4f} | |")
    if rows:
        yield "\n".join(["## Evaluation", "", "| task | metric | value | items |", "|---|---|---|---|", *rows])
