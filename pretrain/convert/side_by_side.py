"""What the exports to other formats share: a Hugging Face folder to start from, and speeds measured side by side."""

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

from lit_files.publish import scratch_folder
from lit_model.load import is_hf_folder, resolve
from pretrain.convert.export import export_to_hf

ROUNDS = 5
PROMPT_TOKENS, DECODED_TOKENS = 240, 16
"""Tokens of the timed row, cut to the context."""
WEIGHTS = (".safetensors", ".bin", ".index.json", ".pth", ".pt", ".gguf", ".onnx", ".data", ".h5", ".msgpack")


@dataclass(frozen=True)
class Speed:
    """Tokens per second of two programs that took turns: medians over the rounds; the machine's load affects both."""

    ours: float
    other: float

    @property
    def ratio(self) -> float:
        """Of the other to ours; above 1 the other is faster."""
        return self.other / self.ours

    def __str__(self) -> str:
        return f"{self.other:,.0f} tokens/s, {self.ratio:.2f} times the {self.ours:,.0f} of"


Forward = Callable[[Tensor, Any], Any]
"""Tokens int64 (1, T), and what the call on the tokens before them returned or None -> what the next call needs."""


class Speeds(NamedTuple):
    """Of one row: read in one call, and continued token by token with the cache (None: there is no cache)."""

    prefill: Speed
    decode: Speed | None


@torch.no_grad()
def compare_speed(ours: Forward, other: Forward, block_size: int, *, cache: bool = True) -> Speeds:
    """Both read the same row and continue it, in turn; the first round is not counted."""
    new = min(DECODED_TOKENS, block_size - 1) if cache else 0
    prompt = torch.zeros(1, min(PROMPT_TOKENS, block_size - new), dtype=torch.long)
    read: tuple[list[float], list[float]] = ([], [])
    written: tuple[list[float], list[float]] = ([], [])
    for i in range(ROUNDS + 1):
        for j, forward in enumerate((ours, other)):
            began = time.perf_counter()
            state = forward(prompt, None)
            middle = time.perf_counter()
            for _ in range(new):
                state = forward(prompt[:, :1], state)
            if i:
                read[j].append(prompt.shape[1] / (middle - began))
                written[j].append(new / (time.perf_counter() - middle))
    return Speeds(*(Speed(*map(statistics.median, of)) if of[0][0] else None for of in (read, written)))  # type: ignore[arg-type]


@contextlib.contextmanager
def as_hf_folder(source: Path, tokenizer: Path | None, output: Path) -> Iterator[Path]:
    """A checkpoint, a run folder's newest or a Hugging Face folder as a Hugging Face folder: itself, or a temporary one
    beside `output`. Raises as `export_to_hf`."""
    path = resolve(source)
    if is_hf_folder(path):
        if tokenizer is not None:
            raise ValueError(f"--tokenizer {tokenizer}: {path} is a Hugging Face folder; put its tokenizer into it")
        yield path
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with scratch_folder(output) as folder:
        export_to_hf(path, folder / "hf", tokenizer)
        yield folder / "hf"


def copy_all_but_weights(folder: Path, output: Path) -> None:
    """Copy config, tokenizer and model card of a Hugging Face folder into another."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, output / file.name)
        elif file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, output / file.name)


def weights_bytes(folder: Path) -> int:
    """Size of a folder's files of weights."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.name.endswith(WEIGHTS))
