"""The report of a run: its values against the files they come from, whatever state these are in."""

from __future__ import annotations

import csv
import math
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_examples import examples
from recorded_run import prepare, write
from running import ROOT, flags, script_error, train
from whole_record import read_record
from written_runs import Page, write_results, write_run

from lit_data.packed.reader import PackedDataset
from lit_data.record.seen import count_seen
from lit_data.record.trace import open_run
from lit_eval.formats import duration, linear_ticks, log_ticks, number, short, tick_labels
from lit_eval.metrics_file import read_metrics
from lit_eval.model.eval_model import ModelFacts
from lit_eval.report.charts import keep_extremes, moving_average
from lit_eval.report.page import HERE
from lit_eval.report.run_report import run_report
from lit_eval.run_facts import read_run
from lit_eval.score.results import Result, Results
from lit_eval.spikes import find_spikes
from pretrain.args import GuardArgs, RunArgs
from pretrain.guards import SpikeDetector
from pretrain.logs.report import default_settings, write_report


def steady(steps: int, **more: Any) -> list[dict[str, Any]]:
    """Rows of a run of two epochs whose loss falls."""
    return [
        {
            "step": i,
            "tokens": 100 * i,
            "epoch": 2 * i / steps,
            "train_loss": 5 - i / steps if i else None,
            "val_loss": 5.5 - i / steps if i % 5 == 0 else None,
            "lr": 1e-3,
            "seconds": float(i),
            **more,
        }
        for i in range(steps + 1)
    ]


def test_values_are_those_of_the_metrics(tmp_path: Path) -> None:
    rows = steady(20)
    page = Page(run_report(write_run(tmp_path / "run", rows)))
    train, val = page.line("loss-chart", "training"), page.line("loss-chart", "validation")
    assert train["x"] == [100 * i for i in range(1, 21)] and train["steps"] == list(range(1, 21))
    assert train["y"] == pytest.approx([5 - i / 20 for i in range(1, 21)], rel=1e-5)
    assert val["y"] == pytest.approx([5.5, 5.25, 5.0, 4.75, 4.5])
    assert page.tiles()["Validation loss"] == "4.5000" and page.tiles()["Tokens seen"] == "2,000"
    head, *body = page.table("Loss and perplexity by epoch")
    assert [row[:3] for row in body] == [["1", "10", "1,000"], ["2", "20", "2,000"]]
    losses = [np.mean([5 - i / 20 for i in some]) for some in (range(1, 11), range(11, 21))]
    assert [row[head.index("Training loss, mean")] for row in body] == [f"{x:.4f}" for x in losses]
    assert [float(row[head.index("Validation perplexity")]) for row in body] == pytest.approx(
        [math.exp(5), math.exp(4.5)], rel=1e-3
    )


def test_tables_by_tenth_for_a_mixture(tmp_path: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "epoch"} | {"epoch_0": 1, "epoch_1": 2} for row in steady(20)]
    body = Page(run_report(write_run(tmp_path / "run", rows))).table("Loss and perplexity by tenth of the run")[1:]
    assert [row[0] for row in body] == [f"{10 * i} %" for i in range(1, 11)]


def test_named_validation_sets(tmp_path: Path) -> None:
    more = {
        "val_loss/Gesetz": 2.5,
        "val_perplexity/Gesetz": math.exp(2.5),
        "val_bits_per_byte/Gesetz": 1.25,
        "words": 900,
    }
    page = Page(run_report(write_run(tmp_path / "run", steady(4, **more))))
    assert page.line("loss-chart", "Gesetz")["y"] == [2.5] * 5 and page.line("bits-chart", "Gesetz")["y"] == [1.25] * 5
    assert page.table("Validation sets")[1] == ["Gesetz", "2.5000", "12.18", "1.2500", "2.5000"]
    with pytest.raises(KeyError):
        page.root.with_id("eval-0")


def test_one_row_without_validation(tmp_path: Path) -> None:
    page = Page(run_report(write_run(tmp_path / "run", [{"step": 1, "tokens": 5, "train_loss": 2.5}])))
    assert page.line("loss-chart", "training")["y"] == [2.5]
    assert "Validation loss" not in page.tiles() and page.tiles()["Training loss"] == "2.5000"


