"""The settings of a teacher cache. Standard library only, for a quick --help."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class CacheRequest:
    """A cache, and the share of it that this call writes. The fields are flags of scripts/cache_teacher.py."""

    teachers: tuple[Path, ...]
    """Run folders, checkpoints, Hugging Face folders."""
    data: Path
    """Packed dataset that the student will be trained on."""
    output: Path
    """Folder of the cache."""
    block_size: int
    """Tokens per row, as in the student's run."""
    k: int
    """Number of top tokens to keep of each distribution."""
    weights: tuple[float, ...] | None = None
    """Weights of the teachers, relative to each other. Default: equal."""
    temperature: float = 2.0
    """Temperature of the distillation, as in the student's run."""
    ensemble: Literal["logits", "probabilities"] = "logits"
    """Quantity averaged over the teachers."""
    packing: Literal["concat", "best_fit", "pad"] = "concat"
    """Packing, as in the student's run."""
    plan_dir: Path | None = None
    """Folder for the row plans of best_fit and pad. Default: in the dataset."""
    no_document_mask: bool = False
    """Let the documents of a row attend to each other."""
    dtype: Literal["float16", "float32"] = "float16"
    """Type of the stored log-probabilities."""
    precision: Literal["fp32", "bf16"] | None = None
    """Precision of the teachers. Default: bf16 on CUDA, else fp32."""
    batch: int = 16
    """Rows per forward pass."""
    rows_per_file: int = 4096
    """Rows per file; an interrupted call resumes at the first missing file."""
    part: int = 0
    """Number of this call among --parts, from 0."""
    parts: int = 1
    """Calls that share the work."""
    allow_tokenizer_mismatch: bool = False
    """Allow teachers with another tokenizer than the data, where the ids are known to agree."""

    def __post_init__(self) -> None:
        if not 0 <= self.part < self.parts:
            raise ValueError(f"--part {self.part} is not in 0..{self.parts - 1} (--parts {self.parts})")
        for name in ("block_size", "k", "batch", "rows_per_file"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} {getattr(self, name)} must be at least 1")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature} must be a number above 0")
        for weight in self.weights or ():
            if not 0 < weight < float("inf"):
                raise ValueError(f"--weights {weight} must be a number above 0")
        if self.weights is not None and len(self.weights) != len(self.teachers):
            raise ValueError(f"--weights has {len(self.weights)} numbers for {len(self.teachers)} teachers")
