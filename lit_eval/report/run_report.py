"""The report of one run."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lit_data.record.seen import MAX_TIMES, Seen, count_seen
from lit_data.record.trace import open_run
from lit_eval.compare.entries import Entry
from lit_eval.compare.learning_curves import learning_curves
from lit_eval.formats import duration, loss, number, percent, perplexity, short, whole
from lit_eval.metrics_file import FloatArray, Metrics
from lit_eval.report.charts import Chart, Line, Mark
from lit_eval.report.defaults import RECORD_S
from lit_eval.report.elements import (
    Cell,
    Column,
    Section,
    bar_cell,
    details,
    escape,
    number_cell,
    pairs,
    paragraph,
    table,
    text_cell,
    tiles,
)
from lit_eval.report.page import fit, page
from lit_eval.report.plan_table import plan_table
from lit_eval.run_facts import EVALUATION_COLUMN, RunFacts, Sample, flatten, read_run
from lit_eval.score.results import Results
from lit_eval.spikes import LossSpike, find_spikes

RESULTS_S = 2.0  # for reading results
MOST_MARKS = 40  # resumes and rollbacks drawn in a chart
MOST_SOURCES = 20
MOST_SAMPLES = 60
SAMPLE_CHARACTERS = 1200
SETTING_CHARACTERS = 400

# Columns of metrics.csv with a chart of their own place; any other column is drawn under Evaluation.
LOSS_COLUMNS = ("train_loss", "val_loss", "val_perplexity", "val_bits_per_byte", "total_loss")
ROUTER = ("expert_load_max", "expert_load_min", "router_entropy", "load_balance_loss")
KNOWN = {
    *("step", "tokens", "words", "lr", "grad_norm", "skipped", "loss_scale", "tokens_per_s", "mfu", "mfu_causal"),
    *("memory_gib", "seconds", "alpha", "divergence", *LOSS_COLUMNS, *ROUTER),
}


def run_report(folder: Path, defaults: Mapping[str, Any] | None = None, record_s: float = RECORD_S) -> str:
    """The HTML report of a run folder, under 2 MB.

    Args:
        defaults: flag -> default of the trainer, to show first what differs.
        record_s: time limit for reading the record, in seconds; the report says if only a part was read.

    Raises FileNotFoundError or ValueError if there is no run.
    """
    run = read_run(folder, RESULTS_S)
    seen, reason = _seen(run, record_s)
    return fit(lambda points: _build(run, defaults, seen, reason, points))


def _seen(run: RunFacts, record_s: float) -> tuple[Seen | None, str]:
    """The data that the run has seen, by its record; or the reason why that is unknown."""
    try:
        return count_seen(open_run(run.folder), time.monotonic() + record_s), ""
    except (ValueError, OSError) as error:
        return None, str(error).splitlines()[0]


def _build(run: RunFacts, defaults: Mapping[str, Any] | None, seen: Seen | None, reason: str, points: int) -> str:
    sections = [
        Section("loss", "Loss", _loss(run, points)),
        Section("evaluation", "Evaluation", _evaluation(run, points)),
        Section("optimisation", "Optimisation", _optimisation(run, points)),
        Section("speed", "Speed and memory", _speed(run, points)),
        Section("data", "Data", _data(seen, reason)),
        Section("events", "Events", _events(run)),
        Section("samples", "Samples", samples_section(run.samples)),
        Section("settings", "Settings", _settings(run, defaults)),
        Section("environment", "Environment", _environment(run)),
    ]
    state = run.status[0].upper() + run.status[1:]
    if started := [start["time"] for start in run.starts if isinstance(start.get("time"), str)]:
        state += f" · started {started[0][:16].replace('T', ' ')} UTC"
    return page("Training run", run.name, state, _head(run), sections, [f"{fault}." for fault in run.faults])


def _head(run: RunFacts) -> str:
    m = run.metrics
    val, train = m.last("val_loss"), m.last("train_loss")
    best = m.best("val_loss")
    remark = f"perplexity {number(perplexity(val))}" if val is not None else ""
    if val is not None and best is not None and best < val:
        remark += f"; lowest {loss(best)}"
    of = f"of {run.max_steps:,}" if run.max_steps else ""
    words = m.last("words")
    return tiles(
        [
            ("Validation loss", loss(val), remark),
            ("Training loss", loss(train), f"perplexity {number(perplexity(train))}"),
            ("Bits per byte", loss(m.last("val_bits_per_byte")), "validation"),
            ("Tokens seen", short(run.tokens), f"{short(words)} words" if words is not None else whole(run.tokens)),
            ("Steps", whole(run.step), of),
            (
                "Parameters",
                short(run.parameters),
                f"{short(run.active_parameters)} for a token" if run.active_parameters else whole(run.parameters),
            ),
            ("Tokens per second", whole(m.median("tokens_per_s")), "median"),
            ("Model FLOPs utilisation", percent(m.median("mfu")), "median"),
            ("Time", duration(run.seconds), f"{len(run.starts)} starts" if len(run.starts) > 1 else ""),
        ]
    )


def horizontal(m: Metrics) -> tuple[FloatArray, str]:
    """The horizontal axis of the charts: tokens, or steps where the metrics have no tokens."""
    return (m["tokens"], "Tokens seen") if m.has("tokens") else (m["step"], "Steps")


def line_of(m: Metrics, column: str, name: str, colour: int = 1, *, noisy: bool = False, dots: bool = False) -> Line:
    """A column of the metrics over tokens."""
    x, _ = horizontal(m)
    keep = m.written.get(column, np.zeros(len(m), dtype=bool)) & np.isfinite(x)
    return Line(name, x[keep], m[column][keep], m["step"][keep], colour, noisy, dots)


def _marks(run: RunFacts) -> list[Mark]:
    """Resumes and rollbacks, at the tokens seen by then."""
    m = run.metrics
    x, _ = horizontal(m)
    known = np.isfinite(x)
    if not known.any():
        return []
    steps, places = m["step"][known], x[known]
    resumes = [start.get("step") for start in run.starts[1:]]
    rollbacks = [skip["step"] for skip in run.skips]
    at = [(step, "rollback") for step in rollbacks] + [(step, "resume") for step in resumes if step not in rollbacks]
    found: list[Mark] = []
    for step, kind in at[:MOST_MARKS]:
        if isinstance(step, (int, float)) and 0 < step <= steps[-1]:
            place = float(np.interp(step, steps, places))
            found.append(Mark(place, "rollback" if kind == "rollback" else "resume"))
    return found


def _end(m: Metrics) -> float:
    """How far the charts of a run reach."""
    x, _ = horizontal(m)
    return float(np.nanmax(x)) if np.isfinite(x).any() else 0.0


def _rendered(charts: Sequence[Chart], m: Metrics, points: int) -> list[str]:
    """The charts that have something to show, all over the same tokens."""
    return [html for chart in charts if (html := dataclasses.replace(chart, x_end=_end(m)).render(points))]


def _not_finite(m: Metrics, columns: Sequence[tuple[str, str]]) -> list[str]:
    """A sentence for each column with values that cannot be drawn."""
    notes = []
    for column, name in columns:
        steps = m.not_finite(column)
        if len(steps):
            values = "value is" if len(steps) == 1 else "values are"
            first = "" if len(steps) == 1 else "first "
            notes.append(f"{name}: {len(steps)} {values} not finite, {first}at step {whole(steps[0])}; not drawn.")
    return notes


def _branch_lines(run: RunFacts, column: str) -> list[Line]:
    """The abandoned steps of each branch, as one quiet line each."""
    lines = []
    for branch in run.branches:
        line = line_of(branch.metrics, column, "abandoned steps")
        assert line.steps is not None
        keep = line.steps >= branch.from_step
        if keep.sum() > 1 and horizontal(branch.metrics)[1] == horizontal(run.metrics)[1]:
            lines.append(Line(line.name, line.x[keep], line.y[keep], line.steps[keep], quiet=True))
    return lines


def loss_axis() -> tuple[str, Callable[[float], float], Callable[[float], float]]:
    """The second axis of a loss."""
    return "Perplexity", lambda nats: perplexity(nats) or math.inf, math.log


def _loss(run: RunFacts, points: int) -> str:
    m = run.metrics
    if not len(m):
        return paragraph("No metrics yet: the run has not logged a step.")
    _, x_title = horizontal(m)
    lines = [
        line_of(m, "train_loss", "training", 1, noisy=True),
        line_of(m, "val_loss", "validation", 2, dots=True),
        *_branch_lines(run, "train_loss"),
    ]
    named = sorted(name for name in m.columns if name.startswith("val_loss/"))
    lines += [line_of(m, name, name.partition("/")[2], i + 3, dots=True) for i, name in enumerate(named)]
    chart = Chart(
        "loss-chart",
        "Training and validation",
        "Loss, nats per token",
        lines,
        x_title,
        right=loss_axis(),
        shown=loss,
        marks=_marks(run),
        notes=_not_finite(m, [("train_loss", "Training loss"), ("val_loss", "Validation loss")]),
    )
    bits = [line_of(m, "val_bits_per_byte", "validation", 2, dots=True)]
    named = sorted(name for name in m.columns if name.startswith("val_bits_per_byte/"))
    bits += [line_of(m, name, name.partition("/")[2], i + 3, dots=True) for i, name in enumerate(named)]
    bits_chart = Chart("bits-chart", "Bits per byte", "Bits per byte of text", bits, x_title, shown=loss)
    total = single(m, "total_loss", "Minimised loss", "Per target", noisy=True)
    drawn = _rendered([chart, bits_chart, total], m, points)
    content = f'<div class="charts large">{drawn[0]}</div>' if drawn else paragraph("No loss could be drawn.")
    return content + grid(drawn[1:]) + _epochs(m) + _validation_sets(m)


def _validation_sets(m: Metrics) -> str:
    """The newest loss of each named validation set."""
    rows = []
    for column in m.columns:
        kind, _, name = column.partition("/")
        if kind == "val_loss" and name and m.has(column):
            nats, bits, best = m.last(column), m.last(f"val_bits_per_byte/{name}"), m.best(column)
            values = [(loss(nats), nats), (number(perplexity(nats)), nats), (loss(bits), bits), (loss(best), best)]
            rows.append([text_cell(name), *(number_cell(shown, value) for shown, value in values)])
    titles = ("Loss", "Perplexity", "Bits per byte", "Lowest loss")
    columns = [Column("Validation set", numeric=False), *map(Column, titles)]
    return "<h3>Validation sets</h3>" + table("Validation sets", columns, rows) if rows else ""


def _epochs(m: Metrics) -> str:
    """Loss and perplexity by epoch; by tenths of the run for a mixture, whose datasets have different lengths."""
    if m.has("epoch"):
        epoch = m["epoch"]
        edges = np.arange(1, math.floor(float(np.nanmax(epoch)) + 1e-6) + 1, dtype=np.float64)
        names = [f"{e:.0f}" for e in edges]
        if not len(edges) or np.nanmax(epoch) > edges[-1] + 1e-3:
            edges = np.append(edges, np.nanmax(epoch))
            names.append(f"{edges[-1]:.2f}")
        if len(edges) > 200:
            edges, names = edges[-200:], names[-200:]
        title, along, head = "Loss and perplexity by epoch", epoch, "Epoch"
    elif m.has("tokens"):
        along = m["tokens"]
        edges = np.linspace(0, float(np.nanmax(along)), 11)[1:]
        names = [f"{10 * i} %" for i in range(1, 11)]
        title, head = "Loss and perplexity by tenth of the run", "Share of the run"
    else:
        return ""
    rows: list[list[Cell]] = []
    before = -math.inf
    for edge, name in zip(edges.tolist(), names, strict=True):
        inside = (along > before) & (along <= edge + 1e-9 * max(1.0, edge))
        before = edge
        if not inside.any():
            continue
        train, val, bits = (_finite(m[column][inside]) for column in ("train_loss", "val_loss", "val_bits_per_byte"))
        mean, last = (float(train.mean()), float(train[-1])) if len(train) else (None, None)
        validation = float(val[-1]) if len(val) else None
        tokens = next(iter(_finite(m["tokens"][inside])[-1:].tolist()), None)
        step = float(m["step"][inside][-1])
        last_bits = next(iter(bits[-1:].tolist()), None)
        rows.append(
            [
                number_cell(name, edge),
                number_cell(whole(step), step),
                number_cell(short(tokens), tokens),
                number_cell(loss(mean), mean),
                number_cell(loss(last), last),
                number_cell(number(perplexity(last)), perplexity(last)),
                number_cell(loss(validation), validation),
                number_cell(number(perplexity(validation)), perplexity(validation)),
                number_cell(loss(last_bits), last_bits),
            ]
        )
    columns = [
        Column(head),
        Column("Step"),
        Column("Tokens"),
        Column("Training loss, mean", hint="mean of the logged steps in this part"),
        Column("Training loss, last"),
        Column("Training perplexity", hint="of the last training loss"),
        Column("Validation loss"),
        Column("Validation perplexity"),
        Column("Bits per byte"),
    ]
    return f"<h3>{title}</h3>" + table(title, columns, rows) if rows else ""


def _finite(values: FloatArray) -> FloatArray:
    return values[np.isfinite(values)]


def _evaluation(run: RunFacts, points: int) -> str:
    m = run.metrics
    _, x_title = horizontal(m)
    other = [c for c in m.columns if c.partition("/")[0] not in KNOWN and not c.startswith("epoch") and m.has(c)]
    charts = [
        Chart(f"eval-{i}", column_title(c), "During training", [line_of(m, c, column_title(c), 1, dots=True)], x_title)
        for i, c in enumerate(other)
    ]
    curves = curve_charts([Entry(run.name, run.folder, results=run.results)], points)
    return grid(_rendered(charts, m, points)) + curves + scores_table(run.results)


def column_title(column: str) -> str:
    """The name to show of a column of metrics.csv that has no chart of its own: of eval/TASK, the task."""
    return column.removeprefix(EVALUATION_COLUMN).replace("_", " ")


def curve_charts(entries: Sequence[Entry], points: int, seed: int = 0) -> str:
    """Scores of the entries' checkpoints over tokens, a chart a task; "" if none has results of two checkpoints."""
    order = {e.name: i for i, e in enumerate(entries, start=1)}
    charts: list[str] = []
    tasks = learning_curves(entries, seed)
    for i, task in enumerate(tasks):
        lines = [
            Line(c.name, c.x, c.values, colour=order[c.name], dots=True, low=c.low, high=c.high) for c in task.curves
        ]
        charts.append(Chart(f"curve-{i}", task.task, task.metric.replace("_", " "), lines, task.unit).render(points))
    bands = any((c.high > c.low).any() for task in tasks for c in task.curves)
    note = paragraph("Bands: 95 % intervals, by bootstrap over the items.") if bands else ""
    return note + grid(charts) if charts else ""


