"""The configuration of a model. No torch, so that plans and cost tables need no framework."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

LayerAttention = Literal["full", "sliding", "chunked"]

# Far beyond any model, and small enough that the numbers derived from them are computed at once, in little memory.
MOST = {
    "n_layer": 10_000,
    "n_head": 1 << 16,
    "n_query_groups": 1 << 16,
    "n_embd": 1 << 20,
    "head_size": 1 << 16,
    "intermediate_size": 1 << 24,
    "moe_intermediate_size": 1 << 24,
    "block_size": 1 << 27,
    "vocab_size": 1 << 27,
    "padded_vocab_size": 1 << 28,
    "padding_multiple": 1 << 20,
    "n_expert": 1 << 14,
}
MOST_PARAMETERS = 1 << 46


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's scaling of the rotary frequencies for long contexts (`rope_type: llama3` in transformers)."""

    factor: float
    """Factor by which the low frequencies are divided (>= 1)."""
    low_freq_factor: float
    """Wavelengths above original_block_size / low_freq_factor tokens are scaled by the full factor."""
    high_freq_factor: float
    """Wavelengths below original_block_size / high_freq_factor tokens are not scaled."""
    original_block_size: int
    """Context length, in tokens, of the original training."""

    def __post_init__(self) -> None:
        _check_types(self)
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
    """A decoder-only language model. Field names follow litgpt where it has them; the defaults are a Llama's.

    The attribute docstrings are also the help of the trainer's flags --model.*.

    `n_query_groups`, `head_size`, `padded_vocab_size`, `rotary_size`, `moe_intermediate_size` and `moe_layers` are
    filled in at construction where they are None, so that a config always holds numbers. Settings that differ between
    layers are patterns, repeated up to n_layer and kept in their shortest form.
    """

    name: str = ""
    """Name in the registry; for display only."""
    n_layer: int = 2
    """Number of blocks."""
    n_head: int = 4
    """Number of query heads."""
    n_query_groups: int = None  # type: ignore[assignment]
    """Number of key/value heads (grouped-query attention). Default: n_head."""
    n_embd: int = 64
    """Width of the residual stream (embedding size)."""
    intermediate_size: int = 128
    """Hidden width of the MLP."""
    block_size: int = 2048
    """Maximum context, in tokens."""
    vocab_size: int = 32000
    """Number of token ids; tokens and targets are in [0, vocab_size)."""
    padding_multiple: int = 64
    """Rows of embedding and head are padded to a multiple of this, for faster matrix products."""
    padded_vocab_size: int = None  # type: ignore[assignment]
    """Rows of embedding and head. Default: vocab_size rounded up to padding_multiple."""
    head_size: int = None  # type: ignore[assignment]
    """Width of one head. Default: n_embd / n_head."""
    tie_embeddings: bool = False
    """Share the matrix of the embedding with the head."""
    scale_embeddings: bool = False
    """Multiply the output of the embedding by sqrt(n_embd) (Gemma)."""

    norm_class_name: Literal["RMSNorm", "LayerNorm"] = "RMSNorm"
    """RMSNorm (weight), or LayerNorm (weight and bias)."""
    norm_eps: float = 1e-5
    """Epsilon added to the mean square in the norms."""
    norm_offset: float = 0.0
    """Added to the weights of the norms; 1 in Gemma, whose weights start at 0."""
    pre_norm: bool = True
    """Norm the inputs of attention and MLP."""
    post_norm: bool = False
    """Norm the outputs of attention and MLP before they are added to the residual stream."""
    parallel_residual: bool = False
    """Apply the MLP to the input of the block, in parallel to the attention, instead of after it."""
    shared_attention_norm: bool = False
    """Share one norm between the inputs of attention and MLP (GPT-J); needs parallel_residual."""

    position_embedding: Literal["rope", "learned"] = "rope"
    """Rotary embedding of queries and keys, or a learned vector per position added to the token embedding."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies (theta)."""
    rope_scaling: RopeScaling | None = None
    """Llama 3.1 frequency scaling. Default: none."""
    rotary_size: int = None  # type: ignore[assignment]
    """Number of dimensions of a head that are rotated (the first ones). Default: all."""
    rope_layers: tuple[bool, ...] = (True,)
    """Layers with rotary embedding, as a pattern repeated over the layers; the others have none (NoPE, Llama 4)."""

    attention_bias: bool = False
    """Biases in the query, key, value and output projections."""
    attention_scores_scalar: float | None = None
    """Attention scores are divided by the square root of this. Default: head_size."""
    attention_logit_softcapping: float | None = None
    """Cap c of the attention scores: c tanh(score / c) (Gemma 2). Default: no cap."""
    attention_pattern: tuple[LayerAttention, ...] = ("full",)
    """Attention of each layer, as a pattern repeated over the layers: full (the whole document), sliding (the last
    sliding_window_size tokens) or chunked (within chunks of attention_chunk_size tokens)."""
    sliding_window_size: int | None = None
    """Window of sliding layers, in tokens, including the token itself."""
    attention_chunk_size: int | None = None
    """Chunk size of chunked layers, in tokens, counted from the start of the document."""
    qk_norm: Literal["none", "head", "projection", "unit"] = "none"
    """RMSNorm of queries and keys before the rotation: per head with weights shared by the heads (head, Qwen 3), over
    the whole projection (projection, OLMo 2), or per head without weights in rotary layers only (unit, Llama 4)."""
    attention_temperature_scale: float | None = None
    """In layers without rotary embedding, multiply the query at position p by
    1 + scale * ln(1 + floor((p + 1) / floor)) (Llama 4, after Nakanishi 2025). Default: off."""
    attention_temperature_floor: int = 8192
    """Position, in tokens, from which attention_temperature_scale takes effect."""

    mlp_gated: bool = True
    """Gated MLP (SwiGLU, GeGLU), proj(act(fc_1(x)) * fc_2(x)), instead of proj(act(fc(x)))."""
    activation: Literal["silu", "gelu", "gelu_tanh"] = "silu"
    """Activation of the MLP: SiLU, GELU, or the tanh approximation of GELU."""
    mlp_bias: bool = False
    """Biases in the projections of the MLP."""

    n_expert: int = 0
    """Experts of a mixture-of-experts layer; 0: a dense model."""
    n_expert_per_token: int = 1
    """Experts per token (top-k routing)."""
    moe_intermediate_size: int = None  # type: ignore[assignment]
    """Hidden width of an expert. Default: intermediate_size."""
    shared_expert: bool = True
    """One additional expert in each mixture-of-experts layer that processes every token."""
    moe_layers: tuple[bool, ...] = None  # type: ignore[assignment]
    """Layers with experts, as a pattern repeated over the layers. Default: all if n_expert is not 0."""

    lm_head_bias: bool = False
    """Bias in the head (GPT-J)."""
    final_logit_softcapping: float | None = None
    """Cap c of the logits: c tanh(logit / c) (Gemma 2). Default: no cap."""

    dropout: float = 0.0
    """Dropout probability of the embedding output and of each residual branch."""
    attention_dropout: float = 0.0
    """Dropout probability of attention weights; most kernels do not support it (docs/attention.md)."""
    init: Literal["llammlein", "normal", "gpt2"] = "llammlein"
    """Initialization scheme, see lit_model/init.py."""
    init_std: float = 0.02
    """Standard deviation of the schemes `normal` and `gpt2`."""

    family: str = dataclasses.field(default="", compare=False)
    """The model_type in transformers of an imported model, or "". Exports use it if that architecture can express the
    model; nothing else depends on it."""

    def __post_init__(self) -> None:
        if isinstance(self.rope_scaling, dict):
            object.__setattr__(self, "rope_scaling", _build(RopeScaling, self.rope_scaling, "rope_scaling."))
        _check_types(self)
        for field in (
            "n_layer",
            "n_head",
            "n_embd",
            "intermediate_size",
            "block_size",
            "vocab_size",
            "padding_multiple",
        ):
            check_size(field, getattr(self, field))
        self._fill_in()
        self._check_sizes()
        self._check_numbers()

    def _fill_in(self) -> None:
        """Replace None by numbers, and patterns by their shortest form."""

        def default(field: str, value: Any) -> None:
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)

        default("n_query_groups", self.n_head)
        if self.n_embd % self.n_head:
            # An explicit head_size would work here, but transformers' Llama refuses it: better an early error.
            raise ValueError(f"n_head {self.n_head} does not divide n_embd {self.n_embd}")
        default("head_size", self.n_embd // self.n_head)
        default("rotary_size", self.head_size if self.position_embedding == "rope" else 0)
        default("padded_vocab_size", -(-self.vocab_size // self.padding_multiple) * self.padding_multiple)
        default("moe_intermediate_size", self.intermediate_size)
        default("moe_layers", (self.n_expert > 0,))
        for field, known in (
            ("rope_layers", (True, False)),
            ("moe_layers", (True, False)),
            ("attention_pattern", get_args(LayerAttention)),
        ):
            object.__setattr__(self, field, _shortest(field, getattr(self, field), known, self.n_layer))

    def _check_sizes(self) -> None:
        for field in ("n_query_groups", "head_size", "moe_intermediate_size", "attention_temperature_floor"):
            check_size(field, getattr(self, field))
        for field in ("padded_vocab_size", "rotary_size", "n_expert", "n_expert_per_token"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value > MOST.get(field, 1 << 62):
                raise ValueError(
                    f"{field} is {value!r}; it must be a whole number of at most {MOST.get(field, 1 << 62)}"
                )
        width = self.moe_intermediate_size if self.n_expert else self.intermediate_size
        if self.n_layer * self.n_embd * max(self.n_qkv, width * max(1, self.n_expert)) > MOST_PARAMETERS:
            raise ValueError(
                f"n_layer {self.n_layer}, n_embd {self.n_embd}, intermediate_size {width}"
                + (f", n_expert {self.n_expert}" if self.n_expert else "")
                + f": this model would have more than {MOST_PARAMETERS} parameters"
            )
        if self.n_head % self.n_query_groups:
            raise ValueError(f"n_query_groups {self.n_query_groups} does not divide n_head {self.n_head}")
        if self.padded_vocab_size < self.vocab_size:
            raise ValueError(f"padded_vocab_size {self.padded_vocab_size} is below vocab_size {self.vocab_size}")
        if self.position_embedding == "rope" and (self.rotary_size % 2 or not 0 < self.rotary_size <= self.head_size):
            raise ValueError(
                f"rotary_size is {self.rotary_size} (by default head_size); it must be even, above 0, and not above "
                f"head_size {self.head_size}"
            )
        if self.position_embedding == "learned" and (self.rotary_size or not all(self.rope_layers)):
            raise ValueError("rotary_size and rope_layers are for position_embedding 'rope'")
        for field, kind in (("sliding_window_size", "sliding"), ("attention_chunk_size", "chunked")):
            size, used = getattr(self, field), kind in self.attention_pattern
            if used != (size is not None):
                verb = f"has a {kind} layer, which needs" if used else f"has no {kind} layer for"
                raise ValueError(f"attention_pattern {'/'.join(self.attention_pattern)} {verb} {field} (it is {size})")
            if used:
                check_size(field, size)
        if self.shared_attention_norm and not (self.parallel_residual and self.pre_norm):
            raise ValueError("shared_attention_norm needs parallel_residual and pre_norm")
        if self.parallel_residual and self.post_norm:
            raise ValueError("parallel_residual and post_norm are mutually exclusive")
        if not (self.pre_norm or self.post_norm):
            raise ValueError("pre_norm and post_norm are both off: nothing would bound the residual branches")
        if self.n_expert < 0 or any(self.moe_layers) != (self.n_expert > 0):
            raise ValueError(
                f"n_expert is {self.n_expert} and moe_layers {self.moe_layers}: they contradict each other"
            )
        if self.n_expert and not 1 <= self.n_expert_per_token <= self.n_expert:
            raise ValueError(f"n_expert_per_token {self.n_expert_per_token} is not in 1..n_expert ({self.n_expert})")
        if self.n_expert and not self.mlp_gated:
            raise ValueError("n_expert needs mlp_gated: experts are gated")
        if self.n_expert and self.mlp_bias:
            raise ValueError("n_expert and mlp_bias are mutually exclusive: experts have no bias")

    def _check_numbers(self) -> None:
        for field in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, field) < 1:
                raise ValueError(f"{field} {getattr(self, field)} is not in [0, 1)")
        for field in ("norm_eps", "init_std"):
            if not getattr(self, field) > 0:
                raise ValueError(f"{field} {getattr(self, field)} is not positive")
        for field in (
            "attention_scores_scalar",
            "attention_logit_softcapping",
            "final_logit_softcapping",
            "attention_temperature_scale",
        ):
            value = getattr(self, field)
            if value is not None and not value > 0:
                raise ValueError(f"{field} {value} is not positive")
        if not self.rope_base > 1:
            raise ValueError(f"rope_base {self.rope_base} is not above 1")

    def layer_attention(self, layer: int) -> LayerAttention:
        """The kind of attention in this layer."""
        return self.attention_pattern[layer % len(self.attention_pattern)]

    def layer_rotates(self, layer: int) -> bool:
        """Whether this layer has rotary embedding."""
        return self.position_embedding == "rope" and self.rope_layers[layer % len(self.rope_layers)]

    def layer_has_experts(self, layer: int) -> bool:
        """Whether this layer's MLP is a mixture of experts."""
        return self.moe_layers[layer % len(self.moe_layers)]

    @property
    def least_parameters(self) -> int:
        """A lower bound of the number of parameters, cheap to compute: embedding, query, key and value, and MLP."""
        width = self.intermediate_size
        if self.n_expert:
            width = min(width, self.moe_intermediate_size * self.n_expert)
        return self.padded_vocab_size * self.n_embd + self.n_layer * self.n_embd * (self.n_qkv + 2 * width)

    @property
    def n_qkv(self) -> int:
        """Rows of the fused query, key and value projection."""
        return (self.n_head + 2 * self.n_query_groups) * self.head_size

    def to_dict(self) -> dict[str, Any]:
        """All fields, as JSON holds them (patterns are lists)."""
        fields = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError for an unknown key."""
        config: ModelConfig = _build(cls, fields, "")
        return config


def _check_types(config: Any) -> None:
    """Raise ValueError for a field whose value in a file has the wrong type or is not one of its choices."""
    kinds: dict[str, tuple[Any, str]] = {
        "int": (int, "a whole number"), "float": (int | float, "a number"), "bool": (bool, "true or false"),
        "str": (str, "a string"),
    }  # fmt: skip
    cls: Any = type(config)
    hints = _hints(cls)
    for field in dataclasses.fields(config):
        choices = get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else None
        if choices is not None and getattr(config, field.name) not in choices:
            known = ", ".join(choices)
            raise ValueError(f"{field.name} {getattr(config, field.name)!r} is unknown; choose one of {known}")
        value, (kind, name) = getattr(config, field.name), kinds.get(str(field.type).split(" ")[0], (object, ""))
        optional = value is None and field.default is None
        if not optional and (not isinstance(value, kind) or (isinstance(value, bool) and kind not in (bool, object))):
            raise ValueError(f"{field.name} is {value!r:.80}; it must be {name}")


_hints = functools.cache(get_type_hints)


def check_size(field: str, value: Any) -> None:
    """Raise ValueError unless the value is a positive whole number of plausible size."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{field} is {value!r}; it must be a positive whole number")
    if value > MOST.get(field, 1 << 62):
        raise ValueError(f"{field} is {value}; at most {MOST.get(field, 1 << 62)} are supported")


def _shortest(field: str, pattern: Any, known: tuple[Any, ...], n_layer: int) -> tuple[Any, ...]:
    """The shortest pattern that gives the same n_layer entries when repeated."""
    if not isinstance(pattern, (list, tuple)) or not pattern or any(entry not in known for entry in pattern):
        raise ValueError(f"{field} is {pattern!r}; give a list of {', '.join(map(str, known))}")
    whole = [pattern[i % len(pattern)] for i in range(n_layer)]
    length = next(n for n in range(1, n_layer + 1) if all(whole[i] == whole[i % n] for i in range(n_layer)))
    return tuple(whole[:length])


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
