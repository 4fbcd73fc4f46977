"""Logs per-layer norms of gradients, activations and updates at log steps (--log.layers) to RUN/layers.csv.

Layers are the blocks, numbered from 0, and the modules around them (wte, wpe, ln_f, lm_head).

- gradient_norm: 2-norm of the gradients of the layer's parameters, over all ranks, before clipping.
- activation_rms: root mean square of a block's output (the residual stream), over all slots of the step's rows.
- update_norm: 2-norm of the step's change of the layer's parameters; 0 for a skipped step.

No host sync before `read`. The update norm costs a copy of this rank's weights during the step.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_model.device import sums_device, to_float64
from lit_model.model import GPT
from pretrain.optim import by_layout, sum_of_squares

MEASURES = ("gradient_norm", "activation_rms", "update_norm")


def layer_of(parameter: str) -> str:
    """transformer.h.3.attn.weight -> 3; transformer.wte.weight -> wte; lm_head.bias -> lm_head."""
    parts = parameter.removeprefix("transformer.").split(".")
    return parts[1] if parts[0] == "h" else parts[0]


class LayerNorms:
    """Measures one step: call `begin` before the first forward, then the other methods in order, on every rank.

    Args:
        parameters: the model's, by name; DTensors if sharded.
    """

    def __init__(self, model: GPT, parameters: dict[str, nn.Parameter], device: torch.device) -> None:
        self.model, self.device = model, sums_device(device)
        self.layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            self.layers.setdefault(layer_of(name), []).append(parameter)
        self.blocks = [name for name in self.layers if name.isdigit()]
        self.columns = [f"{m}_{n}" for m in MEASURES for n in (self.blocks if m == "activation_rms" else self.layers)]
        self._squares = torch.zeros(0)
        self._n_values = 0
        self._before: list[list[Tensor]] = []
        self._values: list[Tensor] = []

    def begin(self) -> None:
        self._squares = torch.zeros(len(self.blocks), dtype=torch.float64, device=self.device)
        self._n_values = 0
        self.model.observe = self._observe

    def _observe(self, block: int, x: Tensor) -> None:
        self._squares[block] += to_float64(torch.linalg.vector_norm(x.detach(), dtype=torch.float32)).square()
        self._n_values += x.numel() if block == 0 else 0

    @torch.no_grad()
    def gradients(self, scale: Tensor | None) -> None:
        """Measure the gradients, after the last backward. `scale`: the loss scale they were multiplied by."""
        self.model.observe = None
        world_size = dist.get_world_size() if dist.is_initialized() else 1
        if world_size > 1:
            dist.all_reduce(self._squares)
        norms = self._norms([[p.grad for p in layer if p.grad is not None] for layer in self.layers.values()])
        rms = (self._squares / (self._n_values * world_size)).sqrt()
        self._values = [norms if scale is None else norms / to_float64(scale), rms]

    @torch.no_grad()
    def before_update(self) -> None:
        self._before = [[p.detach().clone() for p in layer] for layer in self.layers.values()]

    @torch.no_grad()
    def after_update(self) -> None:
        for layer, before in zip(self.layers.values(), self._before, strict=True):
            for parameter, old in zip(layer, before, strict=True):
                old.sub_(parameter.detach())
        self._values.append(self._norms(self._before))
        self._before = []

    def read(self) -> dict[str, float]:
        """The values, keyed by `columns`. Waits for the device."""
        return dict(zip(self.columns, torch.cat(self._values).tolist(), strict=True))

    def _norms(self, layers: list[list[Tensor]]) -> Tensor:
        """float64 [layers]: 2-norms of the full (unsharded) tensors, on the device; the same on every rank."""
        sums = []
        for tensors in layers:
            squares = [to_float64(sum_of_squares(layout, shards)) for layout, shards in by_layout(tensors).items()]
            sums.append(torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64))
        return torch.stack([s.to(self.device) for s in sums]).sqrt()
