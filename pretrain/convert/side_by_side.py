"""Shared by the exports to ONNX and quantized formats: a Hugging Face folder as input, and side-by-side speed
measurements."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lit_data.tokenizers.files import tokenizer_files
from lit_files.progress import track
from lit_files.publish import scratch_folder
from lit_model.hf.io import open_tensors
from lit_model.load import is_hf_folder, resolve
from pretrain.convert.export import export_to_hf

ROUNDS = 5
PROMPT_TOKENS, DECODED_TOKENS = 240, 16
"""Length of the prompt and of the continuation in a speed measurement, limited by the context."""


@dataclass(frozen=True)
class Speed:
    """Tokens per second of two programs, measured in alternation so that other load on the machine affects both alike.
    Medians over the rounds."""

    reference: float
    other: float

    @property
    def ratio(self) -> float:
        """Speed of the other relative to the reference; above 1 the other is faster."""
        return self.other / self.reference

    def describe(self, other: str, reference: str) -> str:
        """`other` and `reference` are the names of the programs."""
        return f"{other} {self.other:,.0f} tokens/s, {self.ratio:.2f} times the {self.reference:,.0f} of {reference}"


Forward = Callable[[Tensor, Any], Any]
"""(tokens int64 (1, T), state returned by the previous call or None) -> state for the next call."""


class Speeds(NamedTuple):
    """Speed on one row: of processing a prompt, and of decoding token by token with the cache (None: no cache)."""

    prefill: Speed
    decode: Speed | None


@torch.no_grad()
def compare_speed(reference: Forward, other: Forward, block_size: int, *, cache: bool = True) -> Speeds:
    """Both process the same prompt and continue it, in turn; the first round is not counted."""
    new = min(DECODED_TOKENS, block_size - 1) if cache else 0
    prompt = torch.zeros(1, min(PROMPT_TOKENS, block_size - new), dtype=torch.long)
    prefill: tuple[list[float], list[float]] = ([], [])
    decode: tuple[list[float], list[float]] = ([], [])
    for i in track(range(ROUNDS + 1), "measuring speed", "rounds"):
        for j, forward in enumerate((reference, other)):
            began = time.perf_counter()
            state = forward(prompt, None)
            middle = time.perf_counter()
            for _ in range(new):
                state = forward(prompt[:, :1], state)
            if i:
                prefill[j].append(prompt.shape[1] / (middle - began))
                decode[j].append(new / (time.perf_counter() - middle))
    reading = Speed(*map(statistics.median, prefill))
    return Speeds(reading, Speed(*map(statistics.median, decode)) if new else None)


@contextlib.contextmanager
def as_hf_folder(source: Path, tokenizer: Path | None, output: Path) -> Iterator[Path]:
    """Yield a Hugging Face folder for a run folder (its newest checkpoint), a checkpoint or a Hugging Face folder: the
    latter itself, else a temporary export beside `output`. Raises as `export_to_hf`."""
    path = resolve(source)
    if is_hf_folder(path):
        if tokenizer is not None:
            raise ValueError(f"--tokenizer {tokenizer}: {path} is a Hugging Face folder and brings its own")
        yield path
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output) as folder:
        export_to_hf(path, folder / "hf", tokenizer)
        yield folder / "hf"


def copy_config_and_tokenizer(folder: Path, output: Path) -> None:
    """Copy config, generation config, tokenizer and model card of a Hugging Face folder into another."""
    names = ("config.json", "generation_config.json", "README.md")
    for file in {*(folder / name for name in names), *tokenizer_files(folder)}:
        if file.is_file():
            target = output / file.relative_to(folder)
            target.parent.mkdir(exist_ok=True)
            shutil.copyfile(file, target)


def weights_bytes(folder: Path) -> int:
    """Bytes of the tensors that transformers reads from a Hugging Face folder."""
    return sum(tensor.nbytes for tensor in open_tensors(folder).values())
