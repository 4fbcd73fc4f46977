"""Rotary position embeddings, half-split (NeoX) kind, with Llama 3.1's scaling.

Families that rotate neighbouring pairs (GPT-J, Llama 4) are imported with the rows of their query and key projections
permuted (lit_model/hf/table.py): scores do not change when both have the same permutation.

Dimensions: B batch, T tokens in a row, N = B T, H heads, D head size, R rotated part of a head, P pieces.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lit_model.config import ModelConfig


def rope_frequencies(config: ModelConfig, device: torch.device | str = "cpu") -> Tensor:
    """Radians per token of each pair of dimensions, float32 (R/2,).

    theta_i = base^(-2i/R) (Su et al., 2021). With scaling, as Llama 3.1's reference code does: wavelengths above
    original/low are slowed by `factor`, those below original/high stay, and between them the two are mixed linearly
    in original/wavelength. Computed in float32, as in every implementation that trained these models: at position
    2000 the rounding of a frequency is visible in the logits.
    """
    exponents = torch.arange(0, config.rotary_size, 2, dtype=torch.int64, device=device).float() / config.rotary_size
    frequencies: Tensor = 1.0 / (config.rope_base**exponents)
    if config.rope_scaling is None:
        return frequencies
    s = config.rope_scaling
    wavelengths = 2 * math.pi / frequencies
    mix = (s.original_block_size / wavelengths - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)
    mixed = (1 - mix) * frequencies / s.factor + mix * frequencies
    slowed = torch.where(wavelengths > s.original_block_size / s.low_freq_factor, frequencies / s.factor, mixed)
    return torch.where(wavelengths < s.original_block_size / s.high_freq_factor, frequencies, slowed)


class RopeTable:
    """cos and sin for every position up to block_size, made once per device and kept in float32.

    Not a module and without buffers, so that it is never saved, cast to lower precision, sharded, or left on the meta
    device when a model is built there.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, each (block_size, R/2)."""
        if device not in self._tables:
            with torch.inference_mode(False):
                positions = torch.arange(self._config.block_size, dtype=torch.float32, device=device)
                angles = positions[:, None] * rope_frequencies(self._config, device)
                self._tables[device] = (angles.cos(), angles.sin())
        return self._tables[device]

    def rows(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions int64 (B or 1, T), each (B or 1, T, 1, R/2)."""
        cos, sin = self.table(positions.device)
        return cos[positions].unsqueeze(2), sin[positions].unsqueeze(2)


def positions_in_rows(B: int, T: int, cu_seqlens: Tensor | None, start: int, device: torch.device) -> Tensor:
    """Positions of a batch, int64 (B, T), or (1, T) if all rows have the same.

    They start at 0 at each boundary in `cu_seqlens` (int32 (P+1,) over the flattened batch), or without it at `start`
    in each row.
    """
    if cu_seqlens is None:
        return torch.arange(start, start + T, device=device)[None]
    return positions_in_pieces(cu_seqlens, B * T).view(B, T)


def positions_in_pieces(cu_seqlens: Tensor, N: int) -> Tensor:
    """How far each of N tokens is from its piece's start, int64 (N,). No host sync; empty pieces are allowed."""
    tokens = torch.arange(N, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    piece = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    return (tokens - cu_seqlens[piece]).long()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
    """Rotate the first `heads` heads of x (B, T, H, D); the others pass through. Keeps the dtype of x.

    (a, b) -> (a cos - b sin, b cos + a sin), where a and b are the halves of a head's first R dimensions; the rest of
    it passes through. cos and sin are float32 (B or 1, T, 1, R/2). In eager mode x is overwritten: pass a tensor
    that is not used elsewhere.
    """
    # A framework that casts the inputs of blocks (FSDP2's cast_forward_inputs) would blur the positions.
    assert cos.dtype == torch.float32, f"cos and sin must stay float32, got {cos.dtype}"
    if torch.compiler.is_compiling():
        R = 2 * cos.shape[-1]
        a, b = x[:, :, :heads, :R].chunk(2, dim=-1)
        rotated = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
        if x.shape[-1] > R:
            rotated = torch.cat((rotated, x[:, :, :heads, R:]), dim=-1)
        return torch.cat((rotated, x[:, :, heads:]), dim=2) if heads < x.shape[2] else rotated
    if not torch.is_grad_enabled():
        _rotate_(x, cos, sin, heads)
        return x
    y: Tensor = _RotateInPlace.apply(x, cos, sin, heads)  # type: ignore[no-untyped-call]
    return y


def _rotate_(x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> None:
    a, b = x[:, :, :heads, : 2 * cos.shape[-1]].chunk(2, dim=-1)
    if x.dtype in (torch.float32, torch.float64):
        new_a = (a * cos).addcmul_(b, sin, value=-1)
        b.mul_(cos).addcmul_(a, sin)
    else:  # the product of two low-precision numbers is formed in float32 and rounded once
        new_a = a * cos - b * sin
        b.copy_(b * cos + a * sin)
    a.copy_(new_a)


class _RotateInPlace(torch.autograd.Function):
    """Eager mode: a few passes over half of the heads instead of ten over all, and nothing kept but cos and sin."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.heads = heads
        _rotate_(x, cos, sin, heads)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        grad = grad.clone(memory_format=torch.contiguous_format)
        _rotate_(grad, cos, -sin, ctx.heads)
        return grad, None, None, None
