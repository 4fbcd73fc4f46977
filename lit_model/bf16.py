"""bf16 on CPUs without instructions for it, where PyTorch multiplies bf16 matrices 5 to 80 times slower than float32.

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

from lit_model.attention import Attention
from lit_model.kernels import cpu
from lit_model.mlp import MLP, GatedMLP


class Float32ProductLinear(nn.Linear):
    """y = x W^T + b in bf16, with the three matrix multiplies of forward and backward in float32."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Float32ProductLinear:
        """A layer with the parameters of `linear`, not copies."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False)
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., M), bf16."""
        flat = x.to(torch.bfloat16).reshape(-1, self.in_features)  # (N, K)
        y: Tensor = _Float32Product.apply(flat, self.weight)  # type: ignore[no-untyped-call]  # (N, M)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


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


def use_float32_products(blocks: Iterable[nn.Module]) -> None:
    """Turn the linear layers of attention and MLP into Float32ProductLinear, in place, if this CPU lacks bf16.

    Parameters keep their names and order. Routers and routed experts stay as they are.
    """
    if cpu.HAS_BF16:
        return
    for block in blocks:
        for part in block.modules():
            if isinstance(part, (Attention, GatedMLP, MLP)):
                for name, layer in list(part.named_children()):
                    if type(layer) is nn.Linear:
                        setattr(part, name, Float32ProductLinear.of(layer))
