"""What a model is: sizes and switches. No torch, so that plans and cost tables need no framework."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

INIT_SCHEMES = ("llammlein", "normal")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's change of the rotary frequencies for long contexts (`rope_type: llama3` in transformers)."""

    factor: float
    """By how much the low frequencies are slowed down (ratio, >= 1)."""
    low_freq_factor: float
    """Wavelengths above original_block_size / low_freq_factor tokens are slowed by the whole factor."""
    high_freq_factor: float
    """Wavelengths below original_block_size / high_freq_factor tokens stay as they are."""
    original_block_size: int
    """Context, in tokens, that the frequencies were first trained for."""

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor is {self.factor}; it must be at least 1")
        if not 0 < self.low_freq_factor < self.high_freq_factor:
            raise ValueError(
                f"rope_scaling.low_freq_factor is {self.low_freq_factor} and high_freq_factor {self.high_freq_factor}; "
                "they must satisfy 0 < low_freq_factor < high_freq_factor"
            )
        if self.original_block_size < 1:
            raise ValueError(f"rope_scaling.original_block_size is {self.original_block_size}; it must be positive")


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only language model of the Llama family. Field names follow lit-gpt.

    Fields that are None after reading a file are filled in at construction, so that a built config always holds
    numbers: `n_query_groups`, `head_size` and `padded_vocab_size`.
    """

    name: str = ""
    """Name in the registry, for people; nothing is decided by it."""
    n_layer: int = 2
    """Number of blocks."""
    n_head: int = 4
    """Number of query heads."""
    n_query_groups: int = None  # type: ignore[assignment]
    """Number of key/value heads; None: as many as query heads (no grouping)."""
    n_embd: int = 64
    """Width of the residual stream."""
    intermediate_size: int = 128
    """Width inside the MLP."""
    block_size: int = 2048
    """Maximum context in tokens."""
    vocab_size: int = 32000
    """Number of token ids; targets and logits lie in [0, vocab_size)."""
    padding_multiple: int = 64
    """The vocabulary is padded up to a multiple of this, because matrix multiplies prefer such sizes."""
    padded_vocab_size: int = None  # type: ignore[assignment]
    """Rows of embedding and head; None: vocab_size rounded up to padding_multiple."""
    head_size: int = None  # type: ignore[assignment]
    """Width of one head; None: n_embd / n_head."""
    norm_eps: float = 1e-5
    """Added to the mean square in RMSNorm."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies (theta)."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1 frequency scaling; None: none."""
    tie_embeddings: bool = False
    """Whether the head uses the embedding's matrix."""
    attention_bias: bool = False
    """Whether the query, key, value and output projections have a bias."""
    mlp_bias: bool = False
    """Whether the three projections of the MLP have a bias."""
    dropout: float = 0.0
    """Probability of dropping an element of the embedding's output and of each residual branch."""
    init: Literal["llammlein", "normal"] = "llammlein"
    """Initialisation scheme, see lit_model/init.py."""
    init_std: float = 0.02
    """Standard deviation of the scheme `normal`."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", _build(RopeScaling, self.rope_scaling, "rope_scaling."))
        for field in (
            "n_layer",
            "n_head",
            "n_embd",
            "intermediate_size",
            "block_size",
            "vocab_size",
            "padding_multiple",
        ):
            _positive(field, getattr(self, field))
        if self.n_query_groups is None:
            object.__setattr__(self, "n_query_groups", self.n_head)
        _positive("n_query_groups", self.n_query_groups)
        if self.n_head % self.n_query_groups:
            raise ValueError(f"n_query_groups {self.n_query_groups} does not divide n_head {self.n_head}")
        if self.n_embd % self.n_head:
            # A head_size of its own would do here, but transformers' Llama refuses it: better said before training.
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}")
        if self.head_size is None:
            object.__setattr__(self, "head_size", self.n_embd // self.n_head)
        _positive("head_size", self.head_size)
        if self.head_size % 2:
            raise ValueError(f"head_size {self.head_size} is odd; rotary embeddings need an even one")
        if self.padded_vocab_size is None:
            padded = -(-self.vocab_size // self.padding_multiple) * self.padding_multiple
            object.__setattr__(self, "padded_vocab_size", padded)
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not in [0, 1)")
        if not self.norm_eps > 0:
            raise ValueError(f"norm_eps {self.norm_eps} is not positive")
        if not self.rope_base > 1:
            raise ValueError(f"rope_base {self.rope_base} is not above 1")
        if self.init not in INIT_SCHEMES:
            raise ValueError(f"init {self.init!r} is unknown; choose one of {', '.join(INIT_SCHEMES)}")
        if not self.init_std > 0:
            raise ValueError(f"init_std {self.init_std} is not positive")

    @property
    def n_qkv(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.n_head + 2 * self.n_query_groups) * self.head_size

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON can hold them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError for an unknown key."""
        config: ModelConfig = _build(cls, fields, "")
        return config


def _positive(field: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} is {value!r}; it must be a positive whole number")


def _build(cls: Any, fields: dict[str, Any], prefix: str) -> Any:
    known = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - set(known))
    if unknown:
        names = ", ".join(prefix + key for key in unknown)
        raise ValueError(f"unknown model field {names}; known are {', '.join(known)}")
    missing = [n for n, f in known.items() if n not in fields and f.default is dataclasses.MISSING]
    if missing:
        raise ValueError(f"missing model field {', '.join(prefix + key for key in missing)}")
    return cls(**fields)
