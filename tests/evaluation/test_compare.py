"""Comparisons: statistics against closed forms, ranks, settings, paired tests, and the comparison page."""

from __future__ import annotations

import json
import math
import subprocess
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_examples import examples
from running import ROOT, warm_python
from written_runs import Page, write_results, write_run

from lit_eval.compare.comparison import Score, Task, compare, differing_settings
from lit_eval.compare.entries import read_entries
from lit_eval.compare.learning_curves import draw, learning_curves
from lit_eval.compare.statistics import (
    DISTINCT,
    bootstrap_interval,
    bootstrap_means,
    bootstrap_p,
    holm,
    mcnemar_exact,
    paired_test,
    sign_flip_p,
)
from lit_eval.compare.text import as_json, as_text
from lit_eval.report.comparison_report import comparison_report
from lit_eval.report.run_report import run_report


@examples(50)
@given(st.integers(0, 6), st.integers(0, 6))
def test_mcnemar_against_all_outcomes(wins: int, losses: int) -> None:
    """Of all 2^n equally likely outcomes, those at least as uneven."""
    n = wins + losses
    uneven = sum(abs(2 * k - n) >= abs(wins - losses) for k in (outcome.bit_count() for outcome in range(1 << n)))
    assert mcnemar_exact(wins, losses) == pytest.approx(float(Fraction(uneven, 1 << n)), rel=1e-12)
    assert mcnemar_exact(wins, losses) == mcnemar_exact(losses, wins)


def test_mcnemar_of_many_items_is_near_the_normal_one() -> None:
    exact = 2 * sum(math.comb(1200, i) for i in range(571)) / (1 << 1200)
    assert mcnemar_exact(630, 570) == pytest.approx(exact, rel=1e-9)
    z = (630 - 570 - 1) / math.sqrt(1200)
    assert mcnemar_exact(630, 570) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=1e-3)
    with pytest.raises(ValueError, match="counts"):
        mcnemar_exact(-1, 2)


def test_bootstrap_of_right_or_wrong_is_binomial() -> None:
    """A resample's number of right items is binomial: mean, deviation and quantiles in closed form."""
    values = np.repeat([1.0, 0.0], [140, 60])
    means = bootstrap_means(values, 40_000)
    assert means.mean() == pytest.approx(0.7, abs=5e-4)
    assert means.std() == pytest.approx(math.sqrt(0.7 * 0.3 / 200), rel=0.02)
    interval = bootstrap_interval(values)
    cumulative = np.cumsum([math.comb(200, k) * 0.7**k * 0.3 ** (200 - k) for k in range(201)])
    low, high = (int(np.searchsorted(cumulative, q)) / 200 for q in (0.025, 0.975))
    assert interval.mean == 0.7 and interval.low == pytest.approx(low, abs=0.0051)
    assert interval.high == pytest.approx(high, abs=0.0051)


def test_bootstrap_of_many_distinct_values() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=500)
    assert len(np.unique(values)) > DISTINCT
    means = bootstrap_means(values, 20_000)
    assert means.mean() == pytest.approx(values.mean(), abs=0.005)
    assert means.std() == pytest.approx(values.std() / math.sqrt(500), rel=0.03)
    assert (bootstrap_means(values, 50, seed=3) == bootstrap_means(values, 50, seed=3)).all()
    assert (bootstrap_means(values, 50, seed=3) != bootstrap_means(values, 50, seed=4)).any()


def test_both_ways_of_resampling_agree() -> None:
    """All 3^3 resamples of three values, by hand."""
    values = np.array([0.0, 1.0, 5.0])
    exact = sorted(sum(some) / 3 for some in product(values, repeat=3))
    means = bootstrap_means(values, 60_000)
    for value in set(exact):
        assert np.mean(np.isclose(means, value)) == pytest.approx(np.mean(np.isclose(exact, value)), abs=0.006)


