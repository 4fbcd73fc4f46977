"""Planted faults in real runs: non-finite losses, spikes, signals, a full disk, a rank that fails or hangs.

Each run is compared with an undisturbed one: parameters, losses, record.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from rank_server import Answer
from running import ROLLBACK, SPIKE, flags, metrics, shared_rank_server, train_rolled_back
from whole_record import read_record

from lit_data.record.trace import left_out_of_document, open_run
from lit_data.record.verify import verify
from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import Checkpoint
from pretrain.failure.watchdog import EXIT_HUNG

Ranks = Callable[..., Answer]


@pytest.fixture(scope="module")
def ranks() -> Ranks:
    """Runs training on forked ranks: ranks(world_size, run, flags, plants=[...])."""
    run: Ranks = shared_rank_server().run
    return run


def two(**changes: object) -> dict[str, object]:
    """Settings of a run on two ranks."""
    return {"devices": 2, "strategy": "ddp", "resume": "auto", "train__max_steps": 16, "save__every_steps": 4} | changes


def same_end(a: Path, b: Path) -> None:
    """The last checkpoints and the records of two runs are equal."""
    one, other = Checkpoint(list_checkpoints(a)[-1]), Checkpoint(list_checkpoints(b)[-1])
    assert one.meta["step"] == other.meta["step"] and sorted(one.names()) == sorted(other.names())
    for name in one.names():
        assert torch.equal(one.tensor(name), other.tensor(name)), name
    assert read_record(a).equals(read_record(b))
    assert verify(open_run(a)) == []
    for x, y in zip(metrics(a), metrics(b), strict=True):
        for column in ("step", "tokens", "train_loss", "val_loss", "lr", "grad_norm"):
            assert x[column] == y[column], f"{column} at step {x['step']}"


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory, ranks: Ranks) -> Path:
    """An undisturbed run on two ranks."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert ranks(2, run, flags(data, run, **two())).statuses == [0, 0]
    return run


@pytest.mark.parametrize(
    ("when", "number", "asynchronous"),
    [
        ("step", 6, "false"),
        pytest.param("step", 6, "true", marks=pytest.mark.slow),
        pytest.param("validation", 2, "false", marks=pytest.mark.slow),
        pytest.param("validation", 2, "true", marks=pytest.mark.slow),
        pytest.param("saving", 2, "false", marks=pytest.mark.slow),
        ("saving", 2, "true"),
    ],
)
def test_a_signal_to_one_rank_saves_and_resumes(
    data: Path, tmp_path: Path, whole: Path, ranks: Ranks, when: str, number: int, asynchronous: str
) -> None:
    run = tmp_path / "run"
    arguments = flags(data, run, **two(save__asynchronous=asynchronous, stop__exit_code=75))
    fault = {"kind": "signal", "rank": 1, "name": "SIGTERM", "when": when, "number": number}
    stopped = ranks(2, run, arguments, plants=[fault])
    assert stopped.statuses == [75, 75]
    mark = json.loads((run / "stopped.json").read_text())
    # Signalled in a step or a validation, it stops after that step or the next; in a background save, later.
    least, most = {"step": (6, 7), "validation": (6, 7), "saving": (9, 9 if asynchronous == "false" else 15)}[when]
    assert mark["signal"] == "SIGTERM" and least <= mark["step"] <= most
    assert list_checkpoints(run)[-1].name == mark["checkpoint"]
    assert ranks(2, run, arguments).statuses == [0, 0]
    assert not (run / "stopped.json").exists()
    same_end(run, whole)


