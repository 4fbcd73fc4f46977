"""Attention as an opaque operator: torch.compile does not trace into it, and autograd runs our own backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Operator = Callable[..., Any]


def attention_operator(
    name: str,
    options: str,
    forward: Operator,
    backward: Operator,
    *,
    empty_lse: Callable[[Tensor], Tensor] | None = None,
    device_types: str | None = None,
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

    def register(name: str, function: Operator, schema: str) -> Any:
        return torch.library.custom_op(
            f"llammlein::{name}", function, mutates_args=(), device_types=device_types, schema=schema
        )

    operator = register(name, forward, f"({q_k_v}{options}) -> {outputs}")
    operator_backward = register(f"{name}_backward", backward, f"(Tensor grad, {q_k_v}{kept}{options}) -> {gradients}")

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

    operator.register_fake(fake)
    operator_backward.register_fake(fake_backward)
    operator.register_autograd(differentiate, setup_context=set_up)
    return operator  # type: ignore[no-any-return]