def scores_table(results: Sequence[Results]) -> str:
    """All metrics of the newest evaluated checkpoint, and how many items they are over."""
    if not results:
        return ""
    newest = results[-1]
    rows = [
        [
            text_cell(task),
            text_cell(name.replace("_", " ")),
            number_cell(number(value), value),
            number_cell(whole(r.n), r.n),
        ]
        for task, r in newest.tasks.items()
        for name, value in r.metrics.items()
    ]
    columns = [Column("Task", numeric=False), Column("Metric", numeric=False), Column("Value"), Column("Items")]
    title = f"Scores of {newest.model.name}"
    groups = "".join(_groups(task, newest) for task in newest.tasks)
    return f"<h3>{escape(title)}</h3>{table(title, columns, rows)}{groups}" if rows else ""


def _groups(task: str, results: Results) -> str:
    """A task's scores by group, closed."""
    shown = ""
    for kind, groups in results.tasks[task].groups.items():
        metric = next((name for group in groups.values() for name in group.metrics), None)
        if metric is None:
            continue
        values = {name: group.metrics.get(metric, math.nan) for name, group in groups.items()}
        largest = max((v for v in values.values() if math.isfinite(v)), default=0.0)
        largest = 1.0 if 0 < largest <= 1 else largest
        rows = [
            [
                text_cell(name),
                bar_cell(number(v), v if math.isfinite(v) else 0, largest),
                number_cell(whole(groups[name].n), groups[name].n),
            ]
            for name, v in values.items()
        ]
        columns = [Column(kind.replace("_", " "), numeric=False), Column(metric.replace("_", " ")), Column("Items")]
        shown += details(f"{task} by {kind.replace('_', ' ')}", table(f"{task} by {kind}", columns, rows))
    return shown


