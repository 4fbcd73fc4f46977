"""Grouped-query self-attention over packed documents, and its key/value cache.

Dimensions: B batch, T tokens in a row, C n_embd, H query heads, G key/value heads, D head size, S cached tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lit_model.config import ModelConfig
from lit_model.kernels import attention, sdpa
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
        """Store (B, T, G, D) behind what is there and return all keys and values, (B, length, G, D)."""
        end = self.length + k.shape[1]
        self.k[:, self.length : end] = k
        self.v[:, self.length : end] = v
        self.length = end
        return self.k[:, :end], self.v[:, :end]


class KVCache:
    """One LayerCache per layer. All rows of the batch have the same length."""

    def __init__(
        self, config: ModelConfig, batch: int, max_tokens: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (batch, max_tokens, config.n_query_groups, config.head_size)
        self.max_tokens = max_tokens
        self.layers = [
            LayerCache(torch.zeros(shape, device=device, dtype=dtype), torch.zeros(shape, device=device, dtype=dtype))
            for _ in range(config.n_layer)
        ]

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.layers[0].length


class Attention(nn.Module):
    """softmax(q k^T / sqrt(D)) v with rotary positions (Vaswani et al., 2017; grouped: Ainslie et al., 2023).

    Without `rotate_in_place` the projection's output stays as it is, for activation checkpointing that keeps it.
    """

    def __init__(self, config: ModelConfig, *, rotate_in_place: bool = True) -> None:
        super().__init__()
        self.rotate_in_place = rotate_in_place
        self.n_head = config.n_head
        self.n_query_groups = config.n_query_groups
        self.head_size = config.head_size
        self.qkv = nn.Linear(config.n_embd, config.n_qkv, bias=config.attention_bias)
        self.proj = nn.Linear(config.n_head * config.head_size, config.n_embd, bias=config.attention_bias)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, cu_seqlens: Tensor | None, kernel: str, cache: LayerCache | None
    ) -> Tensor:
        """(B, T, C) -> (B, T, C). With a cache, x continues the tokens in it (and there are no documents)."""
        B, T, _ = x.shape
        H, G, D = self.n_head, self.n_query_groups, self.head_size
        qkv = self.qkv(x).view(B, T, H + 2 * G, D)  # (B, T, H + 2G, D)
        if not self.rotate_in_place:
            qkv = qkv.clone()
        qkv = apply_rope(qkv, cos, sin, heads=H + G)
        q, k, v = torch.split(qkv, [H, G, G], dim=2)  # (B, T, H, D), (B, T, G, D) twice
        if cache is None:
            y = attention(q, k, v, cu_seqlens, kernel)
        else:
            y = _cached_attention(q, k, v, cache)
        out: Tensor = self.proj(y.reshape(B, T, H * D))
        return out


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, cache: LayerCache) -> Tensor:
    T, before = q.shape[1], cache.length
    k, v = cache.append(k, v)
    if before == 0 or T == 1:
        return sdpa(q, k, v, causal=T > 1)
    queries = torch.arange(before, before + T, device=q.device)
    keys = torch.arange(before + T, device=q.device)
    return sdpa(q, k, v, causal=False, mask=queries[:, None] >= keys[None, :])
