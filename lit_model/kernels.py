"""Which attention implementation runs where, and the implementations behind one face.

Dimensions: B batch, T tokens in a row, N = B T, H query heads, G key/value heads, D head size, P pieces.

`cu_seqlens` (int32 (P+1,), on the device of q) holds the boundaries of document pieces in the flattened batch: first 0,
last N, each row's start among them; trailing repeats of N are empty pieces. None: each row is one piece. Attention is
causal inside a piece and never crosses a boundary. Third-party kernels are imported when first asked for.
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

NAMES = ("fa4", "fa3", "fa2", "varlen", "sdpa", "loop", "dense")


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
) -> AttentionChoice:
    """The attention implementation for tensors of this device, dtype and head size.

    `requested` is "auto" or one of NAMES; `documents` says whether cu_seqlens will be given. Raises ValueError if the
    requested one can't run here, naming the reason; "auto" names what it passed over. Deterministic algorithms
    (torch.use_deterministic_algorithms) are taken into account when `training`.
    """
    deterministic = training and torch.are_deterministic_algorithms_enabled()
    return _choose(torch.device(device), dtype, head_size, requested, deterministic, documents)


@functools.cache
def _choose(
    device: torch.device, dtype: torch.dtype, head_size: int, requested: str, deterministic: bool, documents: bool
) -> AttentionChoice:
    def obstacle(name: str) -> str | None:
        return _obstacle(name, device, dtype, head_size, deterministic, documents)

    if requested != "auto":
        if requested not in NAMES:
            raise ValueError(f"attention {requested!r} is unknown; choose auto or one of {', '.join(NAMES)}")
        reason = obstacle(requested)
        if reason is not None:
            raise ValueError(f"attention {requested!r} can't run here: {reason}; choose another one, or auto")
        return AttentionChoice(requested, "requested")
    if device.type != "cuda":
        return AttentionChoice("loop", f"{device.type}: SDPA over document pieces, none of the masked half computed")
    if not documents:
        return AttentionChoice("sdpa", "rows without document boundaries: PyTorch's flash or cuDNN kernel")
    # FA3 is written for Hopper and FA4 for Blackwell (where FA3 doesn't run).
    passed_over: list[str] = []
    for name in ("fa3", "fa4", "fa2", "varlen"):
        reason = obstacle(name)
        if reason is None:
            skipped = f" (not {'; not '.join(passed_over)})" if passed_over else ""
            return AttentionChoice(name, f"fastest variable-length kernel that runs here{skipped}")
        passed_over.append(f"{name}: {reason}")
    reason = "no variable-length kernel runs here, pieces go one by one with a host sync"
    return AttentionChoice("loop", f"{reason} (not {'; not '.join(passed_over)})")


def attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, name: str) -> Tensor:
    """Causal grouped-query attention, scaled by 1/sqrt(D), by the implementation called `name`.

    q (B, T, H, D), k and v (B, T, G, D) of one dtype -> (B, T, H, D). Differentiable in q, k, v.
    """
    if name == "dense":
        return dense_attention(q, k, v, cu_seqlens)
    if cu_seqlens is None and name in ("sdpa", "loop"):
        return sdpa(q, k, v, causal=True)
    if name == "sdpa":
        raise ValueError(
            "attention 'sdpa' can't keep documents apart (a dense mask is refused); use fa4, fa3, fa2 or varlen"
        )
    if name == "loop":
        assert cu_seqlens is not None
        return _cpu_loop(q, k, v, cu_seqlens) if q.device.type == "cpu" else _sync_loop(q, k, v, cu_seqlens)
    B, T, H, D = q.shape
    if cu_seqlens is None:
        cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
    q, k, v = (x.reshape(B * T, -1, D) for x in (q, k, v))  # (N, H or G, D)
    # The row length bounds every piece; the true maximum would cost a sync, and only sizes the launch grid.
    return _VARLEN[name](q, k, v, cu_seqlens, T).view(B, T, H, D)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool, mask: Tensor | None = None) -> Tensor:
    """torch's scaled_dot_product_attention on (B, T, H, D) layout; k and v may have fewer heads and other lengths."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H or G, T, D)
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.device.type != "cpu" and (q.dtype == torch.float32 or mask is not None):
        # Off the CPU only flash and cuDNN take grouped heads, neither in float32 nor with a mask: what is left would be
        # the unfused kernel with the whole square in memory. Copies of the heads are the smaller cost.
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped)
    return y.transpose(1, 2)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """The definition, in plain matrix multiplies over an (N, N) mask: the reference of tests, nothing else."""
    B, T, H, D = q.shape
    N, G = B * T, k.shape[2]
    tokens = torch.arange(N, device=q.device)
    if cu_seqlens is None:
        piece = tokens // T
    else:
        piece = torch.searchsorted(cu_seqlens.long(), tokens, right=True)
    allowed = (piece[:, None] == piece[None, :]) & (tokens[:, None] >= tokens[None, :])  # (N, N)
    qh = q.reshape(N, G, H // G, D)
    scores = torch.einsum("ngrd,mgd->grnm", qh, k.reshape(N, G, D)) * D**-0.5
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
def _attention_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """q (N, H, D), k and v (N, G, D) -> output (N, H, D) and the log of the softmax's normalisers, flat (N H,)."""
    N, H, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    lse = torch.empty(N * H, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for run in _runs(cu_seqlens):
        start, pieces, length = run
        y, y_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_piece(x, *run) for x in (q, k, v)), 0.0, True
        )
        _piece(out, *run).copy_(y)
        lse[start * H : (start + pieces * length) * H].view(pieces, H, length).copy_(y_lse)
    return out, lse


