"""Runs with --precision fp8, on a CPU, which computes float8 products too."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from running import flags, metrics, train

from lit_model.load import Checkpoint, load_model
from pretrain.cli.run_parser import parse
from pretrain.parallel import choose_placement, float8_fault

FLOAT8 = {"precision": "fp8", "model__n_layer": 3}


def losses(run: Path) -> list[float]:
    return [float(row["train_loss"]) for row in metrics(run) if row["train_loss"]]


@pytest.mark.slow
def test_losses_resume_and_export(data: Path, tmp_path: Path) -> None:
    """20 steps learn as in bf16; a resume is bit-equal; checkpoints hold float32 under the usual names."""
    steps = {"train__max_steps": 20, "save__every_steps": 10, "eval__every_steps": 20, "precision": "fp8"}
    train(*flags(data, tmp_path / "bf16", **steps | {"precision": "bf16"}))
    done = train(*flags(data, tmp_path / "fp8", **steps))
    assert "float8   10 of 10 linear layers; on a CPU only to try it out" in done.stdout
    shutil.copytree(tmp_path / "fp8", tmp_path / "resumed")
    train(*flags(data, tmp_path / "resumed", **steps, resume="iter-00000010-ckpt.pth"))
    fp8, bf16 = losses(tmp_path / "fp8"), losses(tmp_path / "bf16")
    assert fp8 != bf16 and max(abs(a - b) for a, b in zip(fp8, bf16, strict=True)) < 0.05 * bf16[0]
    ends = [Checkpoint(tmp_path / name / "iter-00000020-ckpt.pth") for name in ("fp8", "resumed", "bf16")]
    assert ends[0].names() == ends[2].names()
    for name in ends[0].names():
        assert ends[0].tensor(name).dtype == torch.float32
        assert torch.equal(ends[0].tensor(name), ends[1].tensor(name)), name
    model, _ = load_model(tmp_path / "fp8")
    assert all(type(module).__name__ != "Float8Linear" for module in model.modules())


@pytest.mark.parametrize("strategy", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_ranks(data: Path, tmp_path: Path, strategy: str) -> None:
    """DDP and FSDP2, the first and last block in bf16: losses and gradient norms of one process, up to rounding."""
    settings = {**FLOAT8, "train__fp8_keep_ends": "true", "train__max_steps": 6}
    train(*flags(data, tmp_path / "one", **settings))
    done = train(*flags(data, tmp_path / "two", **settings, devices=2, strategy=strategy))
    assert "float8   5 of 15 linear layers" in done.stdout
    one, two = ([row for row in metrics(tmp_path / name) if row["train_loss"]] for name in ("one", "two"))
    # AdamW's losses alone would hide a wrong scale of the gradients. Each rank rounds its rows to float8, by a scale
    # of their own: up to 7% of a norm.
    for column, bound in (("train_loss", 2e-2), ("grad_norm", 0.15)):
        assert [float(row[column]) for row in one] == pytest.approx([float(row[column]) for row in two], rel=bound)


def test_refusals(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What fp8 can't do is refused by name."""
    for changes, message in (
        ({"train__fp8_keep_ends": "true", "precision": "bf16"}, "--train.fp8_keep_ends true is for --precision fp8"),
        ({"train__block_size": 24, "train__micro_batch_samples": 1}, "1 rows of 24 tokens is not a multiple of 16"),
        ({"model__n_layer": 2, "train__fp8_keep_ends": "true"}, "no linear layer between the first and the last block"),
    ):
        done = train(*flags(data, tmp_path / "run", **FLOAT8 | changes), check=False)
        assert done.returncode != 0 and message in done.stdout.replace("\n", " "), done.stdout
    args = parse(flags(data, tmp_path / "run", **FLOAT8, accelerator="cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="--precision fp8 without --compile true is several times slower"):
        choose_placement(args)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    for capability, fault in (((8, 0), True), ((8, 9), False), ((9, 0), False), ((10, 0), False)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert (float8_fault("fp8", torch.device("cuda", 0)) is not None) == fault
        assert float8_fault("bf16", torch.device("cuda", 0)) is None
