"""Softmax cross-entropy of low-precision logits as one Triton kernel: losses, and the gradient in place of the logits.

Plain operations read and write float32 logits six times: the cast, the softmax, the exponential, the target and the
cast back. The kernel reads the bfloat16 or float16 logits twice and writes them once, and computes in float32
registers. Both round the gradient once, to the dtype of the logits. They differ by the order in which a row is summed,
and the gradient of a head's bias is summed before that rounding (plain) or after it (fused).
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

tl: Any = None  # triton.language, once the kernel is needed
NAMES = ("auto", "fused", "plain")
LOW_PRECISION = (torch.bfloat16, torch.float16)
COLUMNS = 8192
"""Logits that a program holds at once, at most."""
WARPS = 8


class LossChoice(NamedTuple):
    """The implementation that runs and why, for the log."""

    name: str
    reason: str


def obstacle(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the kernel can't run for logits of this device and dtype, as a clause; None if it can."""
    kind = torch.device(device).type
    if kind != "cuda":
        return f"it needs CUDA, not {kind}"
    if dtype not in LOW_PRECISION:
        return f"it needs bfloat16 or float16 logits, not {str(dtype).removeprefix('torch.')}"
    if importlib.util.find_spec("triton") is None:  # part of torch's CUDA builds
        return "the package triton is missing"
    return None


def choose_loss(requested: str, device: torch.device | str, dtype: torch.dtype) -> LossChoice:
    """The implementation of cross-entropy for logits of this device and dtype; `requested` is one of NAMES.

    Raises ValueError for another name, and if "fused" is requested and can't run here, with the reason.
    """
    if requested not in NAMES:
        raise ValueError(f"loss kernel {requested!r} is unknown; choose one of {', '.join(NAMES)}")
    if requested == "plain":
        return LossChoice("plain", "requested")
    reason = obstacle(device, dtype)
    if reason is None:
        return LossChoice("fused", "one Triton kernel for losses and gradient")
    if requested == "fused":
        raise ValueError(f"the fused loss can't run here: {reason}; choose plain or auto")
    return LossChoice("plain", reason)


def fused_cross_entropy(
    logits: Tensor,
    target: Tensor,
    ignored: Tensor,
    vocab_size: int,
    *,
    softcap: float | None = None,
    z_loss: float = 0.0,
    needs_gradient: bool = True,
) -> Tensor:
    """Cross-entropy and log-normaliser of each row, float32 (2, n); 0 where ignored.

    With logits x and z = x, or softcap tanh(x / softcap): log Z = ln sum_j exp(z_j) over the first `vocab_size`
    columns, loss = log Z - z_target. With `needs_gradient` the logits are overwritten by the gradient of the sum of
    loss + z_loss (log Z)^2: dz_j = p_j (1 + 2 z_loss log Z) - [j = target], times 1 - tanh^2 with a soft-cap; 0 in the
    padding columns and in ignored rows.

    Args:
        logits: (n, V), bfloat16 or float16, V >= vocab_size, columns contiguous.
        target: int64 (n, 1), a valid column also where ignored.
        ignored: bool (n, 1).
    """
    assert logits.stride(1) == 1
    n, columns = logits.shape
    numbers = torch.empty(2, n, dtype=torch.float32, device=logits.device)
    _kernel()[(n,)](
        *(logits, logits.stride(0), target, ignored.view(torch.uint8), numbers, n, vocab_size, columns),
        *(1.0 if softcap is None else softcap, z_loss),
        HAS_SOFTCAP=softcap is not None,
        NEEDS_GRADIENT=needs_gradient,
        BLOCK=min(COLUMNS, 1 << (columns - 1).bit_length()),
        num_warps=WARPS,
    )
    return numbers


# A program has one row. It goes over the row twice: for the maximum and the sum of exponentials (rescaled whenever the
# maximum grows: Milakov and Gimelshein 2018, arXiv 1805.02867, algorithm 3), then for the gradient.
def _rows(  # type: ignore[no-untyped-def]
    logits,
    stride,
    target,
    ignored,
    numbers,
    n,
    vocab_size,
    columns,
    softcap,
    z_loss,
    HAS_SOFTCAP: tl.constexpr,
    NEEDS_GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    column = tl.load(target + row).to(tl.int32)
    valid = tl.load(ignored + row) == 0
    offsets = tl.arange(0, BLOCK)
    largest = -float("inf")
    total = 0.0
    for start in range(0, vocab_size, BLOCK):
        at = start + offsets
        z = tl.load(logits + at, mask=at < vocab_size, other=-float("inf")).to(tl.float32)
        if HAS_SOFTCAP:
            # tanh by the exponential; where there is no column it stays -inf.
            z = tl.where(at < vocab_size, softcap * (1 - 2 / (1 + tl.exp(2 * z / softcap))), z)
        larger = tl.maximum(largest, tl.max(z, 0))
        total = total * tl.exp(largest - larger) + tl.sum(tl.exp(z - larger), 0)
        largest = larger
    log_z = largest + tl.log(total)
    at_target = tl.load(logits + column).to(tl.float32)
    if HAS_SOFTCAP:
        at_target = softcap * (1 - 2 / (1 + tl.exp(2 * at_target / softcap)))
    tl.store(numbers + row, tl.where(valid, log_z - at_target, 0.0))
    tl.store(numbers + n + row, tl.where(valid, log_z, 0.0))
    if NEEDS_GRADIENT:
        # Every read of the row above comes before any write to it: threads of the program share its columns.
        tl.debug_barrier()
        scale = tl.where(valid, 1 + 2 * z_loss * log_z, 0.0)
        minus = tl.where(valid, 1.0, 0.0)
        for start in range(0, columns, BLOCK):
            at = start + offsets
            x = tl.load(logits + at, mask=at < vocab_size, other=-float("inf")).to(tl.float32)
            slope = 1.0
            if HAS_SOFTCAP:
                tanh = tl.where(at < vocab_size, 1 - 2 / (1 + tl.exp(2 * x / softcap)), 0.0)
                x = tl.where(at < vocab_size, softcap * tanh, x)
                slope = 1 - tanh * tanh
            gradient = tl.exp(x - log_z) * scale - tl.where(at == column, minus, 0.0)
            gradient = tl.where(valid, gradient * slope, 0.0)
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < columns)


@functools.cache
def _kernel() -> Any:
    global tl
    import triton
    import triton.language as tl

    return triton.jit(_rows)
