"""scripts/plan_run.py: figures against the trainer's own estimates and the measured table, warnings, and refusals."""

from __future__ import annotations

import ast
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from running import ROOT, script, write_dataset

from lit_model.cost import training_memory
from pretrain.cli.run_parser import parse
from pretrain.memory_fit import training_setting
from pretrain.planning.advice import warnings
from pretrain.planning.command import plan_for
from pretrain.planning.devices import GPUS, MEASURED, Device, flops_per_second
from pretrain.planning.plan import Plan, least_devices, memory_limit, plan

BILLION = ["--model.name=LLaMmlein_1B", "--precision=bf16", "--compile=true", "--train.max_tokens=100000000000"]
BATCH = ["--train.global_batch_samples=96", "--train.micro_batch_samples=12", "--data.train=missing"]


def planned(*flags: str, gpu: str = "h100", device: Device | None = None, devices: int = 1) -> Plan:
    args = replace(parse([*BILLION, *BATCH, *flags]), devices=devices)
    return plan(args, gpu, device or GPUS[gpu], devices)


def test_speed_of_what_was_measured() -> None:
    """71,622 tokens/s (docs/performance.md), and the smaller model's MFU."""
    assert planned().speed.likely == pytest.approx(71_622, rel=0.02)
    text = (ROOT / "docs" / "performance.md").read_text()
    for _, mfu in MEASURED:
        assert f"{100 * mfu:.1f} %" in text
    small = planned("--model.name=LLaMmlein_120M")
    assert small.speed.likely == pytest.approx(467_052, rel=0.02)
    assert planned("--train.activation_checkpointing=full").speed.likely == pytest.approx(0.75 * 71_622, rel=0.02)


def test_ranges_contain_their_likely_value() -> None:
    for gpu, devices, precision, compiled in product(GPUS, (1, 8, 16), ("fp32", "bf16"), (True, False)):
        found = flops_per_second(
            *(gpu, GPUS[gpu], 10**9, precision),
            compiled=compiled,
            recompute=1.0,
            devices=devices,
            nodes=devices // 8,
        )
        assert found.low < found.likely <= found.high
    seconds = planned(devices=8).seconds
    assert seconds.low <= seconds.likely < seconds.high


def test_every_device_can_be_chosen() -> None:
    """The script names them itself, since it parses its arguments before it imports torch."""
    names = re.search(r"^NAMES = (\(.*\))$", (ROOT / "scripts" / "plan_run.py").read_text(), flags=re.MULTILINE)
    assert names is not None and set(ast.literal_eval(names[1])) == {*GPUS, "cpu"}