@pytest.mark.parametrize("values", [[], [math.nan], [1.0, math.inf]])
def test_bootstrap_refuses(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite values"):
        bootstrap_means(np.array(values))


def test_paired_bootstrap_p() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, 400)
    assert bootstrap_p(noise - noise.mean()) == 1.0
    shift = 0.1
    shifted = (noise - noise.mean()) / noise.std() + shift  # z = shift * sqrt(n) = 2
    assert bootstrap_p(shifted) == pytest.approx(math.erfc(2 / math.sqrt(2)), abs=0.01)
    assert bootstrap_p(np.full(9, 1.0)) < 1e-3


def test_sign_flips_by_hand_and_beside_the_bootstrap() -> None:
    assert sign_flip_p(np.array([0.9])) == 1.0  # one item proves nothing
    assert sign_flip_p(np.array([1.0, 2.0, 3.0])) == pytest.approx(2 / 8)
    assert sign_flip_p(np.array([1.0, -1.0])) == 1.0
    differences = np.random.default_rng(3).normal(0.4, 1.0, size=12)
    assert sign_flip_p(differences) == pytest.approx(bootstrap_p(differences), abs=0.1)


def test_paired_test_picks_its_test() -> None:
    first, second = np.array([1.0, 1, 1, 0, 1, 1]), np.array([1.0, 0, 0, 1, 0, 0])
    test = paired_test(first, second)
    assert (test.test, test.wins, test.losses, test.n) == ("McNemar exact", 4, 1, 6)
    assert test.p == mcnemar_exact(4, 1) and test.difference.mean == pytest.approx(0.5)
    other = paired_test(first, second, lower_is_better=True)
    assert (other.wins, other.losses, other.p) == (1, 4, test.p)
    assert paired_test(first * 0.5, second).test == "sign flips"
    assert paired_test(np.tile(first, 3) * 0.5, np.tile(second, 3)).test == "paired bootstrap"
    with pytest.raises(ValueError, match="same items"):
        paired_test(first, second[:-1])


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


def run_rows(final: float) -> list[dict[str, object]]:
    return [
        {
            "step": i,
            "tokens": 10 * i,
            "train_loss": final + 1 / i,
            "val_loss": final + 2 / i if i % 2 == 0 else None,
            "tokens_per_s": 100 * final,
        }
        for i in range(1, 11)
    ]


@pytest.fixture
def sweep(tmp_path: Path) -> list[Path]:
    """Five runs with other learning rates, two checkpoints of each evaluated on the same 60 pairs."""
    runs = []
    for number, final in enumerate([3.0, 2.5, 2.0, 4.0, 3.5]):
        settings = {"seed": 1, "optim": {"lr": 10.0 ** -(number + 1)}, "out_dir": f"runs/{number}"}
        run = write_run(tmp_path / f"lr {number} <b>", run_rows(final), settings)
        for step in (5, 10):
            right = 10 * (5 - round(final)) + step
            items = {"blimp": [1.0] * right + [0.0] * (60 - right)}
            write_results(run / "evaluation" / f"{step}.json", f"{run.name} {step}", items, step=step)
        runs.append(run)
    return runs


def test_ranks_settings_and_tests(sweep: list[Path]) -> None:
    comparison = compare(read_entries(sweep))
    assert [e.name for e in comparison.entries] == [sweep[i].name for i in (2, 1, 0, 4, 3)]
    assert [e.val_loss for e in comparison.entries] == pytest.approx([2.2, 2.7, 3.2, 3.7, 4.2])
    assert comparison.settings == {"optim.lr": [10.0 ** -(i + 1) for i in (2, 1, 0, 4, 3)]}
    (task,) = comparison.tasks
    assert (task.name, task.metric, task.best()) == ("blimp", "accuracy", 0)
    assert [s.value for s in task.scores if s] == pytest.approx([40 / 60, 40 / 60, 30 / 60, 20 / 60, 20 / 60])
    assert len(comparison.tests) == math.comb(5, 2)
    names = [e.name for e in comparison.entries]
    for test, (a, b) in zip(comparison.tests, combinations(names, 2), strict=True):
        assert (test.first, test.second) == (a, b)
    assert comparison.tests[1].result.p == mcnemar_exact(10, 0)
    assert comparison.remarks == []


