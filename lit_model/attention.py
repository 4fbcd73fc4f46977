"""Grouped-query self-attention over packed documents, and its key/value cache.

Dimensions: B batch, T tokens in a row, C n_embd, H query heads, G key/value heads, D head size, R rotated
part of a head, S cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_model.config import ModelConfig
from lit_model.kernels.choose import attention
from lit_model.kernels.plain import cached_attention, next_token_attention
from lit_model.kernels.variant import AttentionVariant
from lit_model.norm import RMSNorm, unit_norm
from lit_model.rope import apply_rope


@dataclass
class LayerCache:
    """Keys and values that one layer has seen: room for S tokens, of which `length` are filled."""

    k: Tensor
    """(B, S, G, D)."""
    v: Tensor
    """(B, S, G, D)."""
    length: int = 0
    """Tokens filled."""

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append (B, T, G, D) and return all keys and values so far, (B, length, G, D)."""
        end = self.length + k.shape[1]
        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        self.length = end
        return self.k[:, :end], self.v[:, :end]

    def place(self, k: Tensor, v: Tensor, prompts: PackedPrompts) -> None:
        """Fill the empty cache with the keys and values of packed prompts, (1, N, G, D)."""
        self.k[prompts.row, prompts.slot] = k[0].to(self.k.dtype)
        self.v[prompts.row, prompts.slot] = v[0].to(self.v.dtype)
        self.length = prompts.longest


class KVCache:
    """One LayerCache per layer, for rows of one length, or for prompts of unequal `lengths`.

    Unequal prompts end in the same slot: a row starts behind `padding` slots that nothing attends to. One forward over
    all of them, packed as documents, fills it: tokens (1, sum of lengths), so that no padding is computed. After it,
    each forward appends one token to each row.

    Attributes:
        padding: unused slots before each row, int64 (B,); None: no row has any.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        max_tokens: int,
        device: torch.device,
        dtype: torch.dtype,
        lengths: Sequence[int] | None = None,
    ) -> None:
        # Zeros: a weight of 0 times uninitialised memory may be NaN.
        shape = (batch, max_tokens, config.n_query_groups, config.head_size)
        self.max_tokens = max_tokens
        self.layers = [
            LayerCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.n_layer)
        ]
        self.padding: Tensor | None = None
        self.prompts: PackedPrompts | None = None
        self._hidden: Tensor | None = None  # (B, max_tokens): -inf in padding, else 0
        if lengths is not None and min(lengths) < max(lengths):
            sizes = torch.tensor(lengths, device=device)  # (B,)
            self.padding = max(lengths) - sizes
            self.prompts = PackedPrompts.of(sizes, max(lengths))
            self._hide(dtype)

    @property
    def length(self) -> int:
        """Slots filled."""
        return self.layers[0].length

    def select(self, rows: Tensor) -> None:
        """Keep the rows of these numbers, int64 (n,), in this order; a number may repeat."""
        for layer in self.layers:
            layer.k, layer.v = layer.k.index_select(0, rows), layer.v.index_select(0, rows)
        if self.padding is not None:
            self.padding = self.padding.index_select(0, rows)
            self._hide(self.layers[0].k.dtype)

    def hidden(self, chunk: int | None = None) -> Tensor | None:
        """Added to the scores of the token appended next: -inf for slots it does not see, else 0; (B, 1, 1, S).

        S counts the new token too. With a `chunk`, a row's slots before its current chunk of so many tokens are hidden.
        None: all slots are visible.
        """
        S = self.length + 1
        if self._hidden is None or self.padding is None:
            return None
        if chunk is None:
            return self._hidden[:, None, None, :S]
        first = self.padding + (S - 1 - self.padding) // chunk * chunk  # (B,)
        slots = torch.arange(S, device=first.device)
        return _minus_infinity(slots < first[:, None], self._hidden.dtype)[:, None, None]

    def _hide(self, dtype: torch.dtype) -> None:
        assert self.padding is not None
        slots = torch.arange(self.max_tokens, device=self.padding.device)
        self._hidden = _minus_infinity(slots < self.padding[:, None], dtype)


class PackedPrompts(NamedTuple):
    """Prompts as one row of N tokens, and the places of their tokens in a cache."""

    cu_seqlens: Tensor
    """int32 (B+1,)."""
    row: Tensor
    """int64 (N,)."""
    slot: Tensor
    """int64 (N,)."""
    longest: int

    @classmethod
    def of(cls, lengths: Tensor, longest: int) -> PackedPrompts:
        """lengths int64 (B,)."""
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)  # (N,)
        ends = lengths.cumsum(0)
        slots = torch.arange(len(rows), device=lengths.device) - (ends - longest)[rows]
        return cls(torch.nn.functional.pad(ends, (1, 0)).int(), rows, slots, longest)


def _minus_infinity(where: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where true, else 0."""
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill_(where, -torch.inf)


class RowLayout(NamedTuple):
    """Positions and boundaries of the rows of one forward, shared by all layers."""

    cos: Tensor | None
    """float32 (B or 1, T, 1, R/2); None: no layer rotates."""
    sin: Tensor | None
    cu_seqlens: Tensor | None
    """Boundaries of document pieces, int32 (P+1,), see lit_model/kernels/variant.py; None: each row is one piece."""
    chunks: Tensor | None
    """The same for chunked layers; None: a row is one chunk."""
    temperature: Tensor | None
    """Factor of the queries in layers that don't rotate, float32 (B or 1, T, 1, 1); None: 1."""
    hidden: Tensor | None = None
    """For one new token a row of a cache with padding: what `KVCache.hidden` returns."""
    hidden_chunk: Tensor | None = None
    """The same for chunked layers."""
    prompts: PackedPrompts | None = None
    """Where the tokens go in a cache, if the forward fills one with unequal prompts."""