def test_length_and_compute() -> None:
    found = planned()
    assert found.steps == -(-100_000_000_000 // (96 * 2048)) and found.tokens == found.steps * 96 * 2048
    assert found.flops == pytest.approx(found.tokens * 7.31e9, rel=1e-2)
    assert found.checkpoint == 12 * found.parameters


def test_memory_is_the_trainers_estimate_and_the_largest_micro_batch_fits() -> None:
    found = planned(devices=8)
    names = [s.name for s in found.strategies]
    assert names == [
        name + end for name in ("DDP", "FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD") for end in ("", ", recomputing")
    ]
    args = replace(found.args, strategy="fsdp")
    setting = training_setting(args, found.config, "cuda", 8)
    assert found.strategies[2].memory.total == training_memory(found.config, setting).total
    full = found.strategies[2]
    assert full.name == "FULL_SHARD" and full.largest == 12  # all rows of a device
    ddp = planned("--train.global_batch_samples=512", devices=8).strategies[0]
    for rows, fits in ((ddp.largest, True), (2 * ddp.largest, False)):
        setting = training_setting(replace(found.args, strategy="ddp"), found.config, "cuda", 8)
        some = replace(setting, micro_batch_samples=rows, accumulates=rows < 64)
        assert (training_memory(found.config, some).total <= memory_limit(GPUS["h100"])) == fits
    none = planned("--model.name=LLaMmlein_7B", gpu="rtx4090")
    assert not any(s.fits or s.largest for s in none.strategies)
    n = least_devices(none)
    assert n is not None
    for devices, fits in ((n, True), (n // 2, False)):
        train = replace(none.args.train, micro_batch_samples=1, activation_checkpointing="full")
        args = replace(none.args, train=train, strategy="fsdp")
        total = training_memory(none.config, training_setting(args, none.config, "cuda", devices)).total
        assert (total <= memory_limit(none.device)) == fits


def test_data_that_is_there_gives_epochs_and_vocabulary(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", [50] * 40)
    device = Device("a CPU", "cpu", 1e11, 1e11, 8 << 30, None)
    sizes = ["n_layer=1", "n_head=4", "n_embd=32", "intermediate_size=16"]
    flags = [f"--model.{size}" for size in sizes] + [f"--data.train={data}", "--train.block_size=32"]
    args = parse([*flags, "--train.max_epochs=6", "--train.global_batch_samples=8"])
    found = plan(args, "cpu", device, 1)
    assert found.config.vocab_size == 96 and found.epochs == pytest.approx(6, rel=0.01)
    assert found.mean_document == 51
    texts = " ".join(warnings(found))
    for part in ("tokens per parameter", "6.0 passes over the data", "so few updates", "embedding and head are"):
        assert part in texts, part
    args = replace(args, data=replace(args.data, train=tmp_path / "none"))
    with pytest.raises(ValueError, match=r"--train\.max_epochs 6.*prepared dataset"):
        plan(args, "cpu", device, 1)


def test_warnings_of_a_published_recipe_and_of_bad_settings() -> None:
    lines = plan_for("h100", 8, ["--config", str(ROOT / "configs" / "llammlein_1B.yaml")])
    assert not [line for line in lines if line.startswith("warning")]
    texts = " ".join(warnings(planned("--optim.lr=0.01", "--optim.warmup_steps=400000", devices=7)))
    for part in ("--optim.lr 0.01 at a width of 2048", "--optim.warmup_steps 400000", "not a multiple of 7 devices"):
        assert part in texts, part


def test_what_the_trainer_would_refuse() -> None:
    flags = ["--train.max_steps=3", "--train.global_batch_samples=1", "--optim.warmup_steps=2000", "--data.train=x"]
    args = replace(parse([f"--config={ROOT}/configs/llammlein_120M.yaml", *flags]), devices=1)
    told = " ".join(warnings(plan(args, "h100", GPUS["h100"], 1)))
    assert "--optim.warmup_steps 2000 exceeds the run's 3 steps: the run would be refused" in told
    assert "3 steps of 2,048 tokens: so few updates" in told and "lower --train.global_batch_samples" not in told


def test_a_device_in_capitals() -> None:
    done = script("plan_run.py", "--gpu", "H100", "--config", ROOT / "configs" / "debug.yaml")
    assert done.returncode == 0 and "NVIDIA H100" in done.stdout, done.stderr


def test_the_text() -> None:
    text = "\n".join(plan_for("rtx4090", 1, ["--config", str(ROOT / "configs" / "llammlein_7B.yaml")]))
    assert re.search(r"model     6,738\.9M parameters; 32 layers of width 4096", text)
    assert "none, does not fit as given" in text and "fits on 8 of these devices" in text
    assert "GPU hours" in text and "kWh" in text and "about 1.5 GiB for CUDA" in text
    config = ["--config", str(ROOT / "configs" / "llammlein_1B.yaml")]
    text = "\n".join(plan_for("h100", 8, [*config, "--strategy=fsdp", "--train.cpu_offload=true"]))
    assert "DDP" not in text and "FULL_SHARD" in text


@pytest.mark.parametrize(
    ("gpus", "flags", "message"),
    [
        (12, [], "--gpus 12 must be"),
        (0, [], "--gpus 0 must be"),
        (1, ["--devices=4"], "--devices=4: a plan takes the number of devices from --gpus"),
    ],
)
def test_refusals(gpus: int, flags: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_for("h100", gpus, [*BILLION, *flags])
