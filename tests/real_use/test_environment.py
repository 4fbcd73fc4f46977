"""Each start and resume is recorded in RUN/environment.jsonl."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from running import flags, train

from lit_eval.metrics_file import Metrics
from lit_eval.run_facts import RunFacts
from lit_model.load import Checkpoint
from pretrain.logs.environment import (
    append_line,
    clean_command,
    code_hash,
    commit_of_files,
    git_facts,
    power_limit_w,
)
from pretrain.release.card import hardware


def entries(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "environment.jsonl").read_text().splitlines()]


def test_each_start_has_a_line(data: Path, tmp_path: Path) -> None:
    """A start on two ranks and a resume on one: a line each, referenced by their checkpoints, without keys."""
    run, key = tmp_path / "run", "0123456789abcdef" * 4
    changes = {"devices": 2, "train__micro_batch_samples": 4, "train__max_steps": 4, "log__run_name": f"hf_{key}"}
    train(*flags(data, run, **changes), env={"WANDB_API_KEY": key, "SLURM_JOB_ID": "4711"})
    longer = {"train__max_steps": 8, "resume": "latest", "resume_allow": "train.max_steps"}
    train(*flags(data, run, **longer))
    first, second = entries(run)
    assert (first["step"], first["world_size"], second["step"], second["world_size"]) == (0, 2, 4, 1)
    assert first["hosts"] == [socket.gethostname()] and first["slurm"] == {"job_id": "4711"}
    assert first["packages"]["torch"] == torch.__version__  # type: ignore[index]
    assert first["code"] == code_hash() and first["command"][1] == f"--out_dir={run}"  # type: ignore[index]
    for step, entry in ((4, first), (8, second)):
        assert Checkpoint(run / f"iter-{step:08d}-ckpt.pth").meta["environment"] == entry["attempt"]
    assert key not in (run / "environment.jsonl").read_text()


def commit(root: Path) -> str:
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false"]
    for arguments in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(root), *arguments], check=True)
    return subprocess.run(
        ["git", "-C", str(root), "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_state_of_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clean tree, a changed file, a new file; git is not installed; the checkout is no repository."""
    root = tmp_path / "checkout"
    root.mkdir()
    (root / "a.py").write_text("a = 1\n")
    assert git_facts(root) is None
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)  # an enclosing repository does not count
    assert git_facts(root) is None
    head = commit(root)
    clean = {"commit": head, "clean": True, "diff_sha256": None}
    assert git_facts(root) == clean
    (root / "a.py").write_text("a = 2\n")
    changed = git_facts(root)
    assert changed is not None and changed["clean"] is False and changed == git_facts(root)
    (root / "new").mkdir()
    (root / "new" / "b.py").write_text("b = 1\n")
    more = git_facts(root)
    assert more is not None and more["diff_sha256"] != changed["diff_sha256"]
    index = (root / ".git" / "index").read_bytes()
    os.utime(root / "a.py", (1, 1))
    git_facts(root)
    assert (root / ".git" / "index").read_bytes() == index, "a read-only checkout was written to"
    subprocess.run(["git", "-C", str(root), "pack-refs", "--all"], check=True)
    subprocess.run(["git", "-C", str(root), "worktree", "add", "-q", "-b", "side", str(tmp_path / "side")], check=True)
    monkeypatch.setenv("PATH", "")
    assert git_facts(root) == {"commit": head, "clean": None, "diff_sha256": None}
    assert commit_of_files(tmp_path / "side") == head


def test_command_line_without_secrets() -> None:
    """Keys and passwords on a command line are masked; counts of tokens and paths of tokenizers are not."""
    plain = ["--data.synthetic.tokens", "1000", "--train.max_tokens=5", "--tokenizer", "tok", "--model.name", "a"]
    assert clean_command(plain) == plain
    assert clean_command(["--hf_token", "abc", "--x"]) == ["--hf_token", "***", "--x"]
    assert clean_command(["--api-key=abc", "WANDB_API_KEY=abc"]) == ["--api-key=***", "WANDB_API_KEY=***"]
    assert clean_command(["https://me:pw@host/x", "hf_" + "a" * 30]) == ["https://me:***@host/x", "***"]


def test_truncated_lines_and_a_full_disk(tmp_path: Path) -> None:
    """After a kill that truncated the last line, the next line is complete. A full disk leaves no partial line."""
    path = tmp_path / "environment.jsonl"
    append_line(path, '{"a": 1}')
    with open(path, "a") as file:
        file.write('{"b"')
    append_line(path, '{"c": 3}')
    assert path.read_text().splitlines() == ['{"a": 1}', '{"b"', '{"c": 3}']


def test_record_that_cannot_be_written(data: Path, tmp_path: Path) -> None:
    """environment.jsonl cannot be written; the run trains, with one warning."""
    run = tmp_path / "run"
    (run / "environment.jsonl").mkdir(parents=True)
    done = train(*flags(data, run, train__max_steps=2))
    assert done.stdout.count("environment.jsonl cannot be written") == 1


@pytest.mark.parametrize(
    ("printed", "limit"), [("700.00\\n450.00\\n", 700.0), ("[N/A]\\n", None), ("no devices", None)]
)
def test_power_limit(printed: str, limit: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a stand-in for nvidia-smi; None without one."""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert power_limit_w() is None
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\nprintf '{printed}'\n")
    command.chmod(0o755)
    assert power_limit_w() == limit


def test_card_bounds_the_energy_of_gpus() -> None:
    rows = np.asarray([0.0, 1.0, 2.0])
    metrics = Metrics(columns={"step": rows, "seconds": 1800 * rows}, written={"seconds": np.ones(3, dtype=bool)})
    start = {"step": 0, "world_size": 8, "gpus": ["NVIDIA H100"], "gpu_power_limit_w": 700.0}
    cut = RunFacts(Path("run"), metrics, starts=[start])
    facts = dict(hardware(cut))
    assert facts["Device hours of training steps"] == "8.00"
    assert "at most 5.6 kWh at the GPUs' power limit of 700 W" in facts["Energy of training steps"]
    cut.meta = {"time": {"device_seconds": 9 * 3600.0}}  # with the time after the last row
    assert dict(hardware(cut))["Device hours of training steps"] == "9.00"