def single(m: Metrics, column: str, title: str, unit: str, *, noisy: bool = False, zero: bool = False) -> Chart:
    """A chart of one column; `zero`: from 0, never logarithmic."""
    line = line_of(m, column, title.lower(), noisy=noisy)
    chart_id = f"{column.replace('_', '-')}-chart"
    return Chart(chart_id, title, unit, [line], horizontal(m)[1], from_zero=zero, log=False if zero else None)


def double(m: Metrics, columns: Sequence[tuple[str, str]], title: str, unit: str, *, zero: bool = False) -> Chart:
    """A chart of two columns, each with the name of its line."""
    lines = [line_of(m, column, name, i + 1) for i, (column, name) in enumerate(columns)]
    chart_id = f"{columns[0][0].replace('_', '-')}-chart"
    return Chart(chart_id, title, unit, lines, horizontal(m)[1], from_zero=zero, log=False if zero else None)


def _optimisation(run: RunFacts, points: int) -> str:
    m = run.metrics
    norm = single(m, "grad_norm", "Gradient norm", "Global L2 norm", noisy=True)
    norm.marks, norm.notes = _marks(run), _not_finite(m, [("grad_norm", "Gradient norm")])
    clip = flatten(run.settings).get("train.clip_norm")
    if isinstance(clip, (int, float)) and clip:
        norm.notes.insert(0, f"Before clipping at {clip:g}.")
    experts = [("expert_load_max", "busiest"), ("expert_load_min", "least busy")]
    charts = [
        single(m, "lr", "Learning rate", "Per step", zero=True),
        norm,
        single(m, "loss_scale", "Loss scale", "Factor"),
        single(m, "alpha", "Weight of the cross-entropy", "Alpha", zero=True),
        single(m, "divergence", "Divergence from the teachers", "Nats per target", noisy=True),
        double(m, experts, "Load of the experts", "Relative to an even load"),
        single(m, "router_entropy", "Router entropy", "Relative to ln(experts)"),
        single(m, "load_balance_loss", "Load-balancing loss", "1 at an even load"),
    ]
    if (m.last("skipped") or 0) > 0:
        charts.append(single(m, "skipped", "Skipped steps", "Steps so far", zero=True))
    return grid(_rendered(charts, m, points))


