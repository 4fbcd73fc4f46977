"""The name of a checkpoint: iter-00001000-ckpt.pth, a file or a folder in the run folder, after 1000 optimizer steps.

It gets this name once complete: a checkpoint that can be listed can be loaded.
"""

from __future__ import annotations

import re
from pathlib import Path

PATTERN = re.compile(r"iter-(\d{8,})-ckpt\.pth")


def checkpoint_name(step: int) -> str:
    """The name of the checkpoint after `step` optimizer steps."""
    return f"iter-{step:08d}-ckpt.pth"


def checkpoint_step(path: Path) -> int | None:
    """Optimizer steps completed in a checkpoint, from its name; None for any other name."""
    match = PATTERN.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first; none if there is no such folder."""
    found = [p for p in run.iterdir() if checkpoint_step(p) is not None] if run.is_dir() else []
    return sorted(found, key=lambda p: checkpoint_step(p) or 0)


def budget_name(words: int) -> str:
    """A number of words in millions, as BabyLM names checkpoints: 2000000 -> 2M, 1500000 -> 1.5M."""
    whole, rest = divmod(words, 10**6)
    return f"{whole}.{rest:06d}".rstrip("0").rstrip(".") + "M"