@pytest.mark.parametrize("metric", ["bits_per_byte", "repetition_4", "longest_mean", "model_over_generator"])
def test_the_best_score_may_be_the_lowest(metric: str) -> None:
    assert Task("task", metric, [Score(0.9, 1, None), Score(0.2, 1, None)]).best() == 1
    assert Task("task", "accuracy", [Score(0.9, 1, None), Score(0.2, 1, None)]).best() == 0


def test_a_score_that_one_entry_alone_has_is_not_the_best(tmp_path: Path) -> None:
    """In text, JSON and HTML; nor is a validation loss that one run alone has the lowest."""
    run = write_run(tmp_path / "a", run_rows(3.0), {})
    others = [write_results(tmp_path / f"{name}.json", name, {"blimp": [1.0, 0.0]}) for name in ("b", "c")]
    for paths, best in (([run, others[0]], None), ([run, *others], "b")):
        entries = read_entries(paths)
        comparison = compare(entries)
        row = next(line for line in as_text(comparison).splitlines() if line.startswith("blimp"))
        assert row.rstrip().endswith("b") == (best is not None)
        assert as_json(comparison)["scores"][0]["best"] == best
        page = comparison_report(entries)
        assert ('<b class="best">' in page) == (best is not None) and "Lowest validation loss" not in page


def test_other_items_are_not_tested(tmp_path: Path) -> None:
    a = write_results(tmp_path / "a.json", "a", {"task": [1.0, 0.0], "own": [1.0]})
    b = write_results(tmp_path / "b.json", "b", {"task": [0.0, 0.0]}, sha256="other")
    comparison = compare(read_entries([a, b]))
    assert comparison.tests == [] and [t.name for t in comparison.tasks] == ["task", "own"]
    assert comparison.tasks[1].scores[1] is None


def test_no_interval_of_items_that_do_not_vary(tmp_path: Path) -> None:
    """Neither for one item nor for equal ones, in text, page and JSON; nor for equal differences."""
    items: dict[str, list[float]] = {"one": [0.5], "equal": [1.0] * 9, "vary": [1.0, 0.0, 1.0]}
    a, b = (write_results(tmp_path / f"{name}.json", name, items) for name in "ab")
    comparison = compare(read_entries([a, b]))
    one, equal, vary = (task.scores[0] for task in comparison.tasks)
    assert one and equal and vary and one.interval is None and equal.interval is None and vary.interval is not None
    text, page = as_text(comparison), comparison_report(read_entries([a, b]))
    for shown in ("one item: no interval", "all items equal: no interval"):
        assert shown in text and shown in page
    assert "[0, 0]" not in text and "[1, 1]" not in text
    assert {test.result.no_interval for test in comparison.tests} == {
        "one item: no interval",
        "all items equal: no interval",
    }


def test_names_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [write_run(tmp_path / top / "run", run_rows(2.0)) for top in "ab"]
    assert [e.name for e in read_entries(paths)] == ["a/run", "b/run"]
    assert capsys.readouterr().err == ""
    (link := tmp_path / "link").symlink_to(paths[0])
    assert [e.name for e in read_entries([paths[0], tmp_path / "b" / ".." / "a" / "run", link])] == ["run"]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2 and warnings[1].startswith(f"warning: {link} is given twice, also as {paths[0]}")
    results = [write_results(tmp_path / name, "model", {"x": [1.0, 0.0]}) for name in ("a.json", "b.json")]
    here = "/".join(tmp_path.parts[-3:])
    assert [e.name for e in read_entries(results)] == [f"{here}/model", f"{here}/model (2)"]


def test_settings_missing_in_a_run_differ(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", run_rows(2.0), {"seed": 1, "train": {"z_loss": 0.1}, "data": {"val": None}}),
        write_run(tmp_path / "b", run_rows(3.0), {"seed": 1, "data": {"val": None}}),
    ]
    assert differing_settings(read_entries(runs)) == {"train.z_loss": [0.1, None]}


