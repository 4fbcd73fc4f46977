"""The arguments of the BabyLM pipeline. Standard library only, for a quick --help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Track = Literal["strict", "strict-small"]
NO_CLEANER = "none"


@dataclass(frozen=True)
class BabylmSettings:
    """From BabyLM's text to a submission. The fields are flags of scripts/babylm.py."""

    train: Path
    """Folder with the challenge's *.train or *.train.txt files (also .gz, .zst)."""
    dev: Path
    """Folder with its *.dev or *.dev.txt files; may be the same."""
    out_dir: Path
    """Folder to work in: a new one, or that of an earlier call, which is resumed."""
    track: Track | None = None
    """Word limit (strict: 100M, strict-small: 10M), and the words seen at which checkpoints are kept. Default:
    strict-small if the training text has up to 10.5M words, else strict."""
    model: str = "llama-58M"
    """A config of configs/babyllama/ or configs/babylm2025/ by its name, distillation (BabyLlama's student), or a YAML
    file of your own."""
    teachers: tuple[str, ...] = ()
    """Configs, as of --model, of teachers to train first, which the model then learns from as well as from the text."""
    max_steps: int | None = None
    """Training steps. Default: the epochs of the config."""
    vocab_size: int | None = None
    """Ids of the tokenizer. Default: the model's; of a config without one 16000, or 2048 below a width of 256."""
    cleaner: str = "babylm"
    """--cleaner of prepare_data.py, such as babylm-paper; none leaves the text unchanged."""
    evaluation_data: Path | None = None
    """Local copy of the challenge's evaluation_data, with full_eval, fast_eval or both. The newest checkpoint is scored
    on both, the others on fast_eval."""
    tasks: tuple[str, ...] = ()
    """More tasks for every checkpoint, as --tasks of evaluate.py has them."""
    dry_run: bool = False
    """Check everything, and print the commands without running them."""

    def __post_init__(self) -> None:
        if self.max_steps is not None and self.max_steps < 1:
            raise ValueError(f"--max_steps {self.max_steps}: at least 1 is needed")
