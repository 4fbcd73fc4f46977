"""Attention in plain operations, for every variant and device, and torch's scaled_dot_product_attention (SDPA).

Dimensions and `cu_seqlens` as in lit_model/kernels/variant.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_model.kernels.operators import attention_operator
from lit_model.kernels.variant import PLAIN, AttentionVariant

QUERY_BLOCK = 128
"""Queries processed together. With a window of W tokens one score in 1 + W / 128 is computed in vain; blocks of 64
would gain 15 % for W 128 and 4 % or less for 512 and 2048 (one CPU core, float32, T 4096)."""


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention on (B, T, H, D) layout; k and v may have fewer heads and other lengths."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cpu" and (q.dtype == torch.float32 or mask is not None):
        # Off the CPU only flash and cuDNN support grouped heads, neither in float32 nor with a mask: the fallback would
        # be the unfused kernel with all T x T scores in memory. Copying the heads costs less.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, variant: AttentionVariant = PLAIN
) -> Tensor:
    """The definition, in plain matrix multiplies over an (N, N) mask: a reference for tests.

    Arguments and result as of `attention`, but without dropout.
    """
    assert not variant.dropout
    B, T, H, D = q.shape
    N, G = B * T, k.shape[2]
    tokens = torch.arange(N, device=q.device)
    if cu_seqlens is None:
        piece = tokens // T
    else:
        piece = torch.searchsorted(cu_seqlens.long(), tokens, right=True)
    allowed = (piece[:, None] == piece[None, :]) & (tokens[:, None] >= tokens[None, :])  # (N, N)
    if variant.window is not None:
        allowed &= tokens[None, :] > tokens[:, None] - variant.window
    qh = q.reshape(N, G, H // G, D)
    scores = torch.einsum("ngrd,mgd->grnm", qh, k.reshape(N, G, D)) * (
        D**-0.5 if variant.scale is None else variant.scale
    )
    if variant.softcap is not None:
        scores = variant.softcap * torch.tanh(scores / variant.softcap)
    weights = scores.masked_fill(~allowed, -torch.inf).softmax(dim=-1)
    return torch.einsum("grnm,mgd->ngrd", weights, v.reshape(N, G, D)).reshape(B, T, H, D)


def runs_of_pieces(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, pieces, length) of each run of adjacent pieces of equal length, which share one batched call."""
    bounds = cu_seqlens.tolist()
    i = 0
    while i + 1 < len(bounds):
        length = bounds[i + 1] - bounds[i]
        j = i + 1
        while j + 1 < len(bounds) and bounds[j + 1] - bounds[j] == length:
            j += 1
        if length > 0:
            yield bounds[i], j - i, length
        i = j


def plain_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *options: Any) -> Tensor:
    """Piece by piece; `options` are the fields of an AttentionVariant.

    Sync: off the CPU the host reads the boundaries, since none of the operations here takes them.
    """
    variant = AttentionVariant(*options)
    if cu_seqlens is None:
        return cached_attention(q, k, v, variant)
    runs = list(runs_of_pieces(cu_seqlens))
    # split, because the gradient of each slice would have the full size.
    q_runs, k_runs, v_runs = (x.flatten(0, 1).split([n * length for _, n, length in runs]) for x in (q, k, v))
    outs = []
    for (_, *size), q_run, k_run, v_run in zip(runs, q_runs, k_runs, v_runs, strict=True):
        q_run, k_run, v_run = (x.unflatten(0, size) for x in (q_run, k_run, v_run))  # (pieces, length, H or G, D)
        outs.append(cached_attention(q_run, k_run, v_run, variant).flatten(0, 1))
    return torch.cat(outs).view(q.shape)


