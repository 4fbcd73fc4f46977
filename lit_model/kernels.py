"""Which attention implementation runs where, and the implementations behind one face.

Dimensions: B batch, T tokens in a row, N = B T, H query heads, G key/value heads, D head size, P pieces, S keys.

`cu_seqlens` (int32 (P+1,), on the device of q) holds the boundaries of document pieces in the flattened batch: first 0,
last N, each row's start among them; trailing repeats of N are empty pieces. None: each row is one piece. Attention is
causal inside a piece and never crosses a boundary. Third-party kernels are imported when first asked for.

Chunked attention (Llama 4) is document attention with more boundaries: see `chunk_boundaries`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# What each implementation does beyond causal grouped heads, and by which argument of its function; ours take them all
# as an AttentionVariant. Not in the list: FA2 has no soft-cap together with dropout (its forward refuses them), FA4
# takes a soft-cap but gives wrong gradients for it with document boundaries.
SERVES: dict[str, dict[str, str]] = {
    "fa4": {"documents": "cu_seqlens_q", "scale": "softmax_scale", "window": "window_size_left"},
    "fa3": {"documents": "cu_seqlens_q", "scale": "softmax_scale", "window": "window_size", "softcap": "softcap"},
    "fa2": {
        "documents": "cu_seqlens_q",
        "scale": "softmax_scale",
        "window": "window_size",
        "softcap": "softcap",  # its backward knows it from 2.6.2 on; pyproject.toml asks for more
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
    """What a layer asks of attention beyond softmax(q k^T / sqrt(D)) v over the keys up to the query's own."""

    scale: float | None = None
    """Factor of the scores; None: 1/sqrt(D)."""
    window: int | None = None
    """Tokens that a token sees, the last ones of its piece up to itself (positive); None: all of them."""
    softcap: float | None = None
    """Scaled scores s become c tanh(s / c) (positive; Gemma 2, arXiv 2408.00118); None: they stay."""
    dropout: float = 0.0
    """Probability of dropping a weight of the softmax; those left are divided by 1 - dropout. 0 outside of training."""

    def features(self) -> tuple[str, ...]:
        """The entries of SERVES that this needs."""
        asked = {"scale": self.scale, "window": self.window, "softcap": self.softcap, "dropout": self.dropout or None}
        return tuple(name for name, value in asked.items() if value is not None)


PLAIN = AttentionVariant()
_BY_HAND = ("window", "softcap", "dropout")  # what "loop" does by `cached_attention` and not by one call of SDPA


class AttentionChoice(NamedTuple):
    """The implementation that runs and why, for the log."""

    name: str
    reason: str


def choose_attention(
    device: torch.device | str,
    dtype: torch.dtype,
    head_size: int,
    requested: str = "auto",
    training: bool = True,
    *,
    documents: bool = True,
    variant: AttentionVariant = PLAIN,
) -> AttentionChoice:
    """The attention implementation for tensors of this device, dtype and head size.

    `requested` is "auto" or one of NAMES; `documents` says whether cu_seqlens will be given (as chunks need it, too).
    Raises ValueError if the requested one can't run here or lacks what the variant asks for, naming the reason; "auto"
    names what it passed over. Deterministic algorithms (torch.use_deterministic_algorithms) are taken into account when
    `training`.
    """
    deterministic = training and torch.are_deterministic_algorithms_enabled()
    features = ("documents", *variant.features()) if documents else variant.features()
    return _choose(torch.device(device), dtype, head_size, requested, deterministic, features)


