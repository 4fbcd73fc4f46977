"""The settings of generation. Standard library only, for a quick --help."""

from __future__ import annotations

from dataclasses import dataclass, field

from lit_model.sampling import Sampling


@dataclass(frozen=True)
class GenerationSettings:
    """Sampling, length and number of generated texts.

    Attributes:
        sampling: how a token is chosen.
        max_new_tokens: maximum length of a text.
        num_samples: texts for each prompt.
        seed: of the first sample of each prompt; sample i has `seed + i`.
        stop: a text ends before the first of these strings.
        batch_size: texts generated at once. Changes them by rounding at most.
    """

    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0.8))
    max_new_tokens: int = 100
    num_samples: int = 1
    seed: int = 0
    stop: tuple[str, ...] = ()
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("num_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if "" in self.stop:
            raise ValueError("a stop string is empty")
