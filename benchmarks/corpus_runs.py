"""For benchmarks that train on a text: runs the project's commands, one thread each, and reads a run's results."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def call(script: str, *arguments: object) -> None:
    """Run a script of the project. Raises SystemExit with the end of its output if it fails."""
    done = subprocess.run(
        [sys.executable, script, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(
            f"{script} {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stdout[-3000:]}"
        )


def prepare(text: Path, folder: Path, vocab_size: int, *split: object) -> Path:
    """Train a BPE tokenizer on a text and pack it with the given flags of `scripts/prepare_data.py`. Returns the
    dataset.
    """
    call("scripts/train_tokenizer.py", "--input", text, "--output", folder / "tok", "--vocab_size", vocab_size)
    where = ("--input", text, "--tokenizer", folder / "tok", "--output", folder / "data")
    call("scripts/prepare_data.py", *where, *split)
    return folder / "data"


def train(folder: Path, data: Path, settings: Mapping[str, object]) -> dict[str, list[float]]:
    """Train on one CPU thread. Returns validation losses, bits per byte and the steps they belong to."""
    fixed = {"data.train": data / "train", "data.val": data / "val", "accelerator": "cpu", "devices": 1}
    flags = {**settings, **fixed, "out_dir": folder}
    call("pretrain/fabric_train.py", *(part for key, value in flags.items() for part in (f"--{key}", value)))
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    return {key: [float(row[key]) for row in rows] for key in ("step", "val_loss", "val_bits_per_byte")}


def steps_to(loss: float, curve: Mapping[int, float]) -> float | None:
    """Steps until a validation loss has fallen to `loss`, interpolated; None if it never has. `curve`: {step: loss}.

    A curve that starts at or below `loss` gives its first step.
    """
    if curve and next(iter(curve.values())) <= loss:
        return next(iter(curve))
    for (step, before), (next_step, after) in pairwise(curve.items()):
        if after <= loss <= before:
            return step + (next_step - step) * (before - loss) / max(before - after, 1e-12)
    return None
