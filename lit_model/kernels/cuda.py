"""Variable-length attention on CUDA: FlashAttention 4, 3 and 2, and torch's varlen_attn.

Dimensions and `cu_seqlens` as in lit_model/kernels/variant.py. Each kernel is a function (q (N, H, D), k and v
(N, G, D), cu_seqlens, T, variant) -> (N, H, D). The packages are optional and imported when first asked for.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from lit_files.reading import first_line
from lit_model.kernels.operators import attention_operator
from lit_model.kernels.variant import SERVES, AttentionVariant, lacking


def options(name: str, variant: AttentionVariant) -> dict[str, Any]:
    """The keyword arguments that carry `variant` to the function of `name`.

    Defaults are left out, so that an old release need not know them.
    """
    values: dict[str, Any] = {feature: getattr(variant, feature) for feature in variant.features()}
    if variant.window is not None:
        left = variant.window - 1  # the kernels count the tokens to the left
        values["window"] = left if name == "fa4" else (left, 0)
    return {SERVES[name][feature]: value for feature, value in values.items()}


def _fa2(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    return _flash_attention(flash_attn_varlen_func, q, k, v, cu_seqlens, T, options("fa2", variant))


def _fa3(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]

    return _flash_attention(flash_attn_varlen_func, q, k, v, cu_seqlens, T, options("fa3", variant))


def _flash_attention(
    function: Callable[..., Any], q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, options: dict[str, Any]
) -> Tensor:
    y = function(
        *(q, k, v, cu_seqlens, cu_seqlens, T, T),
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        **options,
    )
    out: Tensor = y[0] if isinstance(y, tuple) else y  # early releases of FA3 return (out, logsumexp)
    return out


def _fa4_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, scale: float | None, window: int | None
) -> tuple[Tensor, Tensor]:
    from flash_attn.cute.interface import _flash_attn_fwd  # type: ignore[import-not-found,unused-ignore]

    arguments = _known(_flash_attn_fwd, max_seqlen_q=T, max_seqlen_k=T, return_lse=True)
    arguments |= options("fa4", AttentionVariant(scale, window))
    out, lse, *_ = _flash_attn_fwd(q, k, v, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, causal=True, **arguments)
    return out, lse


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

    arguments = _known(
        _flash_attn_bwd, max_seqlen_q=T, max_seqlen_k=T, deterministic=torch.are_deterministic_algorithms_enabled()
    )
    arguments |= options("fa4", AttentionVariant(scale, window))
    dq, dk, dv, *_ = _flash_attn_bwd(
        q, k, v, out, grad.contiguous(), lse, causal=True, cu_seqlens_q=cu_seqlens, cu_seqlens_k=cu_seqlens, **arguments
    )
    return dq, dk, dv


# FA4 is Python that generates kernels: torch.compile must not trace into it.
_fa4_operator = attention_operator(
    "fa4",
    "Tensor cu_seqlens, SymInt T, float? scale, SymInt? window",
    _fa4_forward,
    _fa4_backward,
    empty_lse=lambda q: q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32),
    device_types="cuda",
)


def _fa4(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    # The kernel generator needs 16-byte aligned, contiguous rows; views into the fused projection are not.
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    out: Tensor = _fa4_operator(q, k, v, cu_seqlens, T, variant.scale, variant.window)[0]
    return out


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, T: int, variant: AttentionVariant) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    # The signature grew from release to release; all of this is constant when the block is compiled.
    arguments: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in VARLEN_ARGUMENTS else {"is_causal": True}
    arguments |= options("varlen", variant)
    if k.shape[1] != q.shape[1]:
        if not repeats_heads("varlen"):
            arguments["enable_gqa"] = True
        else:  # torch 2.11 has no such argument: repeat the heads, whose gradients autograd sums
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    y = varlen_attn(q, k, v, cu_seqlens, cu_seqlens, T, T, **arguments)
    assert isinstance(y, Tensor)
    return y


def varlen_arguments() -> frozenset[str]:
    """The arguments of torch's kernel; none if this torch has no such kernel.

    Read from its source: importing it imports torch.compile's machinery.
    """
    module = importlib.util.find_spec("torch.nn.attention.varlen")
    if module is None or module.origin is None:
        return frozenset()
    for node in ast.parse(Path(module.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef) and node.name == "varlen_attn":
            return frozenset(a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs))
    return frozenset()


VARLEN_ARGUMENTS = varlen_arguments()


def repeats_heads(name: str) -> bool:
    """Whether this kernel has no grouped heads here, so that keys and values are repeated."""
    return name == "varlen" and "enable_gqa" not in VARLEN_ARGUMENTS


# In order of preference. FA4 is ahead of FA3 on Hopper too: on an H100 its gradients are right, the 1B step is 1.06
# times as fast as with varlen, and its wheels install; FA3 has not been tested there.
KERNELS: dict[str, Callable[[Tensor, Tensor, Tensor, Tensor, int, AttentionVariant], Tensor]] = {
    "fa4": _fa4,
    "fa3": _fa3,
    "fa2": _fa2,
    "varlen": _varlen,
}
_MODULES = {"fa4": "flash_attn.cute.interface", "fa3": "flash_attn_interface", "fa2": "flash_attn.flash_attn_interface"}
EXTRAS = {"fa4": "hopper", "fa2": "flash"}
"""The extras of pyproject.toml that install a kernel. FA3 is not on the package index."""


class Obstacle(NamedTuple):
    """Why a kernel can't run: this GPU, dtype or head size; a missing package, a broken one; or a missing feature."""

    kind: Literal["here", "missing", "broken", "feature"]
    text: str
    """A clause for an error or a log line."""