def cached_attention(
    q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant = PLAIN, chunk: int | None = None
) -> Tensor:
    """Causal attention of q (B, T, H, D), the last T positions, over k and v (B, S, G, D), all of them: (B, T, H, D).

    With a `chunk`, query and key must also be in the same chunk of that many positions, counted from the first key.
    A block of queries is multiplied only with keys visible to one of them: a window needs O(T (window + block)) memory.
    """
    T, S = q.shape[1], k.shape[1]
    window, weigh = variant.window, variant.softcap is not None or variant.dropout > 0
    if T == S and not weigh and (window is None or window >= S) and (chunk is None or chunk >= S):
        return sdpa(q, k, v, causal=T > 1, scale=variant.scale)
    outs = []
    start = S - T
    for block in q.split(QUERY_BLOCK, dim=1):
        end = start + block.shape[1]
        first = 0 if window is None else max(0, start - window + 1)
        if chunk is not None:
            first = max(first, start // chunk * chunk)
        keys, values = k[:, first:end], v[:, first:end]
        mask = None if block.shape[1] == 1 else _visible(start, first, end, variant.window, chunk, q.device)
        if weigh:
            outs.append(_weighted(block, keys, values, mask, variant))
        else:
            outs.append(sdpa(block, keys, values, causal=False, mask=mask, scale=variant.scale))
        start = end
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


def next_token_attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None, variant: AttentionVariant = PLAIN, chunk: int | None = None
) -> Tensor:
    """Attention of the newest token of each row, q (B, 1, H, D), over k and v (B, S, G, D), itself last: (B, 1, H, D).

    `hidden` (B, 1, 1, S) is added to the scores: -inf hides a key, 0 shows it. With a `chunk`, only the last chunk of
    so many keys is visible. The heads that share a key are rows of one product, so no key is copied.
    """
    B, S, G, D = k.shape
    first = 0 if variant.window is None else max(0, S - variant.window)
    if chunk is not None:
        first = max(first, (S - 1) // chunk * chunk)
    if first:
        k, v = k[:, first:], v[:, first:]
        hidden = None if hidden is None else hidden[..., first:]
    rows, keys, values = q.view(B, G, -1, D), k.transpose(1, 2), v.transpose(1, 2)  # (B, G, H/G, D), (B, G, S, D) twice
    if variant.softcap is None:
        y = F.scaled_dot_product_attention(rows, keys, values, attn_mask=hidden, scale=variant.scale)
    else:
        wide = torch.promote_types(q.dtype, torch.float32)
        with torch.autocast(q.device.type, enabled=False):
            scores = rows.to(wide) @ keys.to(wide).transpose(2, 3)  # (B, G, H/G, S)
            scores = variant.softcap * torch.tanh(scores * (variant.scale or D**-0.5) / variant.softcap)
            if hidden is not None:
                scores = scores + hidden
            y = (scores.softmax(-1) @ values.to(wide)).to(q.dtype)  # (B, G, H/G, D)
    return y.reshape(q.shape)


def _forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *options: Any) -> Tensor:
    out: Tensor = plain_loop(q, k, v, cu_seqlens, *options, 0.0)
    return out.contiguous()


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    variant = AttentionVariant(*options)
    if cu_seqlens is None:
        return _weighted_backward(grad, q, k, v, variant)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for start, pieces, length in runs_of_pieces(cu_seqlens):
        run = slice(start, start + pieces * length)
        of_run = [x.flatten(0, 1)[run].unflatten(0, (pieces, length)) for x in (grad, q, k, v)]
        for whole, part in zip(
            grads, _weighted_backward(of_run[0], of_run[1], of_run[2], of_run[3], variant), strict=True
        ):
            whole.flatten(0, 1)[run] = part.flatten(0, 1)
    return grads[0], grads[1], grads[2]