def test_without_columns_or_rows(tmp_path: Path) -> None:
    page = Page(
        run_report(write_run(tmp_path / "bare", [{"step": 3, "train_loss": 1.0}, {"step": 4, "train_loss": 0.5}]))
    )
    assert page.chart("loss-chart")["title"] == "Steps" and page.line("loss-chart", "training")["x"] == [3, 4]
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "config.yaml").write_text("seed: 1\n")
    assert "No metrics yet" in Page(run_report(empty)).root.text
    for broken in ("", "step,tokens\r\n", "\0\0\0"):
        (empty / "metrics.csv").write_text(broken)
        Page(run_report(empty))


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    rows = steady(10)
    rows[4]["train_loss"], rows[5]["train_loss"], rows[10]["val_loss"] = math.nan, math.inf, -math.inf
    page = Page(run_report(write_run(tmp_path / "run", rows)))
    assert page.line("loss-chart", "training")["steps"] == [1, 2, 3, 6, 7, 8, 9, 10]
    (path,) = [p.attributes["d"] for p in page.root.with_id("loss-chart").all("svg")[-1].all("path", "c1")]
    assert path.count("M") == 2, "the line is interrupted"
    assert "Training loss: 2 values are not finite, first at step 4" in page.root.text
    events = page.table("Starts, rollbacks and other events")
    assert ["4", "Training loss not finite", "NaN"] in events and ["5", "Training loss not finite", "∞"] in events
    assert ["10", "Validation loss not finite", "−∞"] in events
    assert page.tiles()["Validation loss"] == "5.0000"
    everything = [{"step": 1, "train_loss": math.nan, "val_loss": math.nan}]
    assert "No loss could be drawn" in Page(run_report(write_run(tmp_path / "nan", everything))).root.text


EVIL = "ä<script>alert(1)</script>&\"'</style>😀"


def test_names_are_escaped(tmp_path: Path) -> None:
    evil = EVIL.replace("/", "∕")
    run = write_run(tmp_path / evil, [row | {f"val_{EVIL}": 1.5} for row in steady(3)], {"name": EVIL, EVIL: EVIL})
    (run / "environment.jsonl").write_text(
        f'{{"step": 0, "time": "2026", "hosts": ["<b>{"ü"}"], "cpu": "</script>"}}\n'
    )
    write_results(run / "results.json", EVIL, {EVIL: [1.0, 0.0]})
    html = run_report(run, {EVIL: "<i>"})
    page = Page(html)
    assert page.root.all("h1")[0].text == evil and evil in page.root.all("title")[0].text
    kinds = [script.attributes.get("type") for script in page.root.all("script")]
    assert kinds.count(None) == 1 and set(kinds) == {None, "application/json"}
    assert not page.root.all("b") or all("ü" not in b.text for b in page.root.all("b"))
    assert EVIL in [row[0] for row in page.table("Settings that differ from their defaults")]
    assert "alert(1)" not in page.root.all("script")[-1].text


@examples(50)
@given(st.integers(0, 10_000), st.integers(4, 12), st.floats(1, 4), st.integers(1, 3))
def test_spikes_are_those_of_the_guard(seed: int, window: int, sigmas: float, rows: int) -> None:
    rng = np.random.default_rng(seed)
    losses = np.abs(rng.normal(3, 0.3, 150)) + 4 * (rng.random(150) < 0.1).repeat(3)[:150]
    losses[rng.random(150) < 0.02] = rng.choice([math.nan, math.inf])
    guard = SpikeDetector(GuardArgs(spike_window=window, spike_sigmas=sigmas, spike_rows=rows))
    expected = [spike for step, loss in enumerate(losses.tolist()) if (spike := guard.add(step, loss))]
    found = find_spikes(enumerate(losses.tolist()), sigmas=sigmas, window=window, in_a_row=rows)
    assert [(s.first_step, s.step) for s in found] == [(s.first_step, s.step) for s in expected]
    assert [s.mean for s in found] == pytest.approx([s.mean for s in expected])


def test_a_spike_is_an_event(tmp_path: Path) -> None:
    rows = steady(60)
    for row in rows[50:53]:
        row["train_loss"] = 9.0
    events = Page(run_report(write_run(tmp_path / "run", rows))).table("Starts, rollbacks and other events")
    assert [row[:2] for row in events[1:]] == [["52", "Loss spike"]]
    rows = write_run(tmp_path / "off", rows, {"guard": {"spike_action": "none"}})
    assert "Loss spike" not in run_report(rows)


