"""For tests of training: a small packed dataset of random ids, and runs of the trainer in separate processes."""

from __future__ import annotations

import atexit
import csv
import functools
import io
import os
import runpy
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from lit_data.packed.writer import PackedWriter
from lit_model.load import Checkpoint
from pretrain.build import set_up
from pretrain.cli.run_parser import parse
from pretrain.loop import fit

ROOT = Path(__file__).resolve().parents[2]
PYTHON_PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
"""PYTHONPATH of a process whose script is not one of the project's."""
VOCAB, EOS = 96, 1


def write_dataset(folder: Path, lengths: list[int], seed: int = 0, words: list[int] | None = None) -> Path:
    """Write a packed dataset whose documents follow a noisy rule, so that there is something to learn."""
    rng = np.random.default_rng(seed)
    facts = {"kind": "none", "fingerprint": "test", "vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "folder": None}
    with PackedWriter(folder, tokenizer=facts, vocab_size=VOCAB, eos_id=EOS, shard_tokens=sum(lengths) // 2) as writer:
        for i, length in enumerate(lengths):
            ids = 2 + (np.cumsum(rng.integers(1, 4, size=length)) % (VOCAB - 2))
            writer.add(
                np.append(ids, EOS),
                id=f"doc-{i}",
                source="random",
                place=i,
                n_bytes=3 * length,
                n_words=words and words[i],
            )
    return folder


MODEL = {
    "model.n_layer": 2,
    "model.n_head": 4,
    "model.n_query_groups": 2,
    "model.n_embd": 32,
    "model.intermediate_size": 48,
}


def flags(data: Path, out_dir: Path, **changes: object) -> list[str]:
    """Command line of a small run; `changes` are settings, with double underscores for dots."""
    settings: dict[str, object] = {
        "out_dir": out_dir,
        "data.train": data / "train",
        "data.val": data / "val",
        "accelerator": "cpu",
        "devices": 1,
        **MODEL,
        "train.max_steps": 12,
        "train.global_batch_samples": 8,
        "train.micro_batch_samples": 2,
        "train.block_size": 32,
        "optim.lr": 1e-2,
        "optim.warmup_steps": 2,
        "save.every_steps": 4,
        "eval.every_steps": 6,
        "log.every_steps": 1,
        "log.report": False,
    }
    settings.update({k.replace("__", "."): v for k, v in changes.items()})
    return [f"--{k}={v}" for k, v in settings.items() if v is not None]


@functools.cache
def shared_rank_server() -> Any:
    """The tests/harness/rank_server.py of this process: starting one costs as much as importing torch and Lightning."""
    from rank_server import RankServer  # which imports this module

    server = RankServer(Path(tempfile.mkdtemp(prefix="llammlein-ranks-")))
    atexit.register(server.close)
    return server


@functools.cache
def warm_python() -> str:
    """A command that runs scripts like python, without the seconds of import time: warm_python.py."""
    folder = Path(tempfile.mkdtemp(prefix="llammlein-python-"))
    shared_rank_server().serve_python(folder / "socket")
    command = folder / "python"
    client = [sys.executable, "-I", "-S", str(ROOT / "tests" / "harness" / "warm_python.py"), str(folder / "socket")]
    command.write_text(f'#!/bin/sh\nexec {shlex.join(client)} "$@"\n')
    command.chmod(0o755)
    return str(command)


def train(
    *arguments: str, env: dict[str, str] | None = None, check: bool = True, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Train in --devices ranks, forked with everything imported; `command` runs the trainer as a user would.

    tests/chaos/test_train_kill.py shows that both do the same. Standard output and error are merged.
    """
    answer = shared_rank_server().run(*ranks_and_folder(arguments), arguments, env=env, timeout_s=timeout)
    status = next((status for status in answer.statuses if status), 0)
    assert not check or status == 0, answer.output
    return subprocess.CompletedProcess(arguments, status, answer.output, answer.output)


def train_in_process(arguments: Sequence[str]) -> None:
    """Train on one device in this process, by the flags of fabric_train.py."""
    run = set_up(parse(list(arguments)))
    try:
        fit(run)
    finally:
        run.close()


def train_killed(step: int, *arguments: str) -> None:
    """Like `train`, but SIGKILL all ranks when rank 0 starts its `step`-th step."""
    moment = {"rank": 0, "phase": "step", "entry": step, "delay_s": 0.0, "everyone": True}
    answer = shared_rank_server().run(*ranks_and_folder(arguments), arguments, watch=True, moment=moment)
    assert answer.killed and set(answer.statuses) == {-signal.SIGKILL}, answer.output


# A run that goes back: samples of step 11 spoil the weights, which shows in the losses of the following steps.
ROLLBACK = {
    "train__max_steps": 24, "save__every_steps": 5, "guard__spike_action": "rollback", "guard__spike_window": 12,
    "guard__spike_rows": 2, "optim__lr": 1e-3,
}  # fmt: skip
SPIKE = {"kind": "spike", "samples": [8 * 11, 8 * 11 + 1], "factor": 30.0}


def train_rolled_back(data: Path, run: Path, strategy: str = "fsdp") -> str:
    """Train on two ranks with a rollback to step 10. Returns the output."""
    arguments = flags(data, run, **ROLLBACK, devices=2, strategy=strategy)
    answer = shared_rank_server().run(2, run, arguments, plants=[SPIKE])
    assert answer.statuses == [0, 0] and "rolling back to iter-00000010-ckpt.pth" in answer.output, answer.output
    return str(answer.output)


def ranks_and_folder(arguments: Sequence[str]) -> tuple[int, Path]:
    """The values of --devices and --out_dir."""
    devices = next((int(a.partition("=")[2]) for a in arguments if a.startswith("--devices=")), 1)
    run = next((a.partition("=")[2] for a in arguments if a.startswith("--out_dir=")), ".")
    return devices, Path(run)


def command(
    *arguments: str, env: dict[str, str] | None = None, check: bool = True, timeout: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run `python pretrain/fabric_train.py` as a user would."""
    line = [sys.executable, str(ROOT / "pretrain" / "fabric_train.py"), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=timeout)
    if check:
        assert done.returncode == 0, done.stdout + done.stderr
    return done


def kill_once(happened: Callable[[], bool], script: str, *arguments: object) -> None:
    """Start a script as a user would, and SIGKILL it and its children once `happened` returns True."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    try:
        while not happened():
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def same_checkpoints(a: Path, b: Path) -> None:
    """Assert that all tensors of both, including the optimizer's, are bitwise equal."""
    one, two = Checkpoint(a), Checkpoint(b)
    assert sorted(one.names()) == sorted(two.names())
    for name in one.names():
        assert torch.equal(one.tensor(name), two.tensor(name)), name


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with open(run / "metrics.csv", newline="") as f:
        return list(csv.DictReader(f))


def script_error(name: str, *arguments: object) -> str:
    """Run a script that must refuse its input. Returns the error, its only output: one line on standard error."""
    done = script(name, *arguments)
    assert (done.returncode, done.stdout) == (2, ""), (done.returncode, done.stdout, done.stderr)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


def script(name: str, *arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a script by path in this process, restoring the environment and the SIGTERM handler afterwards."""
    out, errors, path = io.StringIO(), io.StringIO(), str(ROOT / "scripts" / name)
    argv, handler = [path, *map(str, arguments)], signal.getsignal(signal.SIGTERM)
    with (
        chdir(cwd or Path.cwd()),
        patch.dict(os.environ),
        patch.object(sys, "argv", argv),
        patch.object(sys, "path", list(sys.path)),
        redirect_stdout(out),
        redirect_stderr(errors),
        pytest.raises(SystemExit) as left,
    ):
        try:
            runpy.run_path(path, run_name="__main__")
        finally:
            signal.signal(signal.SIGTERM, handler)
    assert isinstance(left.value.code, int)
    return subprocess.CompletedProcess(argv, left.value.code, out.getvalue(), errors.getvalue())