def _weighted_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, variant: AttentionVariant
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of whole pieces, q and grad (B, T, H, D), k and v (B, T, G, D), in float32 or better, block by block.

    With weights P and scores S: dV = P^T dO, dS = P (dP - sum(dP P)) for dP = dO V^T, times 1 - (S / c)^2 for the
    derivative of a soft-cap c (FlashAttention, arXiv 2205.14135, appendix B.4, without its tiling).
    """
    H, D = q.shape[2:]
    G = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if variant.scale is None else variant.scale

    def by_group(x: Tensor) -> Tensor:
        """(B, t, H, D) -> (B, G, H/G t, D)."""
        return x.to(dtype).view(*x.shape[:2], G, H // G, D).permute(0, 2, 3, 1, 4).flatten(2, 3)

    keys, values = (x.to(dtype).transpose(1, 2) for x in (k, v))  # (B, G, T, D) each
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    dq = []
    start = 0
    for block, grad_block in zip(q.split(QUERY_BLOCK, dim=1), grad.split(QUERY_BLOCK, dim=1), strict=True):
        t = block.shape[1]
        end = start + t
        first = 0 if variant.window is None else max(0, start - variant.window + 1)
        rows, out_grad = by_group(block) * scale, by_group(grad_block)  # (B, G, H/G t, D) each
        scores = rows @ keys[:, :, first:end].transpose(2, 3)  # (B, G, H/G t, S)
        if variant.softcap is not None:
            scores = variant.softcap * torch.tanh(scores / variant.softcap)
        hidden = ~_visible(start, first, end, variant.window, None, q.device).repeat(H // G, 1)  # (H/G t, S)
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        dv[:, :, first:end] += weights.transpose(2, 3) @ out_grad
        d_scores = out_grad @ values[:, :, first:end].transpose(2, 3)
        d_scores = weights * (d_scores - (d_scores * weights).sum(-1, keepdim=True))
        if variant.softcap is not None:
            d_scores = d_scores * (1 - (scores / variant.softcap).square())
        dk[:, :, first:end] += d_scores.transpose(2, 3) @ rows
        d_rows = (d_scores @ keys[:, :, first:end]) * scale
        dq.append(d_rows.unflatten(2, (H // G, t)).permute(0, 3, 1, 2, 4).flatten(2, 3))  # (B, t, H, D)
        start = end
    return (
        torch.cat(dq, dim=1).to(q.dtype).contiguous(),
        dk.transpose(1, 2).to(k.dtype).contiguous(),
        dv.transpose(1, 2).to(v.dtype).contiguous(),
    )


def _visible(start: int, first: int, end: int, window: int | None, chunk: int | None, device: torch.device) -> Tensor:
    """bool (end - start, end - first): whether the queries at start..end see the keys at first..end."""
    queries = torch.arange(start, end, device=device)[:, None]
    keys = torch.arange(first, end, device=device)[None, :]
    visible = queries >= keys
    if window is not None:
        visible &= keys > queries - window
    if chunk is not None:
        visible &= keys // chunk == queries // chunk
    return visible


def _weighted(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, variant: AttentionVariant) -> Tensor:
    """Attention with its weights written out, in float32 or better: q (B, T, H, D), k, v (B, S, G, D), mask (T, S)."""
    B, T, H, D = q.shape
    G = k.shape[2]
    dtype = torch.promote_types(q.dtype, torch.float32)
    scale = D**-0.5 if variant.scale is None else variant.scale
    with torch.autocast(q.device.type, enabled=False):
        k, v = (x.to(dtype).transpose(1, 2) for x in (k, v))  # (B, G, S, D)
        rows = (q.to(dtype) * scale).view(B, T, G, H // G, D).permute(0, 2, 3, 1, 4)  # (B, G, H/G, T, D)
        scores = rows.reshape(B, G, H // G * T, D) @ k.transpose(2, 3)  # (B, G, H/G T, S)
        if variant.softcap is not None:
            scores = variant.softcap * torch.tanh(scores / variant.softcap)
        if mask is not None:
            # Not in place: selective checkpointing keeps the products, and would not notice.
            scores = scores.masked_fill(~mask.repeat(H // G, 1), -torch.inf)
        weights = scores.softmax(dim=-1)
        if variant.dropout:
            weights = F.dropout(weights, variant.dropout)
        y = (weights @ v).view(B, G, H // G, T, D).permute(0, 3, 1, 2, 4)  # (B, T, G, H/G, D)
    return y.reshape(B, T, H, D).to(q.dtype)


# `plain_loop` without dropout for compiled blocks: the lengths of the pieces are read inside the operator, where they
# cause no graph break. A graph break inside a recomputed block would leave the whole block uncompiled.
plain_operator = attention_operator(
    "plain_attention", "Tensor? cu_seqlens, float? scale, SymInt? window, float? softcap", _forward, _backward
)
