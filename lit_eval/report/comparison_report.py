"""The comparison page: curves of several runs over each other, scores, tests, and the settings that differ."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from lit_eval.compare.comparison import MISSING, Comparison, Score, compare
from lit_eval.compare.entries import Entry
from lit_eval.compare.text import difference_text, p_text
from lit_eval.formats import duration, loss, number, perplexity, short, whole
from lit_eval.report.charts import Chart, Line, Point, Scatter, style_of
from lit_eval.report.elements import (
    Cell,
    Column,
    Section,
    escape,
    number_cell,
    paragraph,
    table,
    text_cell,
    tiles,
)
from lit_eval.report.page import fit, page
from lit_eval.report.run_report import (
    column_title,
    curve_charts,
    grid,
    horizontal,
    line_of,
    loss_axis,
    samples_section,
    scores_table,
    setting_text,
)
from lit_eval.run_facts import EVALUATION_COLUMN, Sample, samples_of

MOST_LINES = 18  # runs in a chart: six colours in three patterns


def comparison_report(entries: Sequence[Entry], seed: int = 0) -> str:
    """The HTML comparison of entries, under 2 MB. `seed`: of the bootstrap."""
    comparison = compare(entries, seed)
    return fit(lambda points: _build(comparison, seed, points))


def _build(comparison: Comparison, seed: int, points: int) -> str:
    entries = comparison.entries
    in_run = _in_run(entries, points)
    sections = [
        Section("ranking", "Ranking", _ranking(comparison)),
        Section("loss", "Loss", _loss(entries, points)),
        Section("trade", "Size, speed and score", _trade(comparison)),
        Section("scores", "Scores", _scores(comparison)),
        Section("details", "Details", scores_table(entries[0].results) if len(entries) == 1 else ""),
        Section("curves", "Learning curves", in_run + curve_charts(entries[:MOST_LINES], points, seed)),
        Section("tests", "Paired tests", _tests(comparison)),
        Section("samples", "Samples", samples_section(_samples(entries[0])) if len(entries) == 1 else ""),
        Section("settings", "Settings that differ", _settings(comparison)),
        Section("training", "Training", _training(entries, points)),
    ]
    title = " and ".join(e.name for e in entries) if len(entries) <= 2 else f"{len(entries)} models"
    kind = "Results" if len(entries) == 1 else "Comparison"
    state = ", ".join(e.name for e in entries) if 2 < len(entries) <= 12 else ""
    notices = [f"{remark}." for remark in comparison.remarks]
    return page(kind, title, state, _head(comparison), sections, notices)


def _head(comparison: Comparison) -> str:
    facts = []
    best, second = [*comparison.entries, None][:2]
    if best is not None and best.val_loss is not None and second is not None and second.val_loss is not None:
        facts.append(("Lowest validation loss", loss(best.val_loss), best.name))
        facts.append(("Ahead of the next by", number(second.val_loss - best.val_loss, 2), second.name))
    rates = [(e.tokens_per_s, e.name) for e in comparison.entries if e.tokens_per_s]
    if len(rates) > 1:
        facts.append(("Most tokens per second", whole(max(rates)[0]), max(rates)[1]))
    for task in comparison.tasks[:3]:
        alone = len(comparison.entries) == 1
        shown = 0 if alone else task.best()
        if shown is not None and (score := task.scores[shown]) is not None:
            name = task.metric.replace("_", " ") if alone else comparison.entries[shown].name
            facts.append((task.name, number(score.value), name))
    return tiles(facts)


def _samples(entry: Entry) -> list[Sample]:
    return [sample for results in entry.results for sample in samples_of(results)]


def _colour(entries: Sequence[Entry], entry: Entry) -> int:
    return next(i for i, other in enumerate(entries, start=1) if other is entry)


def _name_cell(entries: Sequence[Entry], entry: Entry) -> Cell:
    """An entry's name behind the line it has in the charts."""
    style = style_of(_colour(entries, entry))
    key = f'<svg class="key" viewBox="0 0 24 8" aria-hidden="true"><path class="line {style}" d="M1 4H23"/></svg>'
    return Cell(f"{key} {escape(entry.name)}", entry.name.casefold())