@functools.cache
def _choose(
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    requested: str,
    deterministic: bool,
    features: tuple[str, ...],
) -> AttentionChoice:
    def obstacle(name: str) -> str | None:
        return _obstacle(name, device, dtype, head_size, deterministic, features)

    if requested != "auto":
        if requested not in NAMES:
            raise ValueError(f"attention {requested!r} is unknown; choose auto or one of {', '.join(NAMES)}")
        reason = obstacle(requested)
        if reason is not None:
            raise ValueError(f"attention {requested!r} can't run here: {reason}; choose another one, or auto")
        return AttentionChoice(requested, "requested")
    by_hand = " and ".join(_LACKS[name].removeprefix("has no ") for name in features if name in _BY_HAND)
    if device.type != "cuda":
        if by_hand:
            return AttentionChoice("loop", f"{device.type}: pieces one by one, {by_hand} in blocks of queries")
        return AttentionChoice("loop", f"{device.type}: SDPA over document pieces, none of the masked half computed")
    documents = "documents" in features
    passed_over: list[str] = []
    if not documents:
        reason = obstacle("sdpa")
        if reason is None:
            return AttentionChoice("sdpa", "rows without document boundaries: PyTorch's flash or cuDNN kernel")
        passed_over.append(f"sdpa: {reason}")
    # FA3 is written for Hopper and FA4 for Blackwell (where FA3 doesn't run).
    for name in ("fa3", "fa4", "fa2", "varlen"):
        reason = obstacle(name)
        if reason is None:
            skipped = f" (not {'; not '.join(passed_over)})" if passed_over else ""
            return AttentionChoice(name, f"fastest variable-length kernel that runs here{skipped}")
        passed_over.append(f"{name}: {reason}")
    how = ["pieces go one by one with a host sync"] if documents else []
    how += [f"{by_hand} in blocks of queries"] if by_hand else []
    reason = f"no variable-length kernel runs here, {', '.join(how)}"
    return AttentionChoice("loop", f"{reason} (not {'; not '.join(passed_over)})")


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, name: str, variant: AttentionVariant = PLAIN
) -> Tensor:
    """Causal grouped-query attention by the implementation called `name`.

    q (B, T, H, D), k and v (B, T, G, D) of one dtype -> (B, T, H, D). Differentiable in q, k, v. Raises ValueError for
    a variant that `name` never does; which releases and devices do it, `choose_attention` knows.
    """
    B, T, H, D = q.shape
    if variant.window is not None and variant.window >= T:
        variant = variant._replace(window=None)  # no piece is longer than its row
    features = variant.features()
    for feature in features if cu_seqlens is None else ("documents", *features):
        if feature not in SERVES[name]:
            raise ValueError(f"attention {name!r} {_LACKS[feature]}; choose another one, or auto")
    if name == "dense":
        return dense_attention(q, k, v, cu_seqlens, variant)
    if name in ("sdpa", "loop"):
        by_hand = any(feature in _BY_HAND for feature in features)
        if cu_seqlens is None and not by_hand:
            return sdpa(q, k, v, causal=True, scale=variant.scale)
        if q.device.type == "cpu" and not by_hand:
            assert cu_seqlens is not None
            return _cpu_loop(q, k, v, cu_seqlens, variant.scale)
        out: Tensor
        if torch.compiler.is_compiling() and not variant.dropout:
            out = _plain_operator(q, k, v, cu_seqlens, variant.scale, variant.window, variant.softcap)
        else:
            # As plain arguments: dynamo of torch 2.11 cannot rebuild a replaced NamedTuple where a graph ends.
            out = _plain_loop(q, k, v, cu_seqlens, *variant)
        return out
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.reshape(B * T, -1, D) for x in (q, k, v))  # (N, H or G, D)
    # The row length bounds every piece; the true maximum would cost a sync, and only sizes the launch grid.
    return _VARLEN[name](q, k, v, cu_seqlens, T, variant).view(B, T, H, D)


def sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """torch's scaled_dot_product_attention on (B, T, H, D) layout; k and v may have fewer heads and other lengths."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cpu" and (q.dtype == torch.float32 or mask is not None):
        # Off the CPU only flash and cuDNN take grouped heads, neither in float32 nor with a mask: what is left would be
        # the unfused kernel with the whole square in memory. Copies of the heads are the smaller cost.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return y.transpose(1, 2)


def dense_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, variant: AttentionVariant = PLAIN
) -> Tensor:
    """The definition, in plain matrix multiplies over an (N, N) mask: the reference of tests, nothing else.

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


# --- CPU: a loop over pieces, one opaque operator forward and one backward -------------------------------------------


def _runs(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """(start, pieces, length) of each run of neighbouring pieces of equal length: they share one batched call."""
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


def _piece(x: Tensor, start: int, pieces: int, length: int) -> Tensor:
    """Rows of (N, H, D) as a view (pieces, H, length, D)."""
    rows = x[start : start + pieces * length]
    return rows.view(pieces, length, *x.shape[1:]).transpose(1, 2)


@torch.library.custom_op("llammlein::attention_loop", mutates_args=(), device_types="cpu")
def _attention_loop(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """q (N, H, D), k and v (N, G, D) -> output (N, H, D) and the log of the softmax's normalisers, flat (N H,)."""
    N, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(N * H, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for run in _runs(cu_seqlens):
        start, pieces, length = run
        y, y_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_piece(x, *run) for x in (q, k, v)), 0.0, True, scale=scale
        )
        _piece(out, *run).copy_(y)
        lse[start * H : (start + pieces * length) * H].view(pieces, H, length).copy_(y_lse)
    return out, lse


@_attention_loop.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0] * q.shape[1], dtype=lse_dtype)