def _known(function: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that this release of `function` accepts."""
    parameters = inspect.signature(function).parameters
    return {key: value for key, value in arguments.items() if key in parameters}


def obstacle(
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    head_size: int,
    deterministic: bool,
    features: tuple[str, ...],
) -> Obstacle | None:
    """Why one of KERNELS can't run; None if it can. A package is imported only if it could be chosen."""
    text = _obstacle_here(name, device, dtype, head_size)
    if text is not None:
        return Obstacle("here", text)
    lacks = lacking(name, features)
    if lacks is not None:
        return Obstacle("feature", lacks)
    if name == "varlen":
        if not VARLEN_ARGUMENTS:
            return Obstacle("missing", "this torch has no torch.nn.attention.varlen")
        lacks = lacking(name, features, VARLEN_ARGUMENTS)
        return None if lacks is None else Obstacle("feature", lacks)
    try:
        module = importlib.import_module(_MODULES[name])
    except Exception as error:  # a broken build of an optional package must not rule out the others; the log shows it
        if isinstance(error, ModuleNotFoundError) and f"{_MODULES[name]}.".startswith(f"{error.name}."):
            extra = f' (the extra "{EXTRAS[name]}", docs/install.md)' if name in EXTRAS else ""
            return Obstacle("missing", f"{_MODULES[name]} is not installed{extra}")
        reason = f"{type(error).__name__}: {first_line(error)[:200]}"
        return Obstacle("broken", f"it is installed but does not import ({reason})")
    functions = ("_flash_attn_fwd", "_flash_attn_bwd") if name == "fa4" else ("flash_attn_varlen_func",)
    absent = [function for function in functions if not hasattr(module, function)]
    if absent:
        return Obstacle("broken", f"this release has no {absent[0]}")
    parameters = [set(inspect.signature(getattr(module, function)).parameters) for function in functions]
    if name == "fa4" and deterministic and "deterministic" not in parameters[1]:
        return Obstacle("feature", "this release has no deterministic backward")
    lacks = lacking(name, features, set.intersection(*parameters))
    return None if lacks is None else Obstacle("feature", lacks)


def _obstacle_here(name: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA, the device is {device.type}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it needs bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    largest = 128 if name == "fa4" else 256
    if head_size % 8 or head_size > largest:
        return f"head_size {head_size} is not a multiple of 8 up to {largest}"
    major, minor = torch.cuda.get_device_capability(device)
    supported = {"fa4": major in (9, 10), "fa3": major == 9}.get(name, major >= 8)
    return None if supported else f"it doesn't support compute capability {major}.{minor}"
