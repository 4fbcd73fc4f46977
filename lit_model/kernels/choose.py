"""Which attention implementation runs where, and one function that calls it.

Dimensions and `cu_seqlens` as in lit_model/kernels/variant.py.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from lit_model.kernels import cpu, cuda
from lit_model.kernels.cpu import cpu_loop
from lit_model.kernels.plain import dense_attention, plain_loop, plain_operator, sdpa
from lit_model.kernels.variant import NAMES, PLAIN, AttentionVariant, describe, lacking

# Without document boundaries. FA4 comes first here as well: on an H100, forward and backward of one layer of the 1B
# take 1.44 ms, SDPA's 1.62, varlen's 2.55 (docs/attention.md).
_WITHOUT_DOCUMENTS = ("fa4", "sdpa", "fa3", "fa2", "varlen")
_BEYOND_SDPA = ("window", "softcap", "dropout")  # "loop" runs these in blocks of queries, not by one call of SDPA


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

    `requested` is "auto" or one of NAMES; `documents` says whether cu_seqlens will be given (chunked layers need it
    too). With `training`, deterministic algorithms (torch.use_deterministic_algorithms) are taken into account.
    Raises ValueError if the requested implementation can't run here or lacks a feature, with the reason. The reason of
    "auto" names what would be faster if installed, and faster ones that are broken or lack a feature.
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
    def obstacle(name: str) -> cuda.Obstacle | None:
        if name in cuda.KERNELS:
            return cuda.obstacle(name, device, dtype, head_size, deterministic, features)
        lacks = lacking(name, features)
        return None if lacks is None else cuda.Obstacle("feature", lacks)

    if requested != "auto":
        if requested not in NAMES:
            raise ValueError(f"attention {requested!r} is unknown; choose auto or one of {', '.join(NAMES)}")
        found = obstacle(requested)
        if found is not None:
            raise ValueError(f"attention {requested!r} can't run here: {found.text}; choose another one, or auto")
        return AttentionChoice(requested, "requested")
    beyond = _beyond_sdpa(features)
    in_blocks = [f"{describe(beyond)} in blocks of queries"] if beyond else []
    if device.type != "cuda":
        how = f"pieces one by one, {in_blocks[0]}" if beyond else "SDPA piece by piece, without the masked half"
        return AttentionChoice("loop", f"{device.type}: {how}")
    documents = "documents" in features
    ruled_out: dict[str, cuda.Obstacle] = {}
    for name in cuda.KERNELS if documents else _WITHOUT_DOCUMENTS:
        found = obstacle(name)
        if found is None:
            why = "rows without document boundaries: PyTorch's flash or cuDNN kernel"
            why = why if name == "sdpa" else "the fastest variable-length kernel installed here"
            return AttentionChoice(name, why + _remarks(name, ruled_out))
        ruled_out[name] = found
    how = ", ".join((["pieces one by one with a host sync"] if documents else []) + in_blocks)
    return AttentionChoice("loop", f"no variable-length kernel runs here, {how}{_remarks('loop', ruled_out)}")


def _remarks(chosen: str, ruled_out: dict[str, cuda.Obstacle]) -> str:
    """Why faster kernels were not chosen, where the user can act on it: a missing feature, a broken or missing package.

    varlen is FA2, so that FA2 is worth installing only where nothing but the loop runs.
    """
    by_text: dict[str, list[str]] = {}
    for name, found in ruled_out.items():
        if found.kind in ("feature", "broken") or (found.kind == "here" and chosen == "loop" and name == "varlen"):
            by_text.setdefault(found.text, []).append(name)
    remarks = [f"not {' or '.join(names)}: {text}" for text, names in by_text.items()]
    for name, extra in cuda.EXTRAS.items():
        if name in ruled_out and ruled_out[name].kind == "missing" and (name == "fa4" or chosen == "loop"):
            remarks.append(f'the extra "{extra}" would give {name}')
    return f" ({'; '.join(remarks)})" if remarks else ""


def _beyond_sdpa(features: tuple[str, ...]) -> list[str]:
    return [feature for feature in features if feature in _BEYOND_SDPA]


_untraced_plain_loop = plain_loop


def disable_loop_tracing() -> None:
    """Exclude `plain_loop` from tracing. Call this before compiling a model; not done at import, since
    torch.compiler.disable imports all of torch.compile."""
    global _untraced_plain_loop
    _untraced_plain_loop = torch.compiler.disable(plain_loop)


def attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, name: str, variant: AttentionVariant = PLAIN
) -> Tensor:
    """Causal grouped-query attention by the implementation called `name`.

    q (B, T, H, D), k and v (B, T, G, D) of one dtype -> (B, T, H, D). Differentiable in q, k, v. Raises ValueError for
    a variant that `name` never supports; `choose_attention` checks releases and devices.
    """
    B, T, H, D = q.shape
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and not cpu.HAS_BF16:
        with torch.autocast("cpu", enabled=False):
            return attention(q.float(), k.float(), v.float(), cu_seqlens, name, variant).to(q.dtype)
    if variant.window is not None and variant.window >= T:
        variant = variant._replace(window=None)  # no piece is longer than its row
    features = variant.features()
    reason = lacking(name, features if cu_seqlens is None else ("documents", *features))
    if reason is not None:
        raise ValueError(f"attention {name!r} can't run here: {reason}; choose another one, or auto")
    if name == "dense":
        return dense_attention(q, k, v, cu_seqlens, variant)
    if name in cuda.KERNELS:
        if cu_seqlens is None:
            cu_seqlens = torch.arange(0, (B + 1) * T, T, dtype=torch.int32, device=q.device)
        q, k, v = (x.reshape(B * T, -1, D) for x in (q, k, v))  # (N, H or G, D)
        # The row length bounds every piece; the true maximum would cost a sync, and only sizes the launch grid.
        return cuda.KERNELS[name](q, k, v, cu_seqlens, T, variant).view(B, T, H, D)
    if not _beyond_sdpa(features):
        if cu_seqlens is None:
            return sdpa(q, k, v, causal=True, scale=variant.scale)
        if q.device.type == "cpu":
            return cpu_loop(q, k, v, cu_seqlens, variant.scale)
    out: Tensor
    if not torch.compiler.is_compiling():
        out = plain_loop(q, k, v, cu_seqlens, *variant)
    elif not variant.dropout:
        out = plain_operator(q, k, v, cu_seqlens, variant.scale, variant.window, variant.softcap)
    else:
        # As plain arguments: dynamo of torch 2.11 cannot rebuild a replaced NamedTuple where a graph ends.
        out = _untraced_plain_loop(q, k, v, cu_seqlens, *variant)
    return out
