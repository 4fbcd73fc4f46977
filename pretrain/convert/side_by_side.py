"""What the exports to other formats share: a Hugging Face folder to start from, and speeds measured side by side."""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lit_model.load import is_hf_folder, resolve
from pretrain.convert.export import export_to_hf

ROUNDS = 5
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


def compare_speed(ours: Callable[[], int], other: Callable[[], int], rounds: int = ROUNDS) -> Speed:
    """Call both in turn, once each before the clock starts. Each returns the number of tokens that it computed."""
    rates: tuple[list[float], list[float]] = ([], [])
    for i in range(rounds + 1):
        for one, found in zip((ours, other), rates, strict=True):
            began = time.perf_counter()
            tokens = one()
            if i:
                found.append(tokens / (time.perf_counter() - began))
    return Speed(statistics.median(rates[0]), statistics.median(rates[1]))


@contextlib.contextmanager
def as_hf_folder(source: Path, tokenizer: Path | None, near: Path) -> Iterator[Path]:
    """A checkpoint, a run folder's newest or a Hugging Face folder as a Hugging Face folder: itself, or a temporary one
    in the folder `near`. Raises as `export_to_hf`."""
    path = resolve(source)
    if is_hf_folder(path):
        if tokenizer is not None:
            raise ValueError(f"--tokenizer {tokenizer}: {path} is a Hugging Face folder; put its tokenizer into it")
        yield path
        return
    near.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=near, prefix=".export.") as name:
        folder = Path(name, "hf")
        export_to_hf(path, folder, tokenizer)
        yield folder


def copy_all_but_weights(folder: Path, output: Path) -> None:
    """Copy config, tokenizer and model card of a Hugging Face folder into another."""
    for file in folder.iterdir():
        if file.is_file() and not file.name.endswith(WEIGHTS):
            shutil.copyfile(file, output / file.name)
        elif file.is_dir() and file.name == "additional_chat_templates":
            shutil.copytree(file, output / file.name)


def size_of(path: Path) -> int:
    """Bytes of a file, or of the files in a folder."""
    return sum(file.stat().st_size for file in path.rglob("*")) if path.is_dir() else path.stat().st_size