def test_samples_over_time(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steady(4))
    for step in (4, 2):
        facts = ModelFacts("x", "m", 1, "c", step=step, tokens=100 * step)
        texts = [{"prompt": "Es <war>", "text": f" einmal {step}"}, {"prompt": None, "text": "frei"}, {"text": None}]
        samples = Result("generation", 2, {"distinct_1": 0.5}, details={"samples": texts})
        Results(facts, {"generation": samples}).write(run / "evaluation" / f"{step}.json")
    page = Page(run_report(run))
    shown = [(a.all("h4")[0].text, a.all("p")[0].text) for a in page.root.all("article", "sample")]
    assert shown == [
        ("Step 2, 200 tokens", "Es <war> einmal 2"),
        ("Step 4, 400 tokens", "Es <war> einmal 4"),
        ("Step 2, 200 tokens", "frei"),
        ("Step 4, 400 tokens", "frei"),
    ]
    assert page.line("curve-0", "run")["y"] == [0.5, 0.5]


def test_damaged_lines_are_left_out_and_said(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steady(6))
    lines = (run / "metrics.csv").read_bytes().splitlines(keepends=True)
    lines[3] = b"2,abc,,,,,\r\n"
    lines[5] = b"4,1\r\n"
    (run / "metrics.csv").write_bytes(b"".join(lines) + b"7,700,2,")
    (run / "environment.jsonl").write_bytes(b'{"step": 0}\nnot json\n')
    (run / "stopped.json").write_bytes(b"{")
    page = Page(run_report(run))
    assert page.line("loss-chart", "training")["steps"] == [1, 3, 5, 6]
    notice = page.root.all("div", "notice")[0].text
    assert "2 lines cannot be read" in notice and "stopped.json" in notice


def test_a_million_rows_keep_their_spike(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    n, at = 300_000, 123_457
    loss = 3 + rng.normal(0, 0.1, n)
    loss[at - 1] = 99.0
    folder = tmp_path / "run"
    folder.mkdir()
    text = "".join(f"{i},{i * 10},{x:.6f},0.5,1000\n" for i, x in enumerate(loss.tolist(), start=1))
    (folder / "metrics.csv").write_text("step,tokens,train_loss,grad_norm,tokens_per_s\n" + text)
    page = Page(run_report(folder))
    line = page.line("loss-chart", "training")
    assert max(line["y"]) == 99 and line["steps"][line["y"].index(99)] == at
    assert len(line["y"]) < 2000
    _, means = moving_average(loss, 150)
    assert len(means) == 150 and means.mean() == pytest.approx(loss.mean(), rel=1e-12)


@examples(50)
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=200), st.integers(1, 8))
def test_extremes_of_each_bucket_are_kept(values: list[float], buckets: int) -> None:
    x, y = np.arange(len(values), dtype=np.float64), np.array(values)
    kept = keep_extremes(x, y, buckets)
    assert kept[0] == 0 and kept[-1] == len(values) - 1 and (np.diff(kept) > 0).all()
    if len(values) > 2 * buckets + 2:
        bucket = [min(int(i / (len(values) - 1) * buckets), buckets - 1) for i in range(len(values))]
        for b in set(bucket):
            mine = [v for v, c in zip(values, bucket, strict=True) if c == b]
            chosen = [values[i] for i in kept if bucket[i] == b]
            assert min(chosen) == min(mine) and max(chosen) == max(mine)
        assert len(kept) <= 2 * buckets + 2


def test_metrics_against_the_csv_module(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steady(30, **{"val_loss/law": 2.25}))
    metrics = read_metrics(run / "metrics.csv")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for name in rows[0]:
        assert metrics.written[name].tolist() == [bool(row[name]) for row in rows]
        assert metrics[name][metrics.written[name]].tolist() == [float(row[name]) for row in rows if row[name]]
    assert Page(run_report(run)).line("loss-chart", "law")["y"] == [2.25] * 31


def test_time_over_restarts(tmp_path: Path) -> None:
    rows = [{"step": i, "seconds": s} for i, s in enumerate([1.0, 2.0, 3.0, 0.5, 1.5, 0.25])]
    assert read_run(write_run(tmp_path / "run", rows)).seconds == 3.0 + 1.5 + 0.25


