"""bf16 on CPUs without instructions for it, where PyTorch's own bf16 products are many times slower than float32.

There the products are computed in float32, from operands rounded to bf16, and rounded to bf16: the definition of a bf16
multiply with float32 accumulation. Compiled code may leave out a rounding between two operations that it fuses.

Dimensions: N tokens, K input and M output features.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.kernels import cpu
from lit_model.linear import CustomLinear, replace_linears


class Float32ProductLinear(CustomLinear):
    """y = x W^T + b in bf16, with the three matrix multiplies of forward and backward in float32."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., M), bf16."""
        return self.multiply(x.to(torch.bfloat16), _Float32Product.apply)


class _Float32Product(torch.autograd.Function):
    """x (N, K) bf16 and weight (M, K) -> x weight^T (N, M) bf16; the weight's gradient in the weight's precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        with torch.autocast("cpu", enabled=False):
            return F.linear(x.float(), weight.to(x.dtype).float()).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):  # compiled, a backward is traced under the forward's autocast
            wide = grad.float()  # (N, M)
            of_x = (wide @ weight.to(x.dtype).float()).to(x.dtype)
            of_weight = (wide.t() @ x.float()).to(weight.dtype)
        return of_x, of_weight


def use_float32_products(blocks: Iterable[nn.Module], device: torch.device, dtype: torch.dtype) -> None:
    """Turn the blocks' linear layers into Float32ProductLinear, in place, for bf16 on a CPU without instructions."""
    if device.type == "cpu" and dtype == torch.bfloat16 and not cpu.HAS_BF16:
        replace_linears(blocks, Float32ProductLinear)
