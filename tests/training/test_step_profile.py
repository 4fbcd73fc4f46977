"""Profiles: every instant counted once, by the right kind, on a CPU and from a trace of a GPU; and no other numbers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from running import flags, same_checkpoints, train_in_process

from pretrain.build import set_up
from pretrain.cli.run_parser import parse
from pretrain.step_profile import break_down


def test_kinds_add_up_and_nothing_else_changes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profiled, plain = tmp_path / "profiled", tmp_path / "plain"
    of = {
        "train__max_steps": 8,
        "save__every_steps": 2,
        "train__global_batch_samples": 2,
    }  # one micro-batch: short traces
    train_in_process(flags(data, profiled, **of, profile__steps=2, profile__start=1))
    output = capsys.readouterr().out
    train_in_process(flags(data, plain, **of))
    same_checkpoints(profiled / "iter-00000008-ckpt.pth", plain / "iter-00000008-ckpt.pth")
    folder = profiled / "profile"
    assert {p.name for p in folder.iterdir()} == {f"steps-00000003{end}" for end in (".json", ".md", ".trace.json.gz")}
    assert (folder / "steps-00000003.md").read_text() in output
    found = json.loads((folder / "steps-00000003.json").read_text())
    with gzip.open(folder / "steps-00000003.trace.json.gz") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    steps = [e for e in events if e["name"].startswith("ProfilerStep#")]
    assert len(steps) == found["steps"] == 2
    whole = (max(e["ts"] + e["dur"] for e in steps) - min(e["ts"] for e in steps)) / 2e3
    kinds = found["milliseconds"]
    assert sum(kinds.values()) == pytest.approx(whole, rel=1e-9) and found["total_ms"] == pytest.approx(whole, rel=1e-9)
    assert {"matmul", "attention", "loss", "norm", "optimizer", "copies and casts", "idle"} <= set(kinds)
    assert all(ms > 0 for ms in kinds.values())
    products = sum(e["dur"] for e in events if e["name"] in ("aten::mm", "aten::addmm", "aten::addmm_")) / 2e3
    assert kinds["matmul"] == pytest.approx(products, rel=0.05)  # they call a few cheap operators

    train_in_process(flags(data, profiled, **of, profile__steps=2, profile__start=1, resume="iter-00000002-ckpt.pth"))
    assert "Steps 5 to 6 on cpu" in capsys.readouterr().out
    same_checkpoints(profiled / "iter-00000008-ckpt.pth", plain / "iter-00000008-ckpt.pth")
    with pytest.raises(ValueError, match=r"--profile\.steps 2 after --profile\.start 6 needs 9 steps"):
        set_up(parse(flags(data, tmp_path / "short", **of, profile__steps=2, profile__start=6)))


def event(cat: str, name: str, start: float, end: float, tid: int = 1, number: int = -1) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": cat,
        "name": name,
        "ts": start,
        "dur": end - start,
        "tid": tid,
        "args": {"External id": number},
    }


def test_kernels_belong_to_the_work_that_launched_them() -> None:
    """A trace as CUDA gives it: two streams, kernels behind the operators, the backward in another thread."""
    operators = [
        event("user_annotation", "ProfilerStep#2", 0, 1000),
        event("cpu_op", "aten::mm", 10, 20, number=1),
        event("user_annotation", "llammlein::loss", 20, 60),
        event("cpu_op", "aten::mm", 25, 30, number=2),
        event("cpu_op", "aten::exp_", 30, 35, number=3),
        event("cpu_op", "aten::copy_", 35, 40, number=4),
        event("user_annotation", "llammlein::optimizer", 70, 90),
        event("cpu_op", "aten::mm", 71, 75, number=5),
        event("cpu_op", "autograd::engine::evaluate_function: _EagerRMSNormBackward", 40, 60, tid=2),
        event("cpu_op", "aten::mul", 45, 50, tid=2, number=6),
    ]
    kernels = [
        ("kernel", "nvjet_hsh_128x256", 100, 300, 1),
        ("kernel", "nvjet_hsh_128x256", 300, 400, 2),
        ("kernel", "exp_kernel", 400, 450, 3),
        ("gpu_memcpy", "Memcpy DtoD", 450, 460, 4),
        ("kernel", "sm90_xmma_gemm", 500, 550, 5),
        ("kernel", "vectorized_elementwise_kernel", 550, 580, 6),
        ("kernel", "triton_red_fused_mean_mul_rsqrt_3", 580, 600, -2),
        ("kernel", "triton_poi_fused_mul_silu_1", 600, 620, -2),
        ("kernel", "triton_poi_fused__to_copy_0", 620, 630, -2),
        ("kernel", "kernel_cutlass_flash_attncute_FlashAttentionForwardSm90", 630, 700, -2),
        ("kernel", "ncclDevKernel_AllReduce", 600, 800, -2),
    ]
    trace = {"traceEvents": operators + [event(cat, name, a, b, 7, n) for cat, name, a, b, n in kernels]}
    found = break_down(trace, "cuda", 3)
    want = {
        "matmul": 0.3,
        "loss": 0.06,
        "optimizer": 0.05,
        "norm": 0.05,
        "elementwise": 0.02,
        "copies and casts": 0.01,
        "attention": 0.07,
        "communication": 0.1,
        "idle": 0.34,
    }
    assert found.milliseconds == pytest.approx(want) and found.total_ms == pytest.approx(1.0)
    assert found.hidden_ms == pytest.approx(0.1) and found.calls["matmul"] == 2
    assert found.largest["matmul"] == [("nvjet_hsh_128x256", pytest.approx(0.3))]
    assert "| idle | 0.34 | 34.0% | 0 |  |" in found.table().splitlines()
