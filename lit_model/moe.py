"""The mixture-of-experts part of a block, as in Llama 4, and the losses that balance its experts.

Dimensions: ... any leading, N tokens, E experts, k experts of a token, M = N k slots, C n_embd, F width of an expert,
L layers with experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_model.config import ModelConfig
from lit_model.mlp import GatedMLP, activation


class RouterStatistics(NamedTuple):
    """Sums over the counted tokens of one micro-batch: float32 (float64 in a float64 model), with layers (L, ...)."""

    assigned: Tensor
    """(E,): how many slots went to each expert; they add up to k tokens. Not differentiable."""
    probability: Tensor
    """(E,): the sum of softmax(router logits). Differentiable."""
    log_z_squared: Tensor
    """(): the sum of logsumexp(router logits)^2. Differentiable."""
    tokens: Tensor
    """(): how many tokens were counted."""


def stack_statistics(layers: Sequence[RouterStatistics]) -> RouterStatistics:
    """Of each layer -> of all, with a first dimension L."""
    return RouterStatistics(*(torch.stack(values) for values in zip(*layers, strict=True)))


def load_balance_loss(statistics: RouterStatistics) -> Tensor:
    """E * sum_e f_e P_e, a scalar, the mean over the layers; 1 if routing is uniform, E if one expert gets all.

    f is the experts' share of the slots and P the mean of the probabilities (Fedus et al. 2021, Switch Transformers,
    eq. 4 to 6; with k > 1 the shares still add up to 1). A product of two means is not a sum over tokens: the loss of
    several micro-batches or ranks is not that of their tokens together.
    """
    n_expert = statistics.assigned.shape[-1]
    share = statistics.assigned / statistics.assigned.sum(-1, keepdim=True).clamp(min=1)
    probability = statistics.probability / statistics.tokens.unsqueeze(-1).clamp(min=1)
    return n_expert * (share * probability).sum(-1).mean()


def router_z_loss(statistics: RouterStatistics) -> Tensor:
    """Mean over tokens of logsumexp(router logits)^2, a scalar, the mean over the layers (Zoph et al. 2022, ST-MoE, 5).

    It keeps the router's logits small.
    """
    return (statistics.log_z_squared / statistics.tokens.clamp(min=1)).mean()


class Experts(nn.Module):
    """E gated MLPs without biases: down(act(gate(x)) * up(x)); gate_up holds the rows of gate, then those of up."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        n_expert, width = config.n_expert, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(n_expert, 2 * width, config.n_embd))  # (E, 2F, C)
        self.down = nn.Parameter(torch.empty(n_expert, config.n_embd, width))  # (E, C, F)
        for weight in (self.gate_up, self.down):  # as nn.Linear begins
            nn.init.uniform_(weight, -(weight.shape[-1] ** -0.5), weight.shape[-1] ** -0.5)
        self.activation = activation(config.activation)

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x (M, C), sorted by expert, -> (M, C); ends int32 (E,): where the rows of each expert end.

        bf16 on CUDA goes to PyTorch's grouped matrix multiply. On Hopper and newer that reads `ends` on the device and
        loads 16 bytes at a time, which the widths must allow; on older GPUs, and for other types, it reads them on the
        host and loops as we do, but not for every type.
        """
        gate_up, down = self.gate_up.to(x.dtype), self.down.to(x.dtype)
        aligned = all(width % 8 == 0 for width in (*gate_up.shape[1:], *down.shape[1:]))
        if x.is_cuda and x.dtype == torch.bfloat16 and aligned:
            return self.grouped(x, gate_up, down, ends)
        return self.looped(x, gate_up, down, ends)

    def grouped(self, x: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
        """All experts at once, without a sync."""
        gate, up = F.grouped_mm(x, gate_up.transpose(1, 2), offs=ends).chunk(2, dim=-1)  # (M, F) each
        return F.grouped_mm(self.activation(gate) * up, down.transpose(1, 2), offs=ends)

    def looped(self, x: Tensor, gate_up: Tensor, down: Tensor, ends: Tensor) -> Tensor:
        """One expert after the other. Compiled: by a custom operator, since reading the sizes would break the graph."""
        if torch.compiler.is_compiling():
            gate, up = _expert_linear(x, gate_up, ends).chunk(2, dim=-1)
            y: Tensor = _expert_linear(self.activation(gate) * up, down, ends)
            return y
        outputs = []
        # unbind, because its gradient is one stack; that of indexing is a whole (E, 2F, C) for each expert.
        for part, one, other in zip(x.split(_sizes(ends)), gate_up.unbind(), down.unbind(), strict=True):
            gate, up = F.linear(part, one).chunk(2, dim=-1)
            outputs.append(F.linear(self.activation(gate) * up, other))
        return torch.cat(outputs)


def _sizes(ends: Tensor) -> list[int]:
    """Rows of each expert. Sync: on a GPU the host waits here, once a layer."""
    sizes: list[int] = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return sizes


@torch.library.custom_op("llammlein::expert_linear", mutates_args=())
def _expert_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x (M, C), sorted by expert, weight (E, F, C), ends int32 (E,) -> (M, F)."""
    parts = zip(x.split(_sizes(ends)), weight.unbind(), strict=True)
    return torch.cat([F.linear(part, one) for part, one in parts])