def attention_variant(config: ModelConfig, layer: int) -> AttentionVariant:
    """The attention variant of a layer in training. A window as large as the context counts as no window."""
    sliding = config.layer_attention(layer) == "sliding"
    window = config.sliding_window_size if sliding else None
    scalar = config.attention_scores_scalar
    return AttentionVariant(
        scale=None if scalar is None else scalar**-0.5,
        window=None if window is None or window >= config.block_size else window,
        softcap=config.attention_logit_softcapping,
        dropout=config.attention_dropout,
    )


def chunk_boundaries(cu_seqlens: Tensor | None, B: int, T: int, chunk: int, device: torch.device | str) -> Tensor:
    """The boundaries with every piece cut into chunks of `chunk` tokens, counted from the piece's start: no sync.

    int32 (P+1 + N // chunk,), with the last N repeated: a piece of n tokens adds (n-1) // chunk boundaries, so there is
    room for all, and the size depends on shapes only. `cu_seqlens` and the result as in lit_model/kernels/variant.py.
    """
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (B + 1) * T, T, device=device)
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()  # (P,)
    chunks = (ends - starts + chunk - 1) // chunk  # (P,)
    behind = chunks.cumsum(0)  # (P,) chunks up to the end of each piece
    slots = torch.arange(cu_seqlens.shape[0] + B * T // chunk, device=device)
    piece = torch.searchsorted(behind, slots, right=True)  # P for the slots behind the last chunk
    of = piece.clamp(max=starts.shape[0] - 1)
    bounds = starts[of] + (slots - (behind - chunks)[of]) * chunk
    return torch.where(piece < starts.shape[0], bounds, B * T).int()


class Attention(nn.Module):
    """softmax(q k^T * scale) v, causal (Vaswani et al., 2017; grouped: Ainslie et al., 2023).

    Without `rotate_in_place` the projection's output is left unchanged, for activation checkpointing that keeps it.
    """

    def __init__(self, config: ModelConfig, layer: int, *, rotate_in_place: bool = True) -> None:
        super().__init__()
        self.rotate_in_place = rotate_in_place
        self.n_head = config.n_head
        self.n_query_groups = config.n_query_groups
        self.head_size = config.head_size
        self.variant = attention_variant(config, layer)
        self.chunked = config.layer_attention(layer) == "chunked"
        self.chunk_size = config.attention_chunk_size if self.chunked else None
        self.rotates = config.layer_rotates(layer)
        self.norm_eps = config.norm_eps
        self.qk_norm = config.qk_norm
        self.qkv = nn.Linear(config.n_embd, config.n_qkv, bias=config.attention_bias)
        if config.qk_norm in ("head", "projection"):
            of_heads = config.qk_norm == "projection"

            def norm(heads: int) -> RMSNorm:
                return RMSNorm(heads * config.head_size, config.norm_eps, config.norm_offset)

            self.q_norm = norm(config.n_head if of_heads else 1)
            self.k_norm = norm(config.n_query_groups if of_heads else 1)
        self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.attention_bias)

    def forward(self, x: Tensor, layout: RowLayout, kernel: str, cache: LayerCache | None) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x continues the tokens in it (and there are no documents)."""
        q, k, v = self.project(x, layout)
        T = x.shape[1]
        variant = self.variant if self.training else self.variant._replace(dropout=0.0)
        if cache is None or layout.prompts is not None:
            if cache is not None and layout.prompts is not None:
                cache.place(k, v, layout.prompts)
            y = attention(q, k, v, layout.chunks if self.chunked else layout.cu_seqlens, kernel, variant)
        elif T == 1:
            hidden = layout.hidden_chunk if self.chunked else layout.hidden
            # With padding, the start of a row's chunk is in `hidden`.
            chunk = self.chunk_size if hidden is None else None
            y = next_token_attention(q, *cache.append(k, v), hidden, variant, chunk)
        else:
            y = cached_attention(q, *cache.append(k, v), variant, self.chunk_size)
        out: Tensor = self.proj(y.flatten(2))
        return out

    def project(self, x: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, T, H, D), keys and values (B, T, G, D) of x (B, T, C), normed, rotated and scaled."""
        B, T, _ = x.shape
        H, G, D = self.n_head, self.n_query_groups, self.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * G, D)  # (B, T, H + 2G, D)
        if self.qk_norm == "none" and self.rotates:
            if not self.rotate_in_place:
                qkv = qkv.clone()
            qkv = self._rotate(qkv, layout, heads=H + G)
        q, k, v = torch.split(qkv, [H, G, G], dim=2)  # (B, T, H, D), (B, T, G, D) twice
        if self.qk_norm != "none":
            q, k = self._normed(q, k)
            if self.rotates:  # a norm commutes with a rotation of whole heads, but only one order serves all kinds
                q, k = self._rotate(q, layout, heads=H), self._rotate(k, layout, heads=G)
        if layout.temperature is not None and not self.rotates:
            q = (q * layout.temperature).to(q.dtype)
        return q, k, v

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Fresh tensors (B, T, H, D) and (B, T, G, D)."""
        if self.qk_norm == "projection":
            return self.q_norm(q.flatten(2)).view(q.shape), self.k_norm(k.flatten(2)).view(k.shape)
        if self.qk_norm == "head":
            return self.q_norm(q), self.k_norm(k)
        return (unit_norm(q, self.norm_eps), unit_norm(k, self.norm_eps)) if self.rotates else (q, k)

    @staticmethod
    def _rotate(x: Tensor, layout: RowLayout, heads: int) -> Tensor:
        assert layout.cos is not None and layout.sin is not None
        return apply_rope(x, layout.cos, layout.sin, heads)
