"""A killed run resumes bit for bit: parameters, optimizer state, losses, record."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import ROOT, flags, metrics, same_checkpoints, train, train_in_process, train_killed
from whole_record import read_record

from lit_data.loading.order import Segment
from lit_data.record.trace import open_run
from lit_data.record.verify import verify
from lit_eval.compare.entries import read_entries
from lit_eval.run_facts import read_run
from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import Checkpoint
from pretrain.args import DistillationArgs, OptimArgs, TrainArgs, plain
from pretrain.build import set_up
from pretrain.cli.run_parser import parse
from pretrain.data import length_of
from pretrain.resume import read_meta


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of 12 steps; tests work on a copy."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(*flags(data, run))
    return run


def test_more_than_two_ranks_sum_in_the_same_order(data: Path, tmp_path: Path) -> None:
    """DDP's first step after a resume equals the same step of the original run, although the order of sums matters
    here.
    """
    run, changes = tmp_path / "run", {"devices": 4, "strategy": "ddp", "train__max_steps": 4, "save__every_steps": 2}
    train(*flags(data, run, **changes))
    train(*flags(data, run, resume="iter-00000002-ckpt.pth", **changes))
    (before,) = run.glob("abandoned/*/iter-00000004-ckpt.pth")
    same_checkpoints(before, run / "iter-00000004-ckpt.pth")


@pytest.mark.parametrize("steps", [24, pytest.param(120, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "changes",
    [
        {"model__attention_dropout": 0.1},
        pytest.param({"model__dropout": 0.1, "devices": 2, "strategy": "ddp"}, marks=pytest.mark.slow),
        {"model__dropout": 0.1, "devices": 2, "strategy": "fsdp", "save__state_dict_type": "sharded"},
        pytest.param(
            {"devices": 2, "strategy": "fsdp", "save__state_dict_type": "sharded", "optim__name": "muon"},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["one", "ddp", "fsdp-sharded", "fsdp-sharded-muon"],
)
def test_killed_run_resumes_bit_for_bit(data: Path, tmp_path: Path, changes: dict[str, object], steps: int) -> None:
    schedule = {"train__max_steps": steps, "save__every_steps": steps // 8, "eval__every_steps": steps // 3}
    changes = {**changes, **schedule}
    train(*flags(data, tmp_path / "whole", **changes))
    killed = tmp_path / "killed"
    train_killed(5 * steps // 12, *flags(data, killed, **changes))
    assert len(metrics(killed)) < steps, "the run was not interrupted"
    assert list_checkpoints(killed), "the run did not save before it was killed"
    train(*flags(data, killed, resume="auto", **changes))

    assert [p.name for p in list_checkpoints(killed)] == [p.name for p in list_checkpoints(tmp_path / "whole")]
    last = f"iter-{steps:08d}-ckpt.pth"
    same_checkpoints(tmp_path / "whole" / last, killed / last)
    for a, b in zip(metrics(tmp_path / "whole"), metrics(killed), strict=True):
        for column in ("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm"):
            assert a[column] == b[column], f"{column} at step {a['step']}"
    assert read_record(killed).equals(read_record(tmp_path / "whole"))
    assert verify(open_run(killed)) == []
    assert not list(killed.glob("**/*.tmp"))


def test_extended_run_equals_one_planned_so(data: Path, tmp_path: Path) -> None:
    """With --optim.schedule wsd, extended from a checkpoint of the stable phase: bit for bit."""
    short, planned = tmp_path / "short", tmp_path / "planned"
    wsd = {"optim__schedule": "wsd", "optim__decay_steps": 6, "save__every_steps": 12}
    train(*flags(data, short, **wsd, train__max_steps=20))
    train(*flags(data, planned, **wsd, train__max_steps=30))
    extend = {"train__max_steps": 30, "resume": "iter-00000012-ckpt.pth", "resume_allow": "train.max_steps"}
    train(*flags(data, short, **wsd, **extend))
    for step in (24, 30):
        same_checkpoints(short / f"iter-{step:08d}-ckpt.pth", planned / f"iter-{step:08d}-ckpt.pth")
    assert [row["lr"] for row in metrics(short)] == [row["lr"] for row in metrics(planned)]
    with pytest.raises(ValueError, match=r"--optim.decay_steps 6 exceeds the 5 steps of the run after the warmup"):
        length_of(parse(flags(data, short, **wsd, train__max_steps=7)), 32, 100, [Segment(0, 0, 8)])


def test_finished_run_is_unchanged(data: Path, tmp_path: Path, finished: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(run.rglob("*")) if p.name != ".lock"}
    again = train(*flags(data, run, resume="latest"))
    assert "nothing to do" in again.stdout
    after = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in sorted(run.rglob("*")) if p.name != ".lock"}
    assert {p: v for p, v in before.items() if p.is_file()} == {p: v for p, v in after.items() if p.is_file()}


def test_resume_from_an_older_checkpoint_sets_the_later_ones_aside(data: Path, tmp_path: Path, finished: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    first = Checkpoint(run / "iter-00000012-ckpt.pth")
    reference = {n: first.tensor(n).clone() for n in first.names()}
    train(*flags(data, run, resume="iter-00000004-ckpt.pth"))
    assert len(list((run / "abandoned").glob("*/iter-*"))) == 2
    again = Checkpoint(run / "iter-00000012-ckpt.pth")
    assert all(torch.equal(again.tensor(n), t) for n, t in reference.items())
    assert verify(open_run(run)) == []
    assert [int(r["step"]) for r in metrics(run)] == list(range(13))


@pytest.mark.slow
def test_sigterm_saves_and_the_run_resumes(data: Path, tmp_path: Path) -> None:
    steps = 60
    changes = {"train__max_steps": steps, "save__every_steps": 1000, "eval__every_steps": 1000}
    train(*flags(data, tmp_path / "whole", **changes))
    run = tmp_path / "stopped"
    command = [sys.executable, str(ROOT / "pretrain" / "fabric_train.py"), *flags(data, run, **changes)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while not (run / "metrics.csv").exists() or len(metrics(run)) < 3:
        time.sleep(0.02)
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "stopped by SIGTERM" in output
    assert len(list_checkpoints(run)) > 0 and len(metrics(run)) < steps
    train(*flags(data, run, resume="latest", **changes))
    last = f"iter-{steps:08d}-ckpt.pth"
    same_checkpoints(tmp_path / "whole" / last, run / last)


def test_time_of_stopped_starts_is_counted(data: Path, tmp_path: Path) -> None:
    """Also where a start ends before its first log row."""
    run, total = tmp_path / "run", 0.0
    stop = {"stop__after_minutes": 1e-6, "log__every_steps": 1000, "data__val": None}
    for step in (1, 2, 3):
        train_in_process(flags(data, run, resume="auto", **stop))
        spent = Checkpoint(run / f"iter-{step:08d}-ckpt.pth").meta["time"]
        assert spent["seconds_of_start"] > 0
        total += spent["seconds_of_start"]
        assert spent["seconds"] == spent["device_seconds"] == total
    assert not any(row["seconds"] for row in metrics(run))
    assert read_run(run).seconds == read_entries([run])[0].seconds == total
    assert read_run(run).spent("device_seconds") == total


def test_a_setting_that_an_older_checkpoint_lacks_counts_as_its_default(
    data: Path, tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints from before a setting existed resume, also with another way of computing the same."""
    run = shutil.copytree(finished, tmp_path / "run")
    meta = read_meta(run / "iter-00000004-ckpt.pth")
    defaults = {"train": TrainArgs(max_steps=1), "optim": OptimArgs(), "distillation": DistillationArgs()}
    lacking = 0
    for section, fields in plain(defaults).items():
        kept = {k: v for k, v in meta["config"][section].items() if v != fields[k] or k in ("max_steps", "max_epochs")}
        lacking += len(meta["config"][section]) - len(kept)
        meta["config"][section] = kept
    assert lacking > 30
    monkeypatch.setattr("pretrain.build.read_meta", lambda path: meta)
    for changes in ({}, {"train__loss_kernel": "plain"}):
        set_up(parse(flags(data, run, resume="iter-00000004-ckpt.pth", **changes))).close()
    with pytest.raises(ValueError, match=r"train.z_loss: 0.0 there, 0.1 here"):
        set_up(parse(flags(data, run, resume="iter-00000004-ckpt.pth", train__z_loss=0.1)))


def test_resume_refuses_another_run(data: Path, tmp_path: Path, finished: Path) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    refused = train(*flags(data, run, resume="latest", seed=5, optim__lr=0.5), check=False)
    assert refused.returncode == 2
    assert "seed: 1337 there, 5 here" in refused.stderr and "optim.lr" in refused.stderr
    longer = train(*flags(data, run, resume="latest", train__max_steps=14), check=False)
    assert longer.returncode == 2 and "--resume_allow" in longer.stderr
    train(*flags(data, run, resume="latest", train__max_steps=14, resume_allow="train.max_steps,optim"))
    assert metrics(run)[-1]["step"] == "14"
    # An allowed change is stored from then on.
    changes = [{"step": 12, "differences": {"train.max_steps": [12, 14]}}]
    assert Checkpoint(run / "iter-00000014-ckpt.pth").meta["changes"] == changes


def test_retention_keeps_the_newest(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(*flags(data, run, train__max_steps=10, save__every_steps=2, save__keep_last=2, save__keep_every=4))
    assert [p.name for p in list_checkpoints(run)] == [f"iter-{s:08d}-ckpt.pth" for s in (4, 8, 10)]