@_attention_loop.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(q.shape), q.new_empty(q.shape[0] * q.shape[1], dtype=lse_dtype)


@torch.library.custom_op("llammlein::attention_loop_backward", mutates_args=(), device_types="cpu")
def _attention_loop_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    H = q.shape[1]
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    for run in _runs(cu_seqlens):
        start, pieces, length = run
        run_lse = lse[start * H : (start + pieces * length) * H].view(pieces, H, length)
        made = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_piece(x, *run) for x in (grad, q, k, v, out)), run_lse, 0.0, True
        )
        for whole, part in zip(grads, made, strict=True):
            _piece(whole, *run).copy_(part)
    return grads[0], grads[1], grads[2]


@_attention_loop_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _loop_setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)


def _loop_backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    return (*_attention_loop_backward(grad, q, k, v, out, lse, cu_seqlens), None)


_attention_loop.register_autograd(_loop_backward, setup_context=_loop_setup)


def _cpu_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    out: Tensor = _attention_loop(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), cu_seqlens)[0]
    return out.view(q.shape)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _sync_loop(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Pieces one by one on another device. Sync: the host reads the boundaries, since no kernel here takes them."""
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    outs = []
    for run in _runs(cu_seqlens):
        y = sdpa(*(_piece(x, *run).transpose(1, 2) for x in flat), causal=True)  # (pieces, length, H, D)
        outs.append(y.flatten(0, 1))
    return torch.cat(outs).view(q.shape)


# --- CUDA: variable-length kernels, each (q (N, H, D), k, v (N, G, D), cu_seqlens, T) -> (N, H, D) -------------------


def _fa2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    y: Tensor = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, T, T, causal=True, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    return y


def _fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    y = flash_attn_varlen_func(
        q, k, v, cu_seqlens, cu_seqlens, T, T, causal=True, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    first: Tensor = y[0] if isinstance(y, tuple) else y  # early releases returned (out, logsumexp)
    return first


@torch.library.custom_op("llammlein::fa4", mutates_args=(), device_types="cuda")
def _fa4_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    """FA4 is Python that generates kernels; one opaque operator keeps torch.compile from tracing into it."""
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found,unused-ignore]

    options = _taken(_flash_attn_fwd, max_seqlen_q=T, max_seqlen_k=T, return_lse=True)
    out, lse, *_ = _flash_attn_fwd(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, **options)
    return out, lse


@_fa4_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("llammlein::fa4_backward", mutates_args=(), device_types="cuda")
def _fa4_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_bwd  # type: ignore[import-not-found,unused-ignore]

    options = _taken(
        _flash_attn_bwd, max_seqlen_q=T, max_seqlen_k=T, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad.contiguous(), lse, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **options
    )
    return dq, dk, dv


@_fa4_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens: Tensor, T: int
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fa4_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.T = inputs
    ctx.save_for_backward(*tensors, *output)


def _fa4_autograd(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
    q, k, v, cu_seqlens, out, lse = ctx.saved_tensors
    return (*_fa4_backward(grad, q, k, v, out, lse, cu_seqlens, ctx.T), None, None)


_fa4_forward.register_autograd(_fa4_autograd, setup_context=_fa4_setup)


def _fa4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int) -> Tensor:
    # The kernel generator wants 16-byte aligned, contiguous rows; views into the fused projection are not.
    out: Tensor = _fa4_forward(q.contiguous(), k.contiguous(), v.contiguous(), cu_seqlens, T)[0]
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The signature grew from release to release; all of it is known when the block is compiled.
    options: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _VARLEN_OPTIONS else {"is_causal": True}
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
_VARLEN: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]] = {
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
    name: str, device: torch.device, dtype: torch.dtype, head_size: int, deterministic: bool, documents: bool
) -> str | None:
    """Why `name` can't run, or None."""
    if name in ("loop", "dense"):
        return None
    if name == "sdpa":
        return "it can't keep documents apart without a dense mask" if documents else None
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
        return None if _VARLEN_OPTIONS else "this torch has no torch.nn.attention.varlen"
    try:
        module = importlib.import_module(_MODULES[name])
    except Exception as error:  # a broken build of an optional package must not stop the others; the log shows it
        first_line = (str(error).splitlines() or [""])[0]
        return f"{_MODULES[name]} does not import ({type(error).__name__}: {first_line})"
    if name == "fa4" and deterministic and "deterministic" not in inspect.signature(module._flash_attn_bwd).parameters:
        return "this release has no deterministic backward"
    return None