def test_requeue_happens_once_the_state_is_saved(
    data: Path, tmp_path: Path, ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, run = tmp_path / "tools", tmp_path / "run"
    tools.mkdir()
    scontrol = tools / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@ $(ls {run} | grep -c iter-)" >> {tmp_path}/called\n')
    scontrol.chmod(0o755)
    fault = {"kind": "signal", "rank": 0, "name": "SIGUSR1", "when": "step", "number": 3}
    env = {"PATH": f"{tools}:/usr/bin:/bin", "SLURM_JOB_ID": "4711"}
    stopped = ranks(2, run, flags(data, run, **two(stop__requeue="true")), plants=[fault], env=env)
    assert stopped.statuses == [0, 0], stopped.output
    assert (tmp_path / "called").read_text() == "requeue 4711 1\n"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_non_finite_steps_are_skipped_on_all_ranks(data: Path, tmp_path: Path, ranks: Ranks, strategy: str) -> None:
    """One rank's loss is NaN in two steps: both ranks skip them, and nothing else changes."""
    run = tmp_path / "run"
    fault = {"kind": "nan", "rank": 1, "steps": [5, 7]}
    answer = ranks(2, run, flags(data, run, **two(strategy=strategy)), plants=[fault])
    assert answer.statuses == [0, 0], answer.output
    rows = metrics(run)
    assert [float(r["skipped"] or 0) for r in rows] == [0] * 6 + [1] + [2] * 10
    assert rows[-1]["val_loss"] not in ("", "nan")
    record = read_record(run)
    applied = {s: a for s, a in zip(record["step"].to_pylist(), record["applied"].to_pylist(), strict=True)}
    assert [s for s, a in applied.items() if not a] == [5, 6]
    assert verify(open_run(run)) == []


def test_too_many_skipped_steps_end_the_run(data: Path, tmp_path: Path, ranks: Ranks) -> None:
    run = tmp_path / "run"
    fault = {"kind": "nan", "rank": 1, "steps": [5, 100]}
    answer = ranks(2, run, flags(data, run, **two(guard__max_skipped_steps=4)), plants=[fault])
    assert answer.statuses == [1, 1]
    assert "before them, --resume iter-00000004-ckpt.pth" in answer.output
    last = Checkpoint(list_checkpoints(run)[-1])
    assert last.meta["step"] == 9, "the state was not saved, although skipped steps do not change it"
    good = Checkpoint(run / "iter-00000004-ckpt.pth")
    assert last.tensor("optimizer.all/step_count") == good.tensor("optimizer.all/step_count") + 1
    again = ranks(2, run, flags(data, run, **two()))
    assert again.statuses == [0, 0] and verify(open_run(run)) == []


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_spike_is_rolled_back_and_its_samples_skipped(
    data: Path, tmp_path: Path, ranks: Ranks, strategy: str
) -> None:
    run = tmp_path / "run"
    changes = two(**ROLLBACK, strategy=strategy)
    train_rolled_back(data, run, strategy)
    assert [int(r["step"]) for r in metrics(run)] == list(range(25))
    assert max(float(r["train_loss"]) for r in metrics(run)[1:]) < 8
    order = json.loads((run / "datapoints" / "order.json").read_text())
    # Two high losses form a spike: those of steps 13 and 14. All samples since the checkpoint are skipped.
    assert order["segments"] == [
        {"from_step": 0, "first_sample": 0, "global_batch": 8},
        {"from_step": 10, "first_sample": 14 * 8, "global_batch": 8},
    ]
    (skip,) = order["skips"]
    assert (skip["step"], skip["first_sample"], skip["end_sample"]) == (10, 80, 112) and "spike" in skip["reason"]
    assert Checkpoint(list_checkpoints(run)[-1]).meta["skips"] == [skip]
    record = read_record(run)
    seen = set(record["sample"].to_pylist())
    assert seen == set(range(80)) | set(range(112, 112 + 112)) and len(set(record["step"].to_pylist())) == 24
    traced = open_run(run)
    assert verify(traced) == []
    # Queries for a document report its skipped samples.
    windows = traced.mixture.locate(np.arange(80, 112))[2]
    documents = {d for w in windows.tolist() for d in traced.rows[0].pieces(np.array([w])).document.tolist()}
    left_out = {s for d in documents for s, reason in left_out_of_document(traced, d) if reason == skip["reason"]}
    assert left_out == set(range(80, 112))

    # Killed after the rollback, the run resumes with the same samples and the same result.
    killed = tmp_path / "killed"
    plants = [SPIKE, {"kind": "kill", "rank": 1, "step": 19}]
    arguments = flags(data, killed, **changes)
    assert ranks(2, killed, arguments, plants=plants).statuses[1] == -9
    assert ranks(2, killed, arguments, plants=[SPIKE]).statuses == [0, 0]
    same_end(run, killed)


def test_a_spike_without_a_rollback_target_ends_the_run(data: Path, tmp_path: Path, ranks: Ranks) -> None:
    run = tmp_path / "run"
    changes = two(**(ROLLBACK | {"save__every_steps": 25}))
    answer = ranks(2, run, flags(data, run, **changes), plants=[SPIKE])
    assert answer.statuses == [1, 1] and "no earlier checkpoint to go back to" in answer.output
    run = tmp_path / "warned"
    answer = ranks(2, run, flags(data, run, **(changes | {"guard__spike_action": "warn"})), plants=[SPIKE])
    assert answer.statuses == [0, 0] and answer.output.count("warning: loss spike") == 1


@pytest.mark.parametrize(
    ("policy", "asynchronous"),
    [
        ("stop", "false"),
        pytest.param("stop", "true", marks=pytest.mark.slow),
        ("skip", "false"),
        # Seldom the record is written while an unfinished checkpoint takes the last space: its failure ends the run.
        pytest.param("skip", "true", marks=pytest.mark.slow),
    ],
)
def test_full_disk_during_a_save(
    data: Path, tmp_path: Path, whole: Path, ranks: Ranks, policy: str, asynchronous: str
) -> None:
    """The disk is full while the second checkpoint is written, and has space again before the third."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        run = disk / "run"
        arguments = flags(data, run, **two(save__on_error=policy, save__asynchronous=asynchronous))
        # Full except for 96 KB: enough for the record and metrics, not for a checkpoint of 400 KB.
        ballast = {"kind": "ballast", "rank": 0, "file": str(disk / "ballast"), "from_step": 5, "to_step": 10}
        answer = ranks(2, run, arguments, plants=[ballast, {"kind": "blind"}])
        names = [p.name for p in list_checkpoints(run)]
        assert "No space left on device" in answer.output
        if policy == "stop":
            assert answer.statuses == [1, 1] and names == ["iter-00000004-ckpt.pth"]
            assert "newest checkpoint is" in answer.output
            (disk / "ballast").unlink()
            assert ranks(2, run, arguments).statuses == [0, 0]
        else:
            assert answer.statuses == [0, 0], answer.output
            assert names == ["iter-00000004-ckpt.pth", "iter-00000012-ckpt.pth", "iter-00000016-ckpt.pth"]
        assert not list(run.glob(".iter-*"))
        same_end(run, whole)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_the_rank_that_failed_first_is_named(data: Path, tmp_path: Path, whole: Path, ranks: Ranks) -> None:
    run = tmp_path / "run"
    answer = ranks(2, run, flags(data, run, **two()), plants=[{"kind": "raise", "rank": 1, "step": 6}])
    assert all(status not in (0, None) for status in answer.statuses)
    assert "planted failure" in (run / "logs" / "rank-00001.log").read_text()
    for rank in (0, 1):
        assert "rank 1" in answer.outputs[rank] and "planted failure" in answer.outputs[rank]
        assert "iter-00000004-ckpt.pth" in answer.outputs[rank], "the last good checkpoint is not named"
    assert [p.name for p in list_checkpoints(run)] == ["iter-00000004-ckpt.pth"], "an exception on one rank saved"
    assert ranks(2, run, flags(data, run, **two())).statuses == [0, 0]
    same_end(run, whole)


def test_a_hanging_rank_is_named_and_logs_its_stack(data: Path, tmp_path: Path, whole: Path, ranks: Ranks) -> None:
    run = tmp_path / "run"
    arguments = flags(data, run, **two(guard__hang_timeout_s=3))
    answer = ranks(2, run, arguments, plants=[{"kind": "hang", "rank": 1, "step": 6}])
    assert answer.statuses == [EXIT_HUNG, EXIT_HUNG]
    assert "hang_for_ever" in (run / "logs" / "rank-00001.log").read_text()
    assert "train_step" in (run / "logs" / "rank-00000.log").read_text()
    assert "rank 1" in answer.output
    assert answer.seconds < 60
    assert ranks(2, run, flags(data, run, **two())).statuses == [0, 0]
    same_end(run, whole)