def _ranking(comparison: Comparison) -> str:
    entries = comparison.entries
    shown: list[tuple[str, Callable[[Entry], float | None], Callable[[float | None], str], bool | None]] = [
        ("Validation loss", lambda e: e.val_loss, loss, False),
        ("Perplexity", lambda e: perplexity(e.val_loss), number, False),
        ("Bits per byte", lambda e: e.val_bits_per_byte, loss, False),
        ("Training loss", lambda e: e.train_loss, loss, False),
        ("Tokens seen", lambda e: e.tokens, short, None),
        ("Parameters", lambda e: e.parameters, short, None),
        ("Tokens/s", lambda e: e.tokens_per_s, whole, True),
        ("Time", lambda e: e.seconds, duration, None),
    ]
    shown = [column for column in shown if any(column[1](e) is not None for e in entries)]
    rows = []
    for entry in entries:
        cells = [_name_cell(entries, entry)]
        for _, value_of, form, higher in shown:
            value = value_of(entry)
            values = [v for e in entries if (v := value_of(e)) is not None]
            best = higher is not None and len(values) > 1 and value == (max if higher else min)(values)
            cell = number_cell(form(value), value)
            cells.append(dataclasses.replace(cell, html=f'<b class="best">{cell.html}</b>') if best else cell)
        rows.append(cells)
    columns = [Column("Name", numeric=False), *(Column(title) for title, *_ in shown)]
    return table("Models by validation loss", columns, rows)


def _overlaid(
    entries: Sequence[Entry], column: str, *, noisy: bool = False, dots: bool = False
) -> tuple[list[Line], str]:
    """A column of every run's metrics, over tokens if all of them have tokens."""
    runs = [(i, e.name, e.run.metrics) for i, e in enumerate(entries, start=1) if e.run is not None][:MOST_LINES]
    runs = [(i, name, m) for i, name, m in runs if m.has(column)]
    titles = {horizontal(m)[1] for _, _, m in runs}
    lines = []
    for i, name, m in runs:
        line = line_of(m, column, name, i, noisy=noisy, dots=dots)
        if titles != {"Tokens seen"}:
            keep = m.written[column]
            line = dataclasses.replace(line, x=m["step"][keep], y=m[column][keep], steps=m["step"][keep])
        lines.append(line)
    return lines, "Tokens seen" if titles == {"Tokens seen"} else "Steps"


