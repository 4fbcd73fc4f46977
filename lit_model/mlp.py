"""The gated feed-forward part of a block.

Dimensions: ... any leading, C n_embd, F intermediate_size.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.config import ModelConfig


class SwiGLU(nn.Module):
    """proj(silu(fc_1(x)) * fc_2(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.fc_2 = nn.Linear(config.n_embd, config.intermediate_size, bias=config.mlp_bias)
        self.proj = nn.Linear(config.intermediate_size, config.n_embd, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        y: Tensor = self.proj(F.silu(self.fc_1(x)) * self.fc_2(x))
        return y