def test_time_from_a_checkpoint_and_the_rows_after_it(tmp_path: Path) -> None:
    rows = [{"step": i, "seconds": s} for i, s in enumerate([1.0, 2.0, 3.5, 4.5])]
    run = read_run(write_run(tmp_path / "run", rows))
    time = {"seconds": 10.0, "device_seconds": 40.0, "seconds_of_start": 3.0}
    run.meta = {"step": 1, "environment": "a", "time": time}
    run.starts = [{"attempt": "a"}]
    assert run.seconds == 10 + 4.5 - 3  # the same start went on
    run.starts.append({"attempt": "b"})
    assert run.seconds == 10 + 4.5  # resumed from the checkpoint
    run.meta = run.meta | {"step": 3}
    assert run.seconds == 10
    run.meta = run.meta | {"time": {"seconds": "10", "seconds_of_start": float("nan")}}
    assert run.seconds == 4.5


def test_what_was_seen_against_a_plain_count(tmp_path: Path) -> None:
    folder, _ = prepare(tmp_path)
    assert write(folder) == 0
    run, rows = open_run(folder), read_record(folder).to_pylist()
    seen = count_seen(run)
    (counted,) = seen.datasets
    tokens: Counter[int] = Counter()
    for row in rows:
        tokens[row["document"]] += row["length"]
    dataset = PackedDataset(folder.parent / "data")
    starts = dataset.document_start(np.arange(dataset.n_documents + 1))
    share = [tokens[d] / (starts[d + 1] - starts[d]) for d in range(dataset.n_documents)]
    times = Counter(0.0 if s == 0 else 0.5 if s < 0.5 else float(min(8, round(s))) for s in share)
    assert (seen.steps, seen.of) == (run.steps, run.steps)
    assert counted.tokens_seen == sum(tokens.values()) and counted.documents_seen == len(tokens)
    assert counted.by_source == {"random": (len(tokens), sum(tokens.values()))}
    assert counted.times == times
    # A sample of the documents, and no time at all.
    (every_third,) = count_seen(run, most_documents=20).datasets
    assert every_third.sampled == 3 and every_third.tokens_seen == counted.tokens_seen
    mine = sum(tokens[d] for d in range(0, dataset.n_documents, 3))
    assert every_third.by_source["random"][1] == 3 * mine
    hurried = count_seen(run, deadline_s=0)
    assert hurried.steps < run.steps and not hurried.complete and hurried.datasets[0].by_source == {}
    page = Page(run_report(folder, record_s=0))
    assert f"Counted over steps 0 to {hurried.steps - 1} of {run.steps}" in page.root.text


def test_a_trained_run(data: Path, tmp_path: Path) -> None:
    """Resumed from an older checkpoint: what was abandoned is drawn apart, and the record's counts are right."""
    out = tmp_path / "Größe <b>"
    train(*flags(data, out, log__report=False))
    assert not (out / "report.html").exists()
    output = train(*flags(data, out, log__report=True, resume="iter-00000004-ckpt.pth")).stdout
    assert f"report: {out / 'report.html'}" in output
    page = Page((out / "report.html").read_text())
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    shown = page.line("loss-chart", "training")
    expected = [row for row in rows if row["train_loss"]]
    assert shown["steps"] == [int(row["step"]) for row in expected]
    assert shown["y"] == pytest.approx([float(row["train_loss"]) for row in expected], rel=1e-5)
    events = [row[:2] for row in page.table("Starts, rollbacks and other events")]
    assert events[1:] == [["0", "Start"], ["4", "Steps abandoned"], ["4", "Resume"], ["12", "Finished"]]
    assert page.root.with_id("loss-chart").all("path", "quiet")
    assert len(page.root.with_id("loss-chart").all("path", "resume")) == 2  # the line and its key
    (_, row) = page.table("Data seen by dataset")
    rows_of_record = read_record(out).to_pylist()
    assert row[4] == str(len({r["document"] for r in rows_of_record}))
    assert row[1] == short(sum(r["length"] for r in rows_of_record)) == short(float(expected[-1]["tokens"]))
    assert ["train.max_steps", "12", "none"] in page.table("Settings that differ from their defaults")
    assert not [r for r in page.table("Settings that differ from their defaults") if r[0] == "optim.beta1"]
    facts = read_run(out)
    assert facts.status == "finished" and facts.step == 12 and len(facts.branches) == 1 and not facts.faults