def _loss(entries: Sequence[Entry], points: int) -> str:
    each = max(60, 2 * points // max(1, len(entries)))
    val, val_x = _overlaid(entries, "val_loss", dots=True)
    train, train_x = _overlaid(entries, "train_loss", noisy=True)
    bits, bits_x = _overlaid(entries, "val_bits_per_byte", dots=True)
    unit = "Loss, nats per token"
    charts = [
        Chart("val-chart", "Validation loss", unit, val, val_x, right=loss_axis(), shown=loss),
        Chart("train-chart", "Training loss", unit, train, train_x, right=loss_axis(), shown=loss),
        Chart("bits-chart", "Validation bits per byte", "Bits per byte of text", bits, bits_x, shown=loss),
    ]
    drawn = [html for chart in charts if (html := chart.render(each))]
    more = len([e for e in entries if e.run is not None]) - MOST_LINES
    note = (
        paragraph(f"The {MOST_LINES} runs with the lowest validation loss; {more} more are in the table.")
        if more > 0
        else ""
    )
    return note + (f'<div class="charts large">{drawn[0]}</div>' + grid(drawn[1:]) if drawn else "")


def _in_run(entries: Sequence[Entry], points: int) -> str:
    """The tasks evaluated during training, of all runs."""
    columns = dict.fromkeys(c for e in entries if e.run is not None for c in e.run.metrics.columns)
    charts = []
    for i, column in enumerate(c for c in columns if c.startswith(EVALUATION_COLUMN)):
        lines, x_title = _overlaid(entries, column, dots=True)
        chart = Chart(f"eval-{i}", column_title(column), "During training", lines, x_title)
        charts.append(chart.render(max(60, points // len(entries))))
    return grid([chart for chart in charts if chart])


def _training(entries: Sequence[Entry], points: int) -> str:
    each = max(60, points // max(1, len(entries)))
    charts = []
    for column, title, unit, noisy, zero in (
        ("lr", "Learning rate", "Per step", False, True),
        ("grad_norm", "Gradient norm", "Global L2 norm", True, False),
        ("tokens_per_s", "Speed", "Tokens per second", True, True),
        ("memory_gib", "Peak memory", "GiB", False, True),
    ):
        lines, x_title = _overlaid(entries, column, noisy=noisy)
        chart_id = f"{column.replace('_', '-')}-chart"
        chart = Chart(chart_id, title, unit, lines, x_title, from_zero=zero, log=False if zero else None)
        charts.append(chart.render(each))
    return grid([chart for chart in charts if chart])


def _trade(comparison: Comparison) -> str:
    """Size against speed against score."""
    entries = comparison.entries
    scores: list[tuple[str, str, list[float | None], Callable[[float | None], str]]] = []
    if sum(e.val_loss is not None for e in entries) > 1:
        scores.append(("loss", "Validation loss", [e.val_loss for e in entries], loss))
    for i, task in enumerate(comparison.tasks[:4]):
        values = [score.value if score is not None else None for score in task.scores]
        scores.append((f"task-{i}", f"{task.name}, {task.metric.replace('_', ' ')}", values, number))
    sizes: list[tuple[str, str, list[float | None]]] = [
        ("size", "Parameters", [e.parameters for e in entries]),
        ("speed", "Tokens per second", [e.tokens_per_s for e in entries]),
    ]
    charts = []
    for key, title, values, form in scores:
        for x_key, x_title, xs in sizes:
            points = [
                Point(e.name, float(x), float(y), _colour(entries, e))
                for e, x, y in zip(entries, xs, values, strict=True)
                if x is not None and y is not None
            ]
            if len({p.x for p in points}) > 1:
                scatter = Scatter(
                    f"{key}-{x_key}", f"{title} by {x_title.lower()}", x_title, title, points, shown_y=form
                )
                charts.append(scatter.render())
    return grid([chart for chart in charts if chart])


def _score_cell(score: Score | None, best: bool) -> Cell:
    if score is None:
        return number_cell(number(None), None)
    shown = escape(number(score.value))
    shown = f'<b class="best">{shown}</b>' if best else shown
    if score.interval is not None:
        shown += f"<br><small>{escape(number(score.interval.low))} to {escape(number(score.interval.high))}</small>"
    elif score.no_interval:
        shown += f"<br><small>{escape(score.no_interval)}</small>"
    return Cell(shown, score.value)


def _scores(comparison: Comparison) -> str:
    if not comparison.tasks:
        return ""
    rows = []
    for task in comparison.tasks:
        best = task.best()
        cells = [_score_cell(score, i == best) for i, score in enumerate(task.scores)]
        rows.append([text_cell(task.name), text_cell(task.metric.replace("_", " ")), *cells])
    columns = [
        Column("Task", numeric=False),
        Column("Metric", numeric=False),
        *(Column(e.name) for e in comparison.entries),
    ]
    note = "Below a score: its 95 % interval, by bootstrap over the items."
    has_interval = any(score and score.interval for task in comparison.tasks for score in task.scores)
    return (paragraph(note) if has_interval else "") + table("Scores by task", columns, rows)


def _tests(comparison: Comparison) -> str:
    rows = [
        [
            text_cell(test.task),
            text_cell(test.first),
            text_cell(test.second),
            number_cell(
                difference_text(test.result),
                test.result.difference.mean,
            ),
            number_cell(f"{test.result.wins} : {test.result.losses}", test.result.wins - test.result.losses),
            number_cell(p_text(test.result.p), test.result.p),
            number_cell(p_text(test.adjusted), test.adjusted),
            text_cell(test.result.test),
        ]
        for test in comparison.tests
    ]
    if not rows:
        return ""
    columns = [
        Column("Task", numeric=False),
        Column("First", numeric=False),
        Column("Second", numeric=False),
        Column("Difference", hint="first minus second, with its 95 % bootstrap interval"),
        Column("Better : worse", hint="items on which the first is better, and worse"),
        Column("p"),
        Column("p, adjusted", hint="Holm's correction over all tests of this page"),
        Column("Test", numeric=False),
    ]
    note = (
        "On the same items: McNemar's exact test where an item is right or wrong, else a paired bootstrap, "
        "or all sign flips of at most 12 items. "
        "Difference: first minus second, in the items' own unit."
    )
    return paragraph(note) + table("Paired tests", columns, rows)


def _settings(comparison: Comparison) -> str:
    if not comparison.settings:
        return ""
    rows = [
        [
            Cell(f"<code>{escape(flag)}</code>", flag),
            *(text_cell("–" if value is MISSING else setting_text(value)) for value in values),
        ]
        for flag, values in comparison.settings.items()
    ]
    columns = [Column("Setting", numeric=False), *(Column(e.name, numeric=False) for e in comparison.entries)]
    return table("Settings that differ", columns, rows)
