"""Opens a Hugging Face folder with transformers itself, to compare with our model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def open_in_transformers(folder: Path, **options: Any) -> Any:
    """`AutoModelForCausalLM` of a folder in float32, without the progress bars of transformers.

    Args:
        options: of `from_pretrained`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