def test_a_report_that_fails_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path / "none")
    assert re.match(
        r"warning: the report of .*none could not be written \(no run at .*\); try python ", capsys.readouterr().err
    )
    run = write_run(tmp_path / "run", steady(2))
    (run / "report.html").mkdir()
    write_report(run)
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1.0"])
def test_record_s_is_a_number_from_0(seconds: str, tmp_path: Path) -> None:
    message = f"--record_s {seconds} must be a number of 0 or more"
    assert message in script_error("report.py", tmp_path, "--record_s", seconds)


def test_defaults_are_those_of_the_trainer(tmp_path: Path) -> None:
    defaults = default_settings()
    assert defaults["optim.lr"] == 3e-4 and defaults["log.report"] is True and defaults["train.max_steps"] is None
    assert defaults["data.synthetic.level"] == "simple" and "log.every_steps" in defaults
    assert "train" not in defaults and len(defaults) > len(RunArgs.__dataclass_fields__)


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (1234.5678, "1,235"), (0.00012345, "0.0001234"), (1.5e-7, "1.5e−7"), (-2.5, "−2.500"), (math.inf, "∞")],
)
def test_numbers(value: float, shown: str) -> None:
    assert number(value) == shown


def test_counts_and_durations() -> None:
    assert [short(v) for v in (5, 999, 1500, 99_999, 1_024_000, 3e9)] == [
        "5",
        "999",
        "1,500",
        "100 k",
        "1.02 M",
        "3.00 B",
    ]
    seconds = (3, 45, 125, 7980, 273600, 31_449_600, 400 * 86400, 3e10)
    texts = ["3.0 s", "45 s", "2 min 5 s", "2 h 13 min", "3 d 4 h", "364 d", "1 y 35 d", "951 y 107 d"]
    assert [duration(s) for s in seconds] == texts
    assert number(math.nan) == number(None) == duration(None) == "–"


@examples(50)
@given(st.floats(-1e5, 1e5), st.floats(1e-2, 1e6), st.integers(4, 8))
def test_linear_ticks_are_round_and_inside(low: float, width: float, most: int) -> None:
    high = low + width
    ticks = linear_ticks(low, high, most)
    slack = 1e-6 * width
    assert 2 <= len(ticks) <= 2 * most and low - slack <= ticks[0] and ticks[-1] <= high + slack
    steps = [b - a for a, b in pairwise(ticks)]
    assert max(steps) - min(steps) < 1e-3 * max(steps)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 1e-2
    assert len(set(tick_labels(ticks))) == len(ticks)


@examples(50)
@given(st.floats(-8, 8), st.floats(0.3, 12))
def test_log_ticks(power: float, decades: float) -> None:
    low, high = 10**power, 10 ** (power + decades)
    ticks = log_ticks(low, high)
    assert len(ticks) >= 2 and all(low * 0.999 <= t <= high * 1.001 for t in ticks) and ticks == sorted(ticks)


def luminance(colour: str) -> float:
    """Relative luminance of #rrggbb (WCAG 2.1)."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_contrast_reaches_aa() -> None:
    style = (HERE / "page.css").read_text()
    blocks = [
        dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
        for block in re.findall(r"\{([^{}]*--page[^{}]*)\}", style)
    ]
    blocks = [block for block in blocks if "warn-page" in block]
    assert len(blocks) == 3 and blocks[1] == blocks[2], "light, and dark by the system and by the button"
    for colours in blocks:
        for text in ("text", "soft", "link"):
            assert contrast(colours[text], colours["page"]) >= 4.5, text
            assert contrast(colours[text], colours["warn-page"]) >= 4.5, text
        for line in ("c1", "c2", "c3", "c4", "c5", "c6", "quiet", "resume", "rollback", "focus"):
            assert contrast(colours[line], colours["page"]) >= 3, line


def test_assets_are_packaged() -> None:
    assert re.search(r'"lit_eval\.report" = \["\*\.css", "\*\.js"\]', (ROOT / "pyproject.toml").read_text())
