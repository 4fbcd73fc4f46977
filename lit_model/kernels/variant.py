"""The kinds of attention a layer may ask for, and which implementation supports which.

Conventions of all modules in this package. Dimensions: B batch, T tokens in a row, N = B T, H query heads, G key/value
heads, D head size, P pieces, S keys.

`cu_seqlens` (int32 (P+1,), on the device of q) holds the boundaries of document pieces in the flattened batch: first 0,
last N, the start of each row among them; trailing repeats of N are empty pieces. None: each row is one piece. Attention
is causal within a piece and never crosses a boundary.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

# The features each implementation supports beyond causal grouped heads, and the argument of its function that carries
# each; our own functions take an AttentionVariant. Two exceptions are not in the table: FA2 refuses a soft-cap together
# with dropout, and FA4 accepts a soft-cap but computes wrong gradients for it with document boundaries.
SERVES: dict[str, dict[str, str]] = {
    "fa4": {"documents": "cu_seqlens_q", "scale": "softmax_scale", "window": "window_size_left"},
    "fa3": {"documents": "cu_seqlens_q", "scale": "softmax_scale", "window": "window_size", "softcap": "softcap"},
    "fa2": {
        "documents": "cu_seqlens_q",
        "scale": "softmax_scale",
        "window": "window_size",
        "softcap": "softcap",  # its backward supports it from 2.6.2 on; pyproject.toml requires more
        "dropout": "dropout_p",
    },
    "varlen": {"documents": "cu_seq_q", "scale": "scale", "window": "window_size"},
    "sdpa": {"scale": "scale"},
    "loop": dict.fromkeys(("documents", "scale", "window", "softcap", "dropout"), "variant"),
    "dense": dict.fromkeys(("documents", "scale", "window", "softcap"), "variant"),
}
NAMES = tuple(SERVES)

_LACKS = {
    "documents": "can't keep documents apart without a dense mask",
    "scale": "has no scale but 1/sqrt(head_size)",
    "window": "has no sliding window",
    "softcap": "has no soft-cap",
    "dropout": "has no attention dropout",
}


class AttentionVariant(NamedTuple):
    """Options of attention beyond softmax(q k^T / sqrt(D)) v over the keys up to the query's own position."""

    scale: float | None = None
    """Factor of the scores; None: 1/sqrt(D)."""
    window: int | None = None
    """Tokens a query attends to: the last ones of its piece, itself included (positive); None: no limit."""
    softcap: float | None = None
    """Scaled scores s become c tanh(s / c) (positive; Gemma 2, arXiv 2408.00118); None: unchanged."""
    dropout: float = 0.0
    """Probability of dropping a softmax weight; the others are divided by 1 - dropout. 0 outside training."""

    def features(self) -> tuple[str, ...]:
        """The features in SERVES that this variant needs."""
        asked = {"scale": self.scale, "window": self.window, "softcap": self.softcap, "dropout": self.dropout or None}
        return tuple(name for name, value in asked.items() if value is not None)


PLAIN = AttentionVariant()


def lacking(name: str, features: tuple[str, ...], arguments: Collection[str] | None = None) -> str | None:
    """The first of `features` that `name` does not support, as a clause for an error or a log line; None if none.

    `arguments` are the arguments of the installed release, None where there is only one.
    """
    for feature in features:
        if feature not in SERVES[name]:
            return f"it {_LACKS[feature]}"
        if arguments is not None and SERVES[name][feature] not in arguments:
            return f"this release {_LACKS[feature]}"
    if name == "fa2" and "softcap" in features and "dropout" in features:
        return "it has no soft-cap together with attention dropout"
    return None


def describe(features: Collection[str]) -> str:
    """`features` in words, for a log line."""
    return " and ".join(_LACKS[name].removeprefix("has no ") for name in features)