@torch.library.custom_op("llammlein::attention_loop_backward", mutates_args=(), device_types="cpu")
def _attention_loop_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    H = q.shape[1]
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for run in _runs(cu_seqlens):
        start, pieces, length = run
        run_lse = lse[start * H : (start + pieces * length) * H].view(pieces, H, length)
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_piece(x, *run) for x in (grad, q, k, v, out)), run_lse, 0.0, True, scale=scale
        )
        for whole, part in zip(grads, made, strict=True):
            _piece(whole, *run).copy_(part)
    return grads[0], grads[1], grads[2]


@_attention_loop_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, scale: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _loop_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors, *output)


def _loop_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    return (*_attention_loop_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.scale), None, None)


_attention_loop.register_autograd(_loop_backward, setup_context=_loop_setup)


def _cpu_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, scale: float | None) -> Tensor:
    out: Tensor = _attention_loop(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens, scale)[0]
    return out.view(q.shape)


# --- plain operations, for every variant and device ------------------------------------------------------------------

_BLOCK = 128
"""Queries that look at their keys together. With a window of W tokens one in 1 + W / 128 scores is computed in vain;
64 would gain 15 % for W 128 and 4 % or less for 512 and 2048 (one CPU core, float32, T 4096)."""


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _plain_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Pieces one by one. Sync: off the CPU the host reads the boundaries, since no kernel here takes them."""
    variant = AttentionVariant(scale, window, softcap, dropout)
    if cu_seqlens is None:
        return cached_attention(q, k, v, variant)
    runs = list(_runs(cu_seqlens))
    # Slices would each have a gradient of the full size.
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

    With a `chunk`, query and key must also lie in the same chunk of so many positions, counted from the first key.
    Blocks of queries meet only the keys that one of them sees: a window needs O(T (window + block)) memory.
    """
    T, S = q.shape[1], k.shape[1]
    window, weigh = variant.window, variant.softcap is not None or variant.dropout > 0
    if T == S and not weigh and (window is None or window >= S) and (chunk is None or chunk >= S):
        return sdpa(q, k, v, causal=T > 1, scale=variant.scale)
    outs = []
    start = S - T
    for block in q.split(_BLOCK, dim=1):
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


@torch.library.custom_op("llammlein::plain_attention", mutates_args=())
def _plain_operator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """`_plain_loop` for compiled blocks: the pieces' lengths are read inside of it, where they end no graph.

    A graph that ends inside a recomputed block leaves the whole block uncompiled.
    """
    out: Tensor = _plain_loop(q, k, v, cu_seqlens, scale, window, softcap, 0.0)
    return out.contiguous()


@_plain_operator.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("llammlein::plain_attention_backward", mutates_args=())
def _plain_operator_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    variant = AttentionVariant(scale, window, softcap)
    if cu_seqlens is None:
        return _weighted_backward(grad, q, k, v, variant)
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for start, pieces, length in _runs(cu_seqlens):
        run = slice(start, start + pieces * length)
        of_run = [x.flatten(0, 1)[run].unflatten(0, (pieces, length)) for x in (grad, q, k, v)]
        for whole, part in zip(
            grads, _weighted_backward(of_run[0], of_run[1], of_run[2], of_run[3], variant), strict=True
        ):
            whole.flatten(0, 1)[run] = part.flatten(0, 1)
    return grads[0], grads[1], grads[2]


@_plain_operator_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _plain_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, cu_seqlens)


def _plain_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return (*_plain_operator_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None)


_plain_operator.register_autograd(_plain_autograd, setup_context=_plain_setup)


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
    for block, grad_block in zip(q.split(_BLOCK, dim=1), grad.split(_BLOCK, dim=1), strict=True):
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


def chunk_boundaries(cu_seqlens: Tensor | None, B: int, T: int, chunk: int, device: torch.device | str) -> Tensor:
    """The boundaries with every piece cut into chunks of `chunk` tokens, counted from the piece's start: no sync.

    int32, (P+1 + N // chunk,), with the last N repeated: a piece of n tokens adds (n-1) // chunk boundaries, so this
    holds them all, and it depends on shapes only. `cu_seqlens` and what is returned are as in the module's docstring.
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


# --- CUDA: variable-length kernels, each (q (N, H, D), k, v (N, G, D), cu_seqlens, T, variant) -> (N, H, D) ----------


def _options(name: str, variant: AttentionVariant) -> dict[str, Any]:
    """How the function of `name` is told what is not the default; what is the default, old releases needn't know."""
    values: dict[str, Any] = {feature: getattr(variant, feature) for feature in variant.features()}
    if variant.window is not None:
        seen = variant.window - 1  # they count the tokens to the left
        values["window"] = seen if name == "fa4" else (seen, 0)
    return {SERVES[name][feature]: value for feature, value in values.items()}


def _fa2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    y: Tensor = flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, T, T),
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_options("fa2", variant),
    )
    return y