def _speed(run: RunFacts, points: int) -> str:
    m = run.metrics
    rate = single(m, "tokens_per_s", "Speed", "Tokens per second", noisy=True, zero=True)
    rate.marks = _marks(run)
    mfu = [("mfu", "attention in full"), ("mfu_causal", "causal half")]
    charts = [
        rate,
        double(m, mfu, "Model FLOPs utilisation", "Share of the peak", zero=True),
        single(m, "memory_gib", "Peak memory", "GiB", zero=True),
    ]
    return grid(_rendered(charts, m, points)) + plan_table(run)


def grid(charts: Sequence[str]) -> str:
    """Charts side by side where there is room."""
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _data(seen: Seen | None, reason: str) -> str:
    if seen is None:
        return paragraph(f"The data that the run has seen is unknown: {reason}.")
    content = ""
    if seen.steps < seen.of:
        content += paragraph(
            f"Counted over steps 0 to {seen.steps - 1:,} of {seen.of:,}: the time for reading the record was limited "
            "(--record_s of scripts/report.py)."
        )
    if not seen.complete:
        content += paragraph("The time was too short to count by source and by document (--record_s).")
    total = sum(d.tokens_seen for d in seen.datasets)
    rows = [
        [
            text_cell(f"{d.path.parent.name}/{d.path.name}"),
            bar_cell(short(d.tokens_seen), d.tokens_seen, total, i % 6 + 1),
            number_cell(percent(d.tokens_seen / total if total else None), d.tokens_seen),
            number_cell(number(d.tokens_seen / d.tokens if d.tokens else None, 3), d.tokens_seen / max(1, d.tokens)),
            number_cell(whole(d.documents_seen), d.documents_seen),
            number_cell(whole(d.documents), d.documents),
        ]
        for i, d in enumerate(seen.datasets)
    ]
    columns = [
        Column("Dataset", numeric=False),
        Column("Tokens seen"),
        Column("Share"),
        Column("Epochs", hint="tokens seen over tokens in the dataset"),
        Column("Documents seen"),
        Column("Documents"),
    ]
    content += table("Data seen by dataset", columns, rows)
    for d in seen.datasets:
        of = f" of {d.path.parent.name}/{d.path.name}" if len(seen.datasets) > 1 else ""
        estimate = f"Estimated from every {d.sampled:,}th document." if d.sampled > 1 else ""
        content += _sources(d.by_source, of, estimate) + _times(d.times, of, estimate)
    return content


