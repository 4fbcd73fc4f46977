"""How a token is chosen from the logits: the settings. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from the logits. Applied in this order, as in transformers."""

    repetition_penalty: float = 1.0
    """Logits of tokens in the prompt or the continuation are divided by this if positive, else multiplied (CTRL,
    Keskar et al. 2019); 1: off."""
    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most probable token (ties: the smallest id)."""
    top_k: int | None = None
    """Keep only this many of the most probable tokens."""
    top_p: float | None = None
    """Keep the smallest set of most probable tokens with this much of the mass (Holtzman et al. 2020)."""
    min_p: float | None = None
    """Keep tokens with at least this fraction of the largest probability (Nguyen et al. 2024)."""

    def __post_init__(self) -> None:
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0 (1: off)")
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 (greedy) or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; it must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1]")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}; it must be in [0, 1]")


GREEDY = Sampling(temperature=0)