def test_the_page_of_five_runs(sweep: list[Path]) -> None:
    page = Page(comparison_report(read_entries(sweep)))
    best = sweep[2].name
    (_, *rows) = page.table("Models by validation loss")
    assert [row[0].strip() for row in rows] == [sweep[i].name for i in (2, 1, 0, 4, 3)]
    assert [row[1] for row in rows] == ["2.2000", "2.7000", "3.2000", "3.7000", "4.2000"]
    chart = page.chart("val-chart")
    assert len(chart["lines"]) == 5
    assert chart["lines"][0]["name"] == best and chart["lines"][0]["y"] == pytest.approx(
        [3, 2.5, 7 / 3, 2.25, 2.2], rel=1e-5
    )
    assert len({line["style"] for line in chart["lines"]}) == 5
    curve = page.chart("curve-0")["lines"][0]
    assert curve["x"] == [500, 1000] and curve["y"] == pytest.approx([35 / 60, 40 / 60], rel=1e-5)
    assert curve["low"][0] < curve["y"][0] < curve["high"][0]
    assert page.root.with_id("curve-0").all("path", "band")
    assert page.table("Settings that differ")[1] == ["optim.lr", "0.001", "0.01", "0.1", "1e-05", "0.0001"]
    assert len(page.table("Paired tests")) == 11
    points = {p["name"]: (p["x"], p["y"]) for p in page.chart("loss-speed")["points"]}
    assert points[best] == (200, 2.2)


def test_tasks_evaluated_during_training(tmp_path: Path) -> None:
    rows = [row | {"eval/german_pairs": 0.5 + i / 100} for i, row in enumerate(run_rows(2.0))]
    runs = [write_run(tmp_path / "a", rows), write_run(tmp_path / "b", run_rows(3.0))]
    chart = Page(comparison_report(read_entries(runs))).chart("eval-0")
    assert [line["name"] for line in chart["lines"]] == ["a"]
    assert chart["lines"][0]["y"] == pytest.approx([0.5 + i / 100 for i in range(10)])
    page = Page(run_report(runs[0]))
    assert page.line("eval-0", "german pairs")["y"][0] == 0.5


def test_one_file_of_results(tmp_path: Path) -> None:
    page = Page(comparison_report(read_entries([write_results(tmp_path / "a.json", "mein Modell", {"x": [1.0, 0.0]})])))
    assert page.root.all("h1")[0].text == "mein Modell" and page.table("Scores of mein Modell")[1][2] == "0.5000"


def test_text_and_json(sweep: list[Path]) -> None:
    comparison = compare(read_entries(sweep))
    text = as_text(comparison)
    assert text.index(sweep[2].name) < text.index(sweep[3].name) and "McNemar exact" in text and "optim.lr" in text
    facts = json.loads(json.dumps(as_json(comparison), allow_nan=False))
    assert [e["rank"] for e in facts["entries"]] == [1, 2, 3, 4, 5]
    assert facts["scores"][0]["by_entry"][sweep[2].name]["value"] == pytest.approx(40 / 60)


def test_learning_curves_as_a_picture(sweep: list[Path], tmp_path: Path) -> None:
    curves = learning_curves(read_entries(sweep))
    draw(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="all_checkpoints"):
        draw([], tmp_path / "none.png")


def test_commands(sweep: list[Path], tmp_path: Path) -> None:
    page = tmp_path / "out" / "page.html"
    command = [warm_python(), "scripts/compare.py", *map(str, sweep[:2]), "--json", "--html", str(page)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["entries"][0]["name"] == sweep[1].name
    Page(page.read_text())


@pytest.mark.parametrize("script", ["scripts/compare.py", "scripts/report.py"])
def test_bad_input_is_one_line(script: str, tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text('{"format": 1}')
    (tmp_path / "empty").mkdir()
    (tmp_path / "metrics.csv").write_text("step,tokens\n1,2\n")
    (tmp_path / "none.jsonl").touch()
    cases = [("none", "nothing at"), ("broken.json", "model"), ("empty", "nothing to compare")]
    no_checkpoint = "is not a checkpoint written by this project, or it is damaged\n"
    for path, words in [*cases, ("metrics.csv", no_checkpoint), ("none.jsonl", no_checkpoint)]:
        command = [warm_python(), script, str(tmp_path / path)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stdout == "", done
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and words in done.stderr, done.stderr
