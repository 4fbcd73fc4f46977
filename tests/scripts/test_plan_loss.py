"""plan_run.py --predict_loss against known laws and finished runs, and the plan in a run's report."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from running import flags, script, script_error, train_in_process
from written_runs import Page, write_run

from lit_eval.report.run_report import run_report
from lit_eval.run_facts import read_run
from pretrain.planning.loss import FinishedRun, draw_losses, read_finished_runs

FACTORS = [(8, 3), (8, 9), (16, 6), (24, 3)]
"""(width of the model, steps) of the runs."""


@pytest.mark.parametrize("runs", [3, 6])
def test_intervals_of_known_laws(runs: int) -> None:
    """Losses of a law with random exponents, and noise of 1 %: the 90 % intervals of larger runs cover about 90 %."""
    rng = np.random.default_rng(runs)
    covered, widths = 0, []
    for _ in range(30):
        e, a, b = rng.uniform(1, 3), rng.uniform(0.3, 2), rng.uniform(0.3, 2)
        alpha, beta = rng.uniform(0.2, 0.6, size=2)
        n = np.append(np.exp(rng.uniform(math.log(1e5), math.log(1e6), runs)), rng.uniform(1e6, 5e6))
        d = np.append(np.exp(rng.uniform(math.log(3e5), math.log(2e6), runs)), rng.uniform(2e6, 1e7))
        losses = (e + a * (3e5 / n) ** alpha + b * (1e6 / d) ** beta) * (1 + 0.01 * rng.standard_normal(runs + 1))
        low, high = np.quantile(draw_losses(n[:-1], d[:-1], losses[:-1], n[-1], d[-1], rng), [0.05, 0.95])
        covered += low <= losses[-1] <= high
        widths.append((high - low) / losses[-1])
    assert covered >= 25
    assert np.median(widths) < 0.3  # an interval that covers everything would be useless


def test_more_runs_narrow_the_interval_and_distance_widens_it() -> None:
    rng = np.random.default_rng(0)
    n, d = np.geomspace(1e5, 1e6, 8), np.geomspace(3e5, 2e6, 8)[[0, 4, 1, 5, 2, 6, 3, 7]]
    losses = 2 + (3e5 / n) ** 0.35 + (1e6 / d) ** 0.3

    def width(runs: int, size: float) -> float:
        low, high = np.quantile(draw_losses(n[:runs], d[:runs], losses[:runs], size, 2e6, rng), [0.05, 0.95])
        return float(high - low)

    assert width(8, 2e6) < width(3, 2e6)
    assert width(8, 1e6) < width(8, 1e8)


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Finished runs of the sizes of FACTORS."""
    folder = tmp_path_factory.mktemp("finished")
    paths = [folder / f"{width}-{steps}" for width, steps in FACTORS]
    for (width, steps), path in zip(FACTORS, paths, strict=True):
        sizes = {"model__n_embd": width, "model__n_head": 2, "model__n_query_groups": 2, "optim__warmup_steps": 1}
        train_in_process(flags(data, path, train__max_steps=steps, eval__every_steps=steps, **sizes))
    return paths


def test_runs_are_read(finished: list[Path]) -> None:
    runs = read_finished_runs(finished)
    assert [run.tokens for run in runs] == [steps * 8 * 32 for _, steps in FACTORS]
    assert [run.loss for run in runs] == [read_run(path).metrics.last("val_loss") for path in finished]
    assert isinstance(runs[0], FinishedRun) and runs[0].parameters < runs[2].parameters < runs[3].parameters


def test_the_script_prints_it(finished: list[Path], data: Path) -> None:
    more = [f for f in flags(data, Path("none"), train__max_steps=20) if not f.startswith(("--out_dir", "--devices"))]
    done = script("plan_run.py", "--gpu", "cpu", *more, "--predict_loss", *finished)
    assert done.returncode == 0, done.stderr
    found = re.search(
        r"^loss +([\d.]+) nats a token \(([\d.]+) to ([\d.]+) at 90%\), predicted from 4 runs", done.stdout, re.M
    )
    assert found is not None, done.stdout
    median, low, high = map(float, found.groups())
    assert low < median < high


def test_runs_that_cannot_be_compared(finished: list[Path], data: Path, tmp_path: Path) -> None:
    def refusal(*runs: Path) -> str:
        settings = [flag for flag in flags(data, tmp_path / "x") if not flag.startswith("--devices")]
        return script_error("plan_run.py", "--gpu", "h100", *settings, "--predict_loss", *runs)

    assert "needs 3 or more different runs; 2 given" in refusal(finished[0], finished[1], finished[0])
    assert "no run at" in refusal(*finished[:2], tmp_path / "none")
    train_in_process(flags(data, tmp_path / "no_val", data__val=None, train__max_steps=3))
    assert "has no validation data" in refusal(*finished[:2], tmp_path / "no_val")
    train_in_process(flags(data, tmp_path / "other", data__val=data / "train", train__max_steps=3))
    damaged = tmp_path / "damaged"
    shutil.copytree(finished[0], damaged)
    (damaged / "iter-00000003-ckpt.pth").write_bytes(b"nothing")
    assert "has no checkpoint that can be read" in refusal(*finished[:2], damaged)
    diverged = tmp_path / "diverged"
    shutil.copytree(finished[1], diverged)
    rows = (diverged / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("val_loss")
    last = rows[-1].split(",")
    last[place] = "nan"
    (diverged / "metrics.csv").write_text("\r\n".join([*rows[:-1], ",".join(last), ""]))
    assert "no finite validation loss" in refusal(finished[0], finished[2], diverged)
    assert "was validated on other data" in refusal(*finished[:2], tmp_path / "other")
    half = tmp_path / "half"
    train_in_process(flags(data, half, train__max_steps=8, stop__after_minutes=0.00001))
    assert "has not decayed yet" in refusal(*finished[:2], half)


def test_plan_and_reality_in_the_report(finished: list[Path], tmp_path: Path) -> None:
    run, plan = finished[1], json.loads((finished[1] / "environment.jsonl").read_text())["plan"]
    rows = {row[0]: row[1:] for row in Page(run_report(run)).table("Plan and reality")[1:]}
    assert set(rows) == {
        "Peak memory beside the imports, GiB",
        "Tokens per second, median",
        "Time of the steps done",
        "Checkpoint, MB",
        "Record of the steps done, MB",
    }
    size = (run / "iter-00000009-ckpt.pth").stat().st_size
    assert float(rows["Checkpoint, MB"][2]) == pytest.approx(size / 1e6, rel=1e-3)
    assert float(rows["Checkpoint, MB"][0]) == pytest.approx(plan["checkpoint_bytes"] / 1e6, rel=1e-3)
    assert float(rows["Checkpoint, MB"][3]) == pytest.approx(size / plan["checkpoint_bytes"], abs=0.01)
    assert plan["tokens_per_s"] == sorted(plan["tokens_per_s"])

    # What a damaged or older environment.jsonl holds is left out.
    other = write_run(tmp_path / "run", [{"step": 1, "tokens": 5, "train_loss": 2.5, "tokens_per_s": 7}])
    for start in (
        {},
        {"plan": 3},
        {"plan": {"tokens_per_s": "fast", "checkpoint_bytes": None, "seconds": [1, 2]}},
        {"plan": {"tokens_per_s": 10**400, "resident_bytes": 10**400}},
    ):
        (other / "environment.jsonl").write_text(json.dumps(start) + "\n")
        assert "Plan and reality" not in run_report(other)