def _fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    y = flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, T, T),
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **_options("fa3", variant),
    )
    first: Tensor = y[0] if isinstance(y, tuple) else y  # early releases returned (out, logsumexp)
    return first


@torch.library.custom_op("llammlein::fa4", mutates_args=(), device_types="cuda")
def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    """FA4 is Python that generates kernels; one opaque operator keeps torch.compile from tracing into it."""
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found,unused-ignore]

    options = _taken(_flash_attn_fwd, max_seqlen_q=T, max_seqlen_k=T, return_lse=True)
    options |= _options("fa4", AttentionVariant(scale, window))
    out, lse, *_ = _flash_attn_fwd(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, **options)
    return out, lse


@_fa4_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("llammlein::fa4_backward", mutates_args=(), device_types="cuda")
def _fa4_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    T: int,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd  # type: ignore[import-not-found,unused-ignore]

    options = _taken(
        _flash_attn_bwd, max_seqlen_q=T, max_seqlen_k=T, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    options |= _options("fa4", AttentionVariant(scale, window))
    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad.contiguous(), lse, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **options
    )
    return dq, dk, dv


@_fa4_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor,
    T: int,
    scale: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fa4_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.T, ctx.scale, ctx.window = inputs
    ctx.save_for_backward(*tensors, *output)


def _fa4_autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    grads = _fa4_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.T, ctx.scale, ctx.window)
    return (*grads, None, None, None, None)


_fa4_forward.register_autograd(_fa4_autograd, setup_context=_fa4_setup)


def _fa4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    # The kernel generator wants 16-byte aligned, contiguous rows; views into the fused projection are not.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out: Tensor = _fa4_forward(q, k, v, cu_seqlens, T, variant.scale, variant.window)[0]
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The signature grew from release to release; all of it is known when the block is compiled.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
    options |= _options("varlen", variant)
    if k.shape[1] != q.shape[1]:
        if "enable_gqa" in _VARLEN_OPTIONS:
            options["enable_gqa"] = True
        else:  # 2.11 has no word for it: copies of the heads, whose gradients autograd sums
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, **options)
    assert isinstance(y, Tensor)
    return y


def _varlen_options() -> frozenset[str]:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


_VARLEN_OPTIONS = _varlen_options()
_VARLEN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int, AttentionVariant], Tensor]] = {
    "fa4": _fa4,
    "fa3": _fa3,
    "fa2": _fa2,
    "varlen": _varlen,
}
_MODULES = {"fa4": "flash_attn.cute.interface", "fa3": "flash_attn_interface", "fa2": "flash_attn.flash_attn_interface"}


def _taken(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of `options` that this release of `function` takes."""
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in options.items() if key in parameters}


def _obstacle(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    deterministic: bool,
    features: tuple[str, ...],
) -> str | None:
    """Why `name` can't run, or None."""
    if name not in _VARLEN:
        return _lacking(name, features, None)
    if device.type != "cuda":
        return f"it needs CUDA, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    largest = 128 if name == "fa4" else 256
    if head_size % 8 or head_size > largest:
        return f"head_size {head_size} is not a multiple of 8 up to {largest}"
    major, minor = torch.cuda.get_device_capability(device)
    served = {"fa4": major in (9, 10), "fa3": major == 9}.get(name, major >= 8)
    if not served:
        return f"it doesn't serve compute capability {major}.{minor}"
    if name == "varlen":
        if not _VARLEN_OPTIONS:
            return "this torch has no torch.nn.attention.varlen"
        return _lacking(name, features, _VARLEN_OPTIONS)
    try:
        module = importlib.import_module(_MODULES[name])
    except Exception as error:  # a broken build of an optional package must not stop the others; the log shows it
        first_line = (str(error).splitlines() or [""])[0]
        return f"{_MODULES[name]} does not import ({type(error).__name__}: {first_line})"
    functions = ("_flash_attn_fwd", "_flash_attn_bwd") if name == "fa4" else ("flash_attn_varlen_func",)
    parameters = [set(inspect.signature(getattr(module, function)).parameters) for function in functions]
    if name == "fa4" and deterministic and "deterministic" not in parameters[1]:
        return "this release has no deterministic backward"
    return _lacking(name, features, frozenset(set.intersection(*parameters)))


def _lacking(name: str, features: tuple[str, ...], arguments: frozenset[str] | None) -> str | None:
    """What of `features` the implementation, or its release that takes these arguments, does not do; None: nothing."""
    for feature in features:
        if feature not in SERVES[name]:
            return f"it {_LACKS[feature]}"
        if arguments is not None and SERVES[name][feature] not in arguments:
            return f"this release {_LACKS[feature]}"
    if name == "fa2" and {"softcap", "dropout"} <= set(features):
        return "it has no soft-cap together with attention dropout"
    return None
