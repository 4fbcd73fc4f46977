"""The feed-forward part of a block, gated or plain.

Dimensions: ... any leading, C n_embd, F the inner width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.config import ModelConfig

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """The elementwise function that `ModelConfig.activation` names."""
    return _ACTIVATIONS[name]


class GatedMLP(nn.Module):
    """proj(act(fc_1(x)) * fc_2(x)): SwiGLU and GeGLU (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.activation = activation(config.activation)
        self.fc_1 = nn.Linear(config.n_embd, intermediate_size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y: Tensor = self.proj(self.activation(self.fc_1(x)) * self.fc_2(x))
        return y


class MLP(nn.Module):
    """proj(act(fc(x))) (Vaswani et al., 2017)."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.activation = activation(config.activation)
        self.fc = nn.Linear(config.n_embd, intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y: Tensor = self.proj(self.activation(self.fc(x)))
        return y