def _sources(by_source: Mapping[str, tuple[int, int]], of: str, estimate: str) -> str:
    entries = [(name, n, tokens) for name, (n, tokens) in by_source.items()]
    shown, rest = entries[:MOST_SOURCES], entries[MOST_SOURCES:]
    total = sum(tokens for _, _, tokens in entries)
    if not total:
        return ""
    if rest:
        shown.append((f"{len(rest):,} others", sum(n for _, n, _ in rest), sum(t for _, _, t in rest)))
    largest = max(tokens for _, _, tokens in shown)
    rows = [
        [
            text_cell(name),
            bar_cell(short(tokens), tokens, largest),
            number_cell(percent(tokens / total), tokens),
            number_cell(whole(n), n),
        ]
        for name, n, tokens in shown
    ]
    title = f"Data seen by source{of}"
    columns = [Column("Source", numeric=False), Column("Tokens seen"), Column("Share"), Column("Documents seen")]
    return f"<h3>{escape(title)}</h3>{paragraph(estimate) if estimate else ''}" + table(title, columns, rows)


def _times(times: Mapping[float, int], of: str, estimate: str) -> str:
    total = sum(times.values())
    if not total:
        return ""
    names = {0.0: "never", 0.5: "a part of it", 1.0: "once", float(MAX_TIMES): f"{MAX_TIMES} times or more"}
    largest = max(times.values())
    rows = [
        [
            Cell(escape(names.get(n, f"{n:.0f} times")), n),
            bar_cell(whole(count), count, largest, 3),
            number_cell(percent(count / total), count),
        ]
        for n, count in times.items()
    ]
    title = f"Exposures: how often documents were seen{of}"
    note = f"Tokens seen of a document over its length, rounded. {estimate}".strip()
    columns = [Column("Seen", numeric=False), Column("Documents"), Column("Share")]
    return f"<h3>{escape(title)}</h3>{paragraph(note)}" + table(title, columns, rows, sortable=False)


