"""Linear layers that multiply in float8 during training: one scale for each whole tensor, computed anew each time.

The recipe is torchao's "tensorwise": input and weight as e4m3, the output's gradient as e5m2 (Micikevicius et al. 2022,
arXiv 2209.05433), sums in float32. Weights and their gradients stay in full precision, so that checkpoints and the
optimizer know nothing of it. docs/decisions/0010-float8-without-torchao.md says why it is written here.

Dimensions: N tokens, K input and M output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_model.linear import CustomLinear, replace_linears

ALIGNMENT = 16  # the matrix multiplies read 16 bytes at a time
_SMALLEST = 1e-12  # of the largest magnitudes: keeps the scale of an all-zero tensor finite


class Float8Linear(CustomLinear):
    """y = x W^T + b, with the three matrix multiplies of forward and backward in float8.

    Outside training (validation, generation) it is an ordinary linear layer: the scale of a whole batch would make a
    text's score depend on the other texts in it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., M) in the precision of autocast, or that of x."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        return self.multiply(x.to(dtype), _Float8Product.apply)


class _Float8Product(torch.autograd.Function):
    """x (N, K) and weight (M, K) -> x weight^T (N, M), in the precision of x; the weight's gradient in the weight's.

    On Hopper a float8 multiply reads its first operand by rows and its second by columns, so that the backward needs
    transposed copies; compiled, they are written by the same kernels as the casts.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x_scale, w_scale = scale_of(x, torch.float8_e4m3fn), scale_of(weight, torch.float8_e4m3fn)
        x8 = cast(x, x_scale, torch.float8_e4m3fn)
        w8 = cast(weight, w_scale, torch.float8_e4m3fn)
        ctx.save_for_backward(x8, x_scale, weight, w_scale)
        ctx.dtype = x.dtype
        return _multiply(x8, x_scale, w8.t(), w_scale, x.dtype, fast=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x8, x_scale, weight, w_scale = ctx.saved_tensors
        grad_scale = scale_of(grad, torch.float8_e5m2)
        grad8 = cast(grad, grad_scale, torch.float8_e5m2)  # (N, M)
        # Cast again: a copy kept from the forward would take a byte for each parameter.
        w8 = cast(weight, w_scale, torch.float8_e4m3fn).t().contiguous().t()  # (M, K) by columns
        of_x = _multiply(grad8, grad_scale, w8, w_scale, ctx.dtype)
        by_columns = x8.t().contiguous().t()  # (N, K)
        of_weight = _multiply(grad8.t().contiguous(), grad_scale, by_columns, x_scale, weight.dtype)
        return of_x, of_weight


def scale_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The factor that takes the largest magnitude of x to the largest number of `dtype`, a float32 scalar.

    With a non-finite value in x the product is non-finite too, so that the step is skipped.
    """
    largest = x.detach().abs().amax().float()
    # `where`, not `clamp`: Triton miscompiles a minimum or maximum beside a transposed float8 store
    # (triton-lang/triton issue 11111).
    return torch.finfo(dtype).max / torch.where(largest < _SMALLEST, _SMALLEST, largest)


def cast(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x times scale, rounded to float8. Nothing overflows: the maximum times its scale rounds to the largest number."""
    return (x.detach().float() * scale).to(dtype)


def _multiply(
    a: Tensor, a_scale: Tensor, b: Tensor, b_scale: Tensor, dtype: torch.dtype, *, fast: bool = False
) -> Tensor:
    """a (by rows) times b (by columns). `fast` sums in fewer bits, which suffices for the output (as in torchao)."""
    y: Tensor = torch._scaled_mm(
        a, b, scale_a=a_scale.reciprocal(), scale_b=b_scale.reciprocal(), out_dtype=dtype, use_fast_accum=fast
    )
    return y


def use_float8(blocks: Sequence[nn.Module], keep_ends: bool = False) -> int:
    """Turn the blocks' linear layers whose sizes are multiples of 16 into Float8Linear, in place; returns their number.

    With `keep_ends` not those of the first and the last block.
    """
    return replace_linears(blocks[1:-1] if keep_ends else blocks, Float8Linear, _fits)


def _fits(layer: nn.Linear) -> bool:
    return layer.in_features % ALIGNMENT == 0 and layer.out_features % ALIGNMENT == 0
