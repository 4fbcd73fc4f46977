"""An optimizer step never waits for the device or the disk.

On the meta device every read of a value on the host raises, so one step there shows that none is on the path. Where the
code depends on CUDA (attention, grouped experts), the test chooses what runs there.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import flags, train

from lit_data.packed.reader import PackedDataset
from lit_model.kernels.choose import AttentionChoice
from lit_model.moe import Experts
from pretrain.build import build_optimizer, set_up
from pretrain.cli.run_parser import parse
from pretrain.distillation.teacher_cache import CachedTeacher, CacheFacts, begin_cache
from pretrain.distillation.teachers import Teachers
from pretrain.loop import train_step
from pretrain.optim import LossScale
from pretrain.run import Run

EXPERTS = {"model__n_expert": 4, "model__n_expert_per_token": 2, "model__moe_intermediate_size": 16}
TAUGHT = {"objective": "distillation", "distillation__divergence": "topk_kl"}
SETTINGS: dict[str, dict[str, object]] = {
    "documents": {},
    "whole rows": {"data__document_mask": "false"},
    "dropout and recomputation": {"model__dropout": 0.1, "train__activation_checkpointing": "full"},
    "experts": EXPERTS,
    "muon": {"optim__name": "muon"},
    "fp8": {"precision": "fp8"},
    "teachers": {**TAUGHT, "distillation__top_k": 8},
    "cached teachers": TAUGHT,
}
SLOW = ("documents", "muon", "fp8", "whole rows", "dropout and recomputation")


def write_cache(folder: Path, data: Path) -> Path:
    """Predictions that depend on the row and the position; the dataset has rows of 32 tokens."""
    dataset = PackedDataset(data / "train")
    n_windows = -(-dataset.n_tokens // 32)
    facts = CacheFacts(
        dataset.fingerprint, "concat", 32, True, n_windows, 96, [], "logits", 2.0, "fp32", 8, "float16", 50
    )
    begin_cache(folder, facts)
    for file in range(facts.n_files):
        rows, positions, k = np.meshgrid(facts.rows_of(file), np.arange(32), np.arange(8), indexing="ij")
        np.save(facts.path(folder, "ids", file), ((rows + positions + k) % 96).astype(facts.dtype_of("ids")))
        log_probs = -2.5 - (rows + positions + k) % 7 / 8
        np.save(facts.path(folder, "log_probs", file), log_probs.astype(facts.dtype_of("log_probs")))
    return folder


def with_teachers(changes: dict[str, object], name: str, data: Path, folder: Path) -> dict[str, object]:
    if name == "cached teachers":
        return changes | {"distillation__cache": write_cache(folder / "cache", data)}
    if name == "teachers":
        train(*flags(data, folder / "teacher", train__max_steps=2))
        return changes | {"distillation__teachers": f"[{{path: {folder / 'teacher'}}}]"}
    return changes


@contextlib.contextmanager
def on_meta(run: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Move the run's state to the meta device, and let it compute there as on CUDA."""
    meta = torch.device("meta")
    autocast, enabled = torch.autocast, torch.is_autocast_enabled
    kernel = "varlen" if run.args.data.document_mask else "sdpa"
    with monkeypatch.context() as patch:
        patch.setattr(
            torch, "autocast", lambda d, *a, **k: contextlib.nullcontext() if d == "meta" else autocast(d, *a, **k)
        )
        patch.setattr(torch, "is_autocast_enabled", lambda *d: "meta" not in d and enabled(*d))
        patch.setattr("lit_model.model.choose_attention", lambda *_, **__: AttentionChoice(kernel, "as on CUDA"))
        patch.setattr(Experts, "looped", Experts.grouped)
        patch.setattr(Run, "device", meta)
        run.raw_model.to(meta, torch.bfloat16)
        run.optimizer = build_optimizer(run.args.optim, run.raw_model)
        for name in ("tokens", "skipped", "skipped_in_row"):
            setattr(run, name, getattr(run, name).to(meta))
        run.stop.device = meta
        run.loss_scale = LossScale.create(meta)
        if isinstance(run.teachers, Teachers):
            run.teachers.device = run.teachers.student_device = meta
            for model in run.teachers.models:
                model.to(meta, torch.bfloat16)
        if isinstance(run.teachers, CachedTeacher):
            run.teachers.device = meta
        yield


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in SETTINGS])
def test_a_step_reads_nothing_on_the_host(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes = with_teachers(SETTINGS[name], name, data, tmp_path)
    run = set_up(parse(flags(data, tmp_path / "run", **changes)))
    try:
        read = run.loader.read_step(0)
        with on_meta(run, monkeypatch):
            result = train_step(run, read)
            assert result.loss_sum.is_meta and result.grad_norm.is_meta
            with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
                result.loss_sum.item()  # the check itself: it fails where a value is read
    finally:
        run.close()


def test_the_loader_thread_reads_cached_teachers(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For each row the predictions of its window, also for rows without data, which have none."""
    cache = write_cache(tmp_path / "cache", data)
    of = {**TAUGHT, "distillation__cache": cache, "train__max_steps": None, "train__max_epochs": 0.3}
    threads: set[str] = set()
    read = CachedTeacher.read

    def noted(self: CachedTeacher, batch: Any) -> Any:
        threads.add(threading.current_thread().name)
        return read(self, batch)

    monkeypatch.setattr(CachedTeacher, "read", noted)
    run = set_up(parse(flags(data, tmp_path / "run", **of)))
    files = [[np.load(path) for path in sorted(cache.glob(f"{name}-*.npy"))] for name in ("ids", "log_probs")]
    stored = [np.concatenate(arrays) for arrays in files]
    assert isinstance(run.teachers, CachedTeacher)
    empty = 0
    try:
        for step in run.loader.steps(0, run.data.max_steps):
            for batch in step.micro_batches:
                found = run.teachers(batch)
                for row, window in enumerate(batch.spans.window.tolist()):
                    empty += window < 0
                    wanted = [torch.from_numpy(a[window].astype(float)) if window >= 0 else 0.0 for a in stored]
                    assert bool((found.ids[row] == wanted[0]).all() and (found.log_probs[row] == wanted[1]).all())
    finally:
        run.close()
    assert empty > 0 and threads == {"llammlein-loader"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_does_not_wait_for_the_gpu(data: Path, tmp_path: Path, name: str, precision: str) -> None:
    if name == "experts" and (precision == "fp16" or torch.cuda.get_device_capability()[0] < 9):
        pytest.skip("experts read their sizes on the host, except in bf16 on Hopper and newer")
    if name == "fp8" and (precision == "fp16" or torch.cuda.get_device_capability() < (8, 9)):
        pytest.skip("runs once, on a GPU with float8")
    changes = with_teachers(SETTINGS[name], name, data, tmp_path)
    if name == "fp8":
        changes = {**changes, "compile": "true"}
    arguments = flags(data, tmp_path / "run", **{"accelerator": "cuda", "precision": precision, **changes})
    run = set_up(parse(arguments))
    try:
        steps = run.loader.steps(0, 4)
        for _ in range(2):  # compile kernels, fill tables
            train_step(run, next(steps))
            run.step += 1
        later = list(steps)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for read in later:
                result = train_step(run, read)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert bool(torch.isfinite(result.loss_sum)) and run.skipped == 0
    finally:
        run.close()
