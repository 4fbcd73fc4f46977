"""Operators that torch.compile does not trace into, and whose gradients are operators of ours.

Registered with torch.library's functions and not with its `custom_op`, which imports torch.compile's machinery at the
first call, whether or not anything is compiled.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]


def register_operator(
    name: str, schema: str, function: Operator, fake: Operator, device_types: str = "default"
) -> Operator:
    """Register `llammlein::NAME` and return it. The outputs must not alias the inputs.

    Args:
        schema: types and names of arguments and outputs, "(Tensor x, int n) -> Tensor".
        fake: an uninitialised output for these inputs; it is traced instead of `function`.
        device_types: where `function` runs, "cpu" or "cuda"; default: anywhere.
    """
    qualified = f"llammlein::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.impl(qualified, device_types, function)
    torch.library.register_fake(qualified, fake)
    operator: Operator = getattr(torch.ops.llammlein, name).default
    return operator


def attention_operator(
    name: str,
    options: str,
    forward: Operator,
    backward: Operator,
    *,
    empty_lse: Callable[[Tensor], Tensor] | None = None,
    device_types: str = "default",
) -> Operator:
    """Register `llammlein::NAME` and `llammlein::NAME_backward`, and return the former.

    Args:
        options: the schema of the arguments after q, k and v; the first is cu_seqlens.
        forward: (q, k, v, *options) -> the output, of the shape of q; with `empty_lse` (output, log-sum-exp).
        backward: (grad, q, k, v, *options) -> gradients of q, k and v; with `empty_lse`
            (grad, q, k, v, output, log-sum-exp, *options).
        empty_lse: an uninitialised log-sum-exp for this q; None where the backward recomputes it.
    """
    outputs, kept = ("Tensor", "") if empty_lse is None else ("(Tensor, Tensor)", "Tensor out, Tensor lse, ")
    q_k_v, gradients = "Tensor q, Tensor k, Tensor v, ", "(Tensor, Tensor, Tensor)"

    def fake(q: Tensor, *_: Any) -> Tensor | tuple[Tensor, Tensor]:
        out = q.new_empty(q.shape)
        return out if empty_lse is None else (out, empty_lse(q))

    def fake_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)

    def set_up(ctx: Any, inputs: tuple[Any, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        q, k, v, cu_seqlens, *ctx.options = inputs
        ctx.save_for_backward(q, k, v, *(output if isinstance(output, tuple) else ()), cu_seqlens)

    def differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        gradients = operator_backward(grad, *ctx.saved_tensors, *ctx.options)
        return (*gradients, None, *(None for _ in ctx.options))

    operator = register_operator(name, f"({q_k_v}{options}) -> {outputs}", forward, fake, device_types)
    backward_schema = f"(Tensor grad, {q_k_v}{kept}{options}) -> {gradients}"
    operator_backward = register_operator(f"{name}_backward", backward_schema, backward, fake_backward, device_types)
    torch.library.register_autograd(f"llammlein::{name}", differentiate, setup_context=set_up)
    return operator