@_expert_linear.register_fake
def _(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("llammlein::expert_linear_backward", mutates_args=())
def _expert_linear_backward(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    sizes = _sizes(ends)
    of_x = torch.cat([part @ one for part, one in zip(grad.split(sizes), weight.unbind(), strict=True)])
    of_weight = torch.stack([part.t() @ rows for part, rows in zip(grad.split(sizes), x.split(sizes), strict=True)])
    return of_x, of_weight


@_expert_linear_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _expert_setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _expert_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return (*_expert_linear_backward(grad, *ctx.saved_tensors), None)


_expert_linear.register_autograd(_expert_autograd, setup_context=_expert_setup)


class MoE(nn.Module):
    """Each token goes to the k experts with the largest router logits, and to the shared expert if the layer has one.

    An expert's input is x sigmoid(logit), and the outputs are added (Llama 4; the gate is on the input, and the chosen
    gates are not normed). Only the chosen experts are computed, and no token is dropped.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_expert_per_token = config.n_expert_per_token
        self.router = nn.Linear(config.n_embd, config.n_expert, bias=False)
        self.experts = Experts(config)
        self.shared = GatedMLP(config, config.moe_intermediate_size) if config.shared_expert else None

    def forward(self, x: Tensor, valid: Tensor | None = None) -> tuple[Tensor, RouterStatistics]:
        """x (..., C) -> (..., C) and the router's statistics.

        valid bool (...): the tokens that are counted (padding should not be balanced); None: all. All are computed.
        The router works in float32 also under autocast: a rounded logit may choose another expert.
        """
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        flat = x.reshape(-1, x.shape[-1])  # (N, C)
        with torch.autocast(device, enabled=False):
            exact = torch.promote_types(x.dtype, torch.float32)
            logits = F.linear(flat.to(exact), self.router.weight.to(exact))  # (N, E)
            chosen, experts = logits.topk(self.n_expert_per_token, dim=-1)  # (N, k) each
            statistics = _count(logits, experts, None if valid is None else valid.reshape(-1))
            y = self._route(flat.to(dtype), chosen.sigmoid().to(dtype), experts).view(x.shape)
        if self.shared is not None:
            y = self.shared(x) + y
        return y, statistics

    def _route(self, x: Tensor, gates: Tensor, experts: Tensor) -> Tensor:
        """x (N, C), gates (N, k), experts int64 (N, k) -> (N, C): the sum of the chosen experts' outputs."""
        n_expert = self.router.out_features
        inputs = (x.unsqueeze(1) * gates.unsqueeze(-1)).flatten(0, 1)  # (M, C)
        by_expert, order = experts.flatten().sort(stable=True)  # (M,) each
        numbers = torch.arange(n_expert, device=x.device)
        ends = torch.searchsorted(by_expert, numbers, right=True, out_int32=True)  # (E,)
        outputs = self.experts(inputs.index_select(0, order), ends)  # (M, C)
        y: Tensor = outputs.index_select(0, order.argsort()).view(*experts.shape, -1).sum(1)
        return y


def _count(logits: Tensor, experts: Tensor, valid: Tensor | None) -> RouterStatistics:
    """logits (N, E), experts int64 (N, k), valid bool (N,). No atomics and no sync."""
    assigned = torch.zeros_like(logits).scatter(1, experts, 1.0)  # (N, E)
    log_z = logits.logsumexp(-1)  # (N,)
    counted = torch.ones_like(log_z) if valid is None else valid.to(logits.dtype)  # (N,)
    probability = (logits - log_z.unsqueeze(-1)).exp()  # (N, E)
    return RouterStatistics(
        (assigned * counted.unsqueeze(-1)).sum(0).detach(),
        (probability * counted.unsqueeze(-1)).sum(0),
        (log_z.square() * counted).sum(),
        counted.sum(),
    )