def _events(run: RunFacts) -> str:
    events: list[tuple[float, int, str, str]] = []  # step, order, what, more
    for start in run.starts:
        step = start.get("step") if isinstance(start.get("step"), int) else 0
        hosts = start.get("hosts") if isinstance(start.get("hosts"), list) else []
        ranks = start.get("world_size", "?")
        more = [str(start.get("time", "")).replace("T", " ")[:19], f"{ranks} rank{'' if ranks == 1 else 's'}"]
        more += [str(hosts[0]) if len(hosts) == 1 else f"{len(hosts)} hosts"] if hosts else []
        events.append((step or 0, 1, "Start" if not step else "Resume", ", ".join(filter(None, more))))
    for skip in run.skips:
        samples = f"samples {skip.get('first_sample', '?')} to {skip.get('end_sample', '?')} left out"
        events.append((skip["step"], 0, "Rollback", f"{skip.get('reason', 'loss spike')}; {samples}"))
    rolled_back = {skip["step"] for skip in run.skips}
    for branch in run.branches:
        last = branch.metrics.last("step") or branch.from_step
        if branch.from_step not in rolled_back and last > branch.from_step:
            where = f"an older checkpoint was resumed; steps up to {whole(last)} are in {run.name}/abandoned"
            events.append((branch.from_step, 0, "Steps abandoned", where))
    for column, name in (
        ("train_loss", "Training loss"),
        ("val_loss", "Validation loss"),
        ("grad_norm", "Gradient norm"),
    ):
        for step in run.metrics.not_finite(column)[:5].tolist():
            value = run.metrics[column][run.metrics["step"] == step][-1]
            events.append((step, 2, f"{name} not finite", "NaN" if math.isnan(value) else number(float(value))))
    for spike in _spikes(run):
        text = (
            f"loss {number(spike.loss)}, high since step {spike.first_step:,}; {number(spike.mean)} on average before"
        )
        events.append((float(spike.step), 2, "Loss spike", text))
    if (skipped := run.metrics.last("skipped")) is not None and skipped > 0:
        first = run.metrics["step"][np.flatnonzero(run.metrics["skipped"] > 0)[0]]
        events.append((float(first), 3, "Steps skipped", f"{whole(skipped)} in all: their gradients were not finite"))
    for change in run.meta.get("changes") or []:
        if isinstance(change, dict):
            events.append(
                (float(change.get("step") or 0), 2, "Settings changed", json.dumps(change, ensure_ascii=False)[:300])
            )
    if run.stopped:
        events.append((float(run.step), 4, "Stopped", f"by {run.stopped.get('signal', 'a signal')}"))
    elif run.max_steps is not None and run.step >= run.max_steps:
        events.append((float(run.step), 4, "Finished", f"{run.max_steps:,} steps"))
    rows = [
        [number_cell(whole(step), step), text_cell(what), text_cell(more)]
        for step, _, what, more in sorted(events, key=lambda event: event[:2])
    ]
    columns = [Column("Step"), Column("Event", numeric=False), Column("Details", numeric=False)]
    return table("Starts, rollbacks and other events", columns, rows) if rows else ""


