"""Attention on CPU: a loop over document pieces with SDPA's CPU kernel, as one operator forward and one backward.

Dimensions and `cu_seqlens` as in lit_model/kernels/variant.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lit_model.kernels.operators import attention_operator
from lit_model.kernels.plain import runs_of_pieces


def _has_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


HAS_BF16 = _has_bf16()
"""Whether oneDNN multiplies bf16 matrices on this CPU (AMX, AVX512-BF16; with plain AVX-512 it emulates the product).
Elsewhere bf16 is only stored, and products are computed in float32: see lit_model/bf16.py."""


def _piece(x: Tensor, start: int, pieces: int, length: int) -> Tensor:
    """Rows of (N, H, D) as a view (pieces, H, length, D)."""
    rows = x[start : start + pieces * length]
    return rows.view(pieces, length, *x.shape[1:]).transpose(1, 2)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """q (N, H, D), k and v (N, G, D) -> output (N, H, D) and the log of the softmax's normalisers, flat (N H,)."""
    H = q.shape[1]
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = _empty_lse(q)
    for run in runs_of_pieces(cu_seqlens):
        start, pieces, length = run
        y, y_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_piece(x, *run) for x in (q, k, v)), 0.0, True, scale=scale
        )
        _piece(out, *run).copy_(y)
        lse[start * H : (start + pieces * length) * H].view(pieces, H, length).copy_(y_lse)
    return out, lse


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    H = q.shape[1]
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for run in runs_of_pieces(cu_seqlens):
        start, pieces, length = run
        run_lse = lse[start * H : (start + pieces * length) * H].view(pieces, H, length)
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_piece(x, *run) for x in (grad, q, k, v, out)), run_lse, 0.0, True, scale=scale
        )
        for whole, part in zip(grads, made, strict=True):
            _piece(whole, *run).copy_(part)
    return grads[0], grads[1], grads[2]


def _empty_lse(q: Tensor) -> Tensor:
    """(N H,)."""
    return q.new_empty(q.shape[0] * q.shape[1], dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)


_attention_loop = attention_operator(
    "attention_loop",
    "Tensor cu_seqlens, float? scale",
    _forward,
    _backward,
    empty_lse=_empty_lse,
    device_types="cpu",
)


def cpu_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    """q (B, T, H, D), k and v (B, T, G, D) -> (B, T, H, D)."""
    out: Tensor = _attention_loop(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, scale)[0]
    return out.view(q.shape)
