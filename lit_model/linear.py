"""Replacements for the blocks' nn.Linear with another matrix product.

Dimensions: N tokens, K input and M output features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Self

import torch
from torch import Tensor, nn

from lit_model.attention import Attention
from lit_model.mlp import MLP, GatedMLP


class CustomLinear(nn.Linear):
    """y = x W^T + b with the parameters and names of nn.Linear; subclasses define the product."""

    @classmethod
    def of(cls, linear: nn.Linear) -> Self:
        """A layer with the parameters of `linear`, not copies."""
        with torch.device("meta"):
            made = cls(linear.in_features, linear.out_features, bias=False)
        made.weight, made.bias = linear.weight, linear.bias
        return made

    def multiply(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """x (..., K) -> (..., M), given a product of (N, K) and the weight (M, K) -> (N, M)."""
        y = product(x.reshape(-1, self.in_features), self.weight)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)


def replace_linears(
    blocks: Iterable[nn.Module], kind: type[CustomLinear], fits: Callable[[nn.Linear], bool] = lambda linear: True
) -> int:
    """Turn the linear layers of attention and MLP that `fits` accepts into `kind`, in place; returns their number.

    Parameters keep their names and order. Routers and routed experts stay as they are.
    """
    n = 0
    for block in blocks:
        for part in block.modules():
            if isinstance(part, (Attention, GatedMLP, MLP)):
                for name, layer in list(part.named_children()):
                    if type(layer) is nn.Linear and fits(layer):
                        setattr(part, name, kind.of(layer))
                        n += 1
    return n