def _spikes(run: RunFacts) -> list[LossSpike]:
    """Spikes in the losses that were kept; those that were rolled back are in `run.skips`."""
    m, settings = run.metrics, flatten(run.settings)
    if settings.get("guard.spike_action") == "none" or "train_loss" not in m.columns:
        return []
    numbers = [settings.get(f"guard.spike_{name}") for name in ("sigmas", "window", "rows")]
    sigmas, window, rows = (n if isinstance(n, (int, float)) else d for n, d in zip(numbers, (6.0, 64, 3), strict=True))
    keep = m.written["train_loss"]
    pairs = zip(m["step"][keep].tolist(), m["train_loss"][keep].tolist(), strict=True)
    return find_spikes(pairs, sigmas=sigmas, window=int(window), in_a_row=int(rows))[:MOST_MARKS]


def samples_section(samples: Sequence[Sample]) -> str:
    """Generated texts, prompt by prompt, in the order of steps; evenly thinned if they are many."""
    by_prompt: dict[str, list[Sample]] = {}
    for sample in samples:
        by_prompt.setdefault(sample.prompt, []).append(sample)
    shown: list[str] = []
    for prompt, several in list(by_prompt.items())[: MOST_SAMPLES // 2]:
        most = max(2, MOST_SAMPLES // len(by_prompt))
        kept = [several[round(i)] for i in np.linspace(0, len(several) - 1, min(most, len(several)))]
        summary = f"{prompt[:80]}{'…' if len(prompt) > 80 else ''}" if prompt.strip() else "Without a prompt"
        texts = f'<div class="samples">{"".join(map(_sample, kept))}</div>'
        shown.append(details(f"{summary} ({len(several)})", texts, opened=not shown))
    return "".join(shown)


def _sample(sample: Sample) -> str:
    text = sample.text[:SAMPLE_CHARACTERS] + ("…" if len(sample.text) > SAMPLE_CHARACTERS else "")
    step = f"Step {whole(sample.step)}" if sample.step is not None else "Final"
    tokens = f", {short(sample.tokens)} tokens" if sample.tokens is not None else ""
    return (
        f'<article class="sample"><h4>{step}{tokens}</h4>'
        f'<p><span class="prompt">{escape(sample.prompt)}</span>{escape(text)}</p></article>'
    )


def setting_text(value: Any) -> str:
    """A setting as YAML would show it, in one line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SETTING_CHARACTERS else text[:SETTING_CHARACTERS] + "…"


def _settings(run: RunFacts, defaults: Mapping[str, Any] | None) -> str:
    settings = flatten(run.settings)
    content = ""
    if not settings:
        return ""
    if defaults is not None:
        different = {k: v for k, v in settings.items() if v != defaults.get(k, None)}
        rows = [
            [Cell(f"<code>{escape(k)}</code>", k), text_cell(setting_text(v)), text_cell(setting_text(defaults.get(k)))]
            for k, v in different.items()
        ]
        columns = [Column("Setting", numeric=False), Column("Value", numeric=False), Column("Default", numeric=False)]
        content = table("Settings that differ from their defaults", columns, rows)
    rows = [[Cell(f"<code>{escape(k)}</code>", k), text_cell(setting_text(v))] for k, v in settings.items()]
    whole_table = table("All settings", [Column("Setting", numeric=False), Column("Value", numeric=False)], rows)
    content += details(f"All {len(settings)} settings", whole_table, opened=defaults is None)
    if (model := run.meta.get("model_config")) and isinstance(model, dict):
        facts = [[Cell(f"<code>{escape(k)}</code>", k), text_cell(setting_text(v))] for k, v in sorted(model.items())]
        columns = [Column("Field", numeric=False), Column("Value", numeric=False)]
        content += details("Model", table("Fields of the model", columns, facts))
    return content


def _environment(run: RunFacts) -> str:
    if not run.starts:
        return ""
    newest = run.starts[-1]
    git = newest.get("git") if isinstance(newest.get("git"), dict) else {}
    commit = (git or {}).get("commit")
    clean = ", with changes" if (git or {}).get("clean") is False else ""
    packages = newest.get("packages") if isinstance(newest.get("packages"), dict) else {}
    shown: list[tuple[str, object]] = [
        ("Commit", f"{str(commit)[:12]}{clean}" if commit else None),
        ("Code", newest.get("code")),
        ("Python", newest.get("python")),
        ("System", newest.get("system")),
        ("Processor", f"{newest.get('cpu')}, {newest.get('cores')} cores, {newest.get('threads')} threads"),
        ("GPUs", ", ".join(map(str, newest.get("gpus") or [])) or None),
        ("Ranks", newest.get("world_size")),
        ("Hosts", ", ".join(map(str, newest.get("hosts") or [])) or None),
        ("Driver", newest.get("driver")),
        ("CUDA", newest.get("cuda")),
        ("NCCL", newest.get("nccl")),
        ("Image", newest.get("image")),
        ("SLURM", json.dumps(newest["slurm"]) if newest.get("slurm") else None),
    ]
    content = pairs([(k, v) for k, v in shown if v is not None])
    content += details("Packages", pairs(sorted((packages or {}).items())))
    if command := newest.get("command"):
        words = " ".join(map(str, command)) if isinstance(command, list) else str(command)
        content += details("Command", f"<pre>{escape(words[:4000])}</pre>")
    return content
