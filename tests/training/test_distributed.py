"""One process, two DDP processes and two FSDP2 processes train the same: gradients, norms, losses, checkpoints."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import flags, metrics, train

from lit_data.packed import PackedDataset
from lit_data.packing import count_windows
from lit_model.load import load_tensors

STRATEGIES = {
    "one": {"devices": 1, "train__micro_batch_samples": 4},  # accumulation 2 in each
    "ddp": {"devices": 2, "strategy": "ddp", "train__micro_batch_samples": 2},
    "fsdp": {"devices": 2, "strategy": "fsdp", "train__micro_batch_samples": 2},
    "shard_grad_op": {
        "devices": 2,
        "strategy": "fsdp",
        "sharding_strategy": "SHARD_GRAD_OP",
        "train__micro_batch_samples": 2,
        "train__defer_gradient_sync": "true",
    },
}
STEPS = 300


def epochs(data: Path) -> float:
    """Passes that end three rows into step 299, so that its later micro-batches have no row at all."""
    return (8 * (STEPS - 1) + 3) / count_windows(PackedDataset(data / "train").n_tokens, 32)


@pytest.fixture(scope="module")
def runs(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("strategies")
    for name, changes in STRATEGIES.items():
        train(
            *flags(
                data,
                folder / name,
                train__max_steps=None,
                train__max_epochs=epochs(data),
                train__clip_norm=0.5,
                optim__lr=2e-3,
                eval__every_steps=100,
                save__every_steps=STEPS,
                **changes,
            )
        )
    return {name: folder / name for name in STRATEGIES}


@pytest.mark.parametrize("name", [n for n in STRATEGIES if n != "one"])
def test_300_losses_and_norms_agree(runs: dict[str, Path], name: str) -> None:
    one, other = metrics(runs["one"]), metrics(runs[name])
    assert [r["step"] for r in one] == [r["step"] for r in other] == [str(i) for i in range(STEPS + 1)]
    for column in ("train_loss", "grad_norm", "val_loss"):
        ours = torch.tensor([float(r[column]) for r in one if r[column]], dtype=torch.float64)
        theirs = torch.tensor([float(r[column]) for r in other if r[column]], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    norms = [float(r["grad_norm"]) for r in one if r["grad_norm"]]
    assert sum(n > 0.5 for n in norms) > STEPS // 3, (
        "clipping must be active in many steps for this test to mean anything"
    )


def gradients(data: Path, folder: Path, step: int, **changes: object) -> dict[str, object]:
    file = folder / "gradients.pt"
    command = [sys.executable, str(Path(__file__).with_name("gradient_worker.py"))]
    command += flags(
        data, folder / "run", train__max_steps=None, train__max_epochs=epochs(data), train__clip_norm=0, **changes
    )
    env = {**os.environ, "GRADIENT_FILE": str(file), "GRADIENT_STEP": str(step), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("step", [0, STEPS - 1])
def test_every_gradient_agrees(data: Path, tmp_path: Path, step: int) -> None:
    results = {}
    for name in ("one", "ddp", "fsdp"):
        (tmp_path / name).mkdir()
        results[name] = gradients(data, tmp_path / name, step, **STRATEGIES[name])
    one = results["one"]
    counts = results["ddp"]["counts"]
    assert len(counts) == 2 and all(len(c) == 2 for c in counts), "two ranks with accumulation 2"
    assert sum(counts[0]) != sum(counts[1]), "the ranks must have unequal numbers of targets"
    if step == STEPS - 1:
        assert 0 in counts[0] + counts[1], "a micro-batch without targets must be among them"
    for name in ("ddp", "fsdp"):
        other = results[name]
        assert other["counts"] == counts and other["n_targets"] == one["n_targets"]
        torch.testing.assert_close(other["norm"], one["norm"], rtol=1e-5, atol=0)
        for key, gradient in one["gradients"].items():
            scale = gradient.abs().max().item()
            torch.testing.assert_close(
                other["gradients"][key], gradient, rtol=1e-5, atol=1e-5 * scale, msg=f"{name} {key}"
            )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_sharded_and_full_checkpoints_hold_the_same(data: Path, tmp_path: Path, strategy: str) -> None:
    tensors = {}
    for kind in ("full", "sharded"):
        run = tmp_path / kind
        train(*flags(data, run, devices=2, strategy=strategy, train__max_steps=4, save__state_dict_type=kind))
        path = run / "iter-00000004-ckpt.pth"
        assert path.is_dir() == (kind == "sharded")
        tensors[kind] = load_tensors(path)[1]
        train_again = train(
            *flags(data, run, devices=1, resume="latest", train__max_steps=4, save__state_dict_type=kind)
        )
        assert "finished" in train_again.stdout
    assert set(tensors["full"]) == set(tensors["sharded"])
    for name in tensors["full"]:
        assert torch.equal(tensors["full"][name], tensors["sharded"][name]), name


def test_fsdp_checkpoint_goes_on_with_one_process(data: Path, tmp_path: Path) -> None:
    """Losses after a change of world size and strategy equal those without it, up to the order of sums."""
    train(*flags(data, tmp_path / "a"))
    changes = {"strategy": "fsdp", "devices": 2, "save__state_dict_type": "sharded"}
    stop_early = train(*flags(data, tmp_path / "b", **changes))
    assert "done" in stop_early.stdout
    for path in (tmp_path / "b").glob("iter-*"):
        if path.name != "iter-00000004-ckpt.pth":
            path.rename(path.with_name(f"moved-{path.name}"))
    train(*flags(data, tmp_path / "b", resume="latest"))
    for a, b in zip(metrics(tmp_path / "a"), metrics(tmp_path / "b"), strict=True):
        assert a["step"] == b["step"]
        if a["train_loss"]:
            assert float(a["train_loss"]) == pytest.approx(float(b["train_loss"]), rel=1e-5)
