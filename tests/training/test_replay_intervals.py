"""Replays of random intervals of runs of every kind, by the command as a user starts it: all bit-equal."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from running import EOS, ROOT, VOCAB, flags, script, train, train_killed, train_rolled_back, write_dataset

from lit_data.packed.writer import PackedWriter
from lit_files.checkpoint_name import list_checkpoints

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

DDP = {"devices": 2, "strategy": "ddp"}
FSDP = {"devices": 2, "strategy": "fsdp"}
RUNS: dict[str, dict[str, object]] = {
    "one process": {},
    "two ranks, FSDP2": FSDP,
    "two ranks, FSDP2, sharded": {**FSDP, "save__state_dict_type": "sharded", "save__asynchronous": "true"},
    "two ranks, DDP": DDP,
    "four ranks, DDP": {**DDP, "devices": 4},
    "best_fit": {"data__packing": "best_fit"},
    "best_fit, two ranks, no document mask": {**FSDP, "data__packing": "best_fit", "data__document_mask": "false"},
    "pad, Muon": {"data__packing": "pad", "optim__name": "muon"},
    "an epoch, dropout": {"train__max_steps": None, "train__max_epochs": 1, "model__dropout": 0.1},
    "experts, bf16": {"model__n_expert": 4, "model__n_expert_per_token": 2, "precision": "bf16"},
}


def replay(start: Path, target: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "scripts" / "replay.py"), str(start), str(target), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=600)


def check(run: Path, seed: str) -> None:
    """A random interval of a run is bit-equal."""
    start, target = sorted(random.Random(seed).sample(list_checkpoints(run), 2))
    done = replay(start, target)
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert "spans equal the record" in done.stdout, done.stdout
    assert "parameters and optimizer state are equal" in done.stdout, done.stdout
    print(seed, done.stdout)


@pytest.mark.parametrize("name", RUNS)
def test_settings(name: str, data: Path, tmp_path: Path) -> None:
    train(*flags(data, tmp_path / "run", **{"train__max_steps": 16, "save__every_steps": 3, **RUNS[name]}))
    check(tmp_path / "run", name)


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_a_mixture_with_phases(packing: str, tmp_path: Path) -> None:
    write_dataset(tmp_path / "web", [13, 40, 7, 90, 21] * 30, seed=1)
    write_dataset(tmp_path / "books", [200, 33, 5] * 20, seed=2)
    mixture = f"[{{path: {tmp_path}/web, weight: 0.75}}, {{path: {tmp_path}/books, weight: 0.25}}]"
    phases = "[{from_step: 6, weights: [0.25, 0.75]}]"
    settings = {"data__train": None, "data__val": None, "data__mixture": mixture, "data__phases": phases}
    train(*flags(tmp_path, tmp_path / "run", **settings, data__packing=packing, save__every_steps=3))
    check(tmp_path / "run", f"mixture, {packing}")


@pytest.mark.parametrize("cached", [False, True])
def test_distillation(cached: bool, data: Path, tmp_path: Path) -> None:
    train(*flags(data, tmp_path / "teacher", train__max_steps=4, seed=5))
    taught: dict[str, object] = {"objective": "distillation", "distillation__alpha_end": 0.8}
    if cached:
        cache = tmp_path / "cache"
        of = ["--teachers", tmp_path / "teacher", "--data", data / "train", "--block_size", 32, "--k", 8]
        assert script("cache_teacher.py", *of, "--output", cache).returncode == 0
        taught |= {"distillation__cache": cache, "distillation__divergence": "topk_kl"}
    else:
        taught |= {"distillation__teachers": f"[{{path: {tmp_path}/teacher, weight: 1.0}}]"}
    train(*flags(data, tmp_path / "run", **taught, save__every_steps=3))
    check(tmp_path / "run", f"distillation, cached {cached}")


def test_after_a_rollback(data: Path, tmp_path: Path) -> None:
    """From before the steps that were rolled back to after them."""
    train_rolled_back(data, tmp_path / "run")
    checkpoints = list_checkpoints(tmp_path / "run")
    done = replay(checkpoints[0], checkpoints[-1])
    assert done.returncode == 0 and "optimizer state are equal" in done.stdout, (done.stdout, done.stderr)


def test_resumes(data: Path, tmp_path: Path) -> None:
    """Across a resume with the same settings; across one with other settings both sides, but not at once."""
    run = tmp_path / "run"
    train_killed(7, *flags(data, run))
    train(*flags(data, run, resume="latest", train__max_steps=12))
    changed = {"train__global_batch_samples": 16, "resume_allow": "train.global_batch_samples,train.max_steps"}
    train(*flags(data, run, resume="latest", train__max_steps=20, **DDP, **changed))
    named = {int(path.name[5:13]): path for path in list_checkpoints(run)}
    for first, end in ((4, 12), (12, 20)):
        done = replay(named[first], named[end])
        assert done.returncode == 0 and "optimizer state are equal" in done.stdout, (done.stdout, done.stderr)
    done = replay(named[8], named[20])
    assert done.returncode == 2 and "after step 12, with other settings" in done.stderr, done.stderr
    done = replay(named[12], named[20], "--devices", "1")
    assert done.returncode == 0 and "world_size 2 in the run, 1 here" in done.stdout, (done.stdout, done.stderr)
    assert "rounding explains it" in done.stdout, done.stdout


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_topology_invariant_run_on_one_device(precision: str, data: Path, tmp_path: Path) -> None:
    """Trained on four ranks with FSDP, then on two with DDP; replayed on one, also across the resume."""
    run = tmp_path / "run"
    settings = {
        "train__topology_invariant": "true", "train__micro_batch_samples": 1, "model__dropout": 0.1,
        "model__n_expert": 4, "model__n_expert_per_token": 2, "save__every_steps": 3, "precision": precision,
    }  # fmt: skip
    train_killed(8, *flags(data, run, **settings, **FSDP | {"devices": 4}))
    train(*flags(data, run, **settings, **DDP, resume="latest"))
    named = {int(path.name[5:13]): path for path in list_checkpoints(run)}
    for first, end in ((3, 6), (3, 12)):
        done = replay(named[first], named[end], "--devices", "1")
        assert done.returncode == 0 and "optimizer state are equal" in done.stdout, (done.stdout, done.stderr)
        assert "environment" not in done.stdout


def test_a_published_release(data: Path, tmp_path: Path) -> None:
    """Of a run with relative paths, replayed by what was published and the data elsewhere."""
    train(*flags(data, tmp_path / "run", **FSDP, save__every_steps=3))
    assert script("publish.py", tmp_path / "run", "--to", tmp_path / "release").returncode == 0
    moved = (data / "train").rename(tmp_path / "moved")
    try:
        done = replay(tmp_path / "release" / "step3", tmp_path / "release" / "step9", "--data", str(moved))
    finally:
        moved.rename(data / "train")
    assert done.returncode == 0 and "optimizer state are equal" in done.stdout, (done.stdout, done.stderr)


def test_influence_with_two_ranks(data: Path, tmp_path: Path) -> None:
    """Ignoring nothing is exactly zero, and a document's first exposure has the loss that it had."""
    train(*flags(data, tmp_path / "run", **FSDP, save__every_steps=3))
    line = [sys.executable, str(ROOT / "scripts" / "trace_data.py"), "influence", str(tmp_path / "run")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    chosen = ["--document", "doc-7", "--random", "1", "--json"]
    done = subprocess.run([*line, *chosen], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    nothing, own, control = (json.loads(text) for text in done.stdout.splitlines())
    assert (nothing["mean_absolute"], nothing["largest"]) == (0, 0) and nothing["spans"] > 0
    assert own["own"][0]["loss"] == own["own"][0]["without"] and control["mean_absolute"] > 0


CANARIES = (1, 4, 16, 64)


@pytest.mark.timeout(3600)
def test_canaries(tmp_path: Path) -> None:
    """Random texts planted 1, 4, 16 and 64 times: the more copies, the more their loss rises without them."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(20, 60, size=400).tolist()
    texts = [(f"text-{i}", 2 + np.cumsum(rng.integers(1, 4, size=n)) % (VOCAB - 2)) for i, n in enumerate(lengths)]
    for copies in CANARIES:
        canary = 2 + rng.integers(0, VOCAB - 2, size=24)
        texts += [(f"canary-{copies}", canary)] * copies
    order = rng.permutation(len(texts))
    facts = {"kind": "none", "fingerprint": "test", "vocab_size": VOCAB, "eos_id": EOS, "bos_id": None, "folder": None}
    with PackedWriter(tmp_path / "train", tokenizer=facts, vocab_size=VOCAB, eos_id=EOS, shard_tokens=10**6) as writer:
        for place, i in enumerate(order.tolist()):
            name, ids = texts[i]
            writer.add(np.append(ids, EOS), id=name, source="canaries", place=place, n_bytes=3 * len(ids), n_words=None)
    model = {"model__n_layer": 4, "model__n_embd": 160, "model__intermediate_size": 448}
    train(
        *flags(
            tmp_path, tmp_path / "run", **model, data__val=None, train__max_steps=None, train__max_epochs=4,
            train__block_size=64, train__micro_batch_samples=8, train__global_batch_samples=8, optim__lr=1e-3,
            save__every_steps=20,
        ),
        timeout=1800,
    )  # fmt: skip
    effects = []
    for copies in CANARIES:
        began = time.monotonic()
        chosen = ("--document", f"canary-{copies}", "--random", 0, "--json")
        done = script("trace_data.py", "influence", tmp_path / "run", *chosen)
        nothing, own = (json.loads(text) for text in done.stdout.splitlines())
        assert nothing["mean_absolute"] == 0
        last = own["own"][-1]["without"] - own["own"][-1]["loss"]
        print(f"{copies} copies: {own['own_mean']:+.4f}, last {last:+.4f}, others {own['mean']:+.5f} nats per token; "
              f"{time.monotonic() - began:.0f} s")  # fmt: skip
        effects.append(own["own_mean"])
    assert 0 < effects[0] < effects[1] < effects[2] < effects[3], effects
