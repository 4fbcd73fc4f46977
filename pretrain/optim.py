"""AdamW with weight decay on matrices only, gradient norm and clipping on any mesh, step skipping without a host sync.

Everything operates on local tensors (DTensor shards or plain tensors), so the same code serves one device, DDP and
FSDP2.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.adamw import adamw

from lit_model.dtensor import is_dtensor, local
from pretrain.args import OptimArgs

if TYPE_CHECKING:
    from torch.distributed.tensor import Placement


VECTOR = 16  # float32 elements in the widest SIMD vector of a CPU (AVX-512)


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies: yes for matrices, no for norms and biases.

    Matrices are parameters with two or more dimensions: linears, embedding and head, learned positions, routers, and
    stacked expert matrices. For a DTensor the global dimensions count, not those of the shard.
    """
    return parameter.dim() >= 2


class Optimizer(ABC):
    """Updates parameters from their gradients.

    Attributes:
        parameters: by name, in the model's order.
        state: {name: {key: Tensor}}, each tensor shaped and sharded like its parameter, fp32.
        step_count: float32 scalar on the device: updates applied so far, without skipped ones.
    """

    state: dict[str, dict[str, Tensor]]
    step_count: Tensor

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], args: OptimArgs) -> None:
        self.args = args
        self.parameters = dict(parameters)

    @abstractmethod
    def step(self, lr: float, skip: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """Update all parameters from their gradients, or none if `skip` (a float32 scalar on the device) is 1.

        Args:
            coefficient: factor applied to the gradients first (`clip_coefficient`), a float32 scalar on their device.
        """

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for p in self.parameters.values():
            p.grad = None


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019) using torch's fused kernel; its state is "exp_avg" and "exp_avg_sq".

    Attributes:
        scales_in_kernel: whether the fused kernel applies the clip coefficient, without a separate pass over all
            gradients. True on CUDA. On a CPU the gradients are scaled first, so that runs of older versions resume bit
            for bit. The kernel divides by the reciprocal; the results agree up to rounding.

    Args:
        whole_vectors: on a CPU, pad tensors to whole SIMD vectors for the update. The fused kernel updates the
            remaining elements with scalar instructions, which round differently, and sharding changes which remain.
    """

    def __init__(
        self, parameters: Iterable[tuple[str, nn.Parameter]], args: OptimArgs, *, whole_vectors: bool = False
    ) -> None:
        super().__init__(parameters, args)
        self.state = {
            name: {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            for name, p in self.parameters.items()
        }
        device = next(iter(self.parameters.values())).device
        self.step_count = torch.zeros((), dtype=torch.float32, device=device)
        self.scales_in_kernel = device.type == "cuda"
        self.vector = VECTOR if whole_vectors and device.type == "cpu" else 1

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        if skip is not None and skip.device.type == "mps":  # its fused kernel takes neither found_inf nor grad_scale
            if skip.item():
                return
            skip = None
        grad_scale = None
        if coefficient is not None and self.scales_in_kernel:
            grad_scale = coefficient.reciprocal()
        elif coefficient is not None:
            scale_gradients(self.parameters.values(), coefficient)
        for matrices in (True, False):
            names = [n for n, p in self.parameters.items() if decays(p) == matrices and p.grad is not None]
            # Shards of small parameters may be empty on some ranks; the fused kernel rejects those.
            names = [n for n in names if local(self.parameters[n]).numel()]
            if not names:
                continue
            columns = [
                [local(self.parameters[n]) for n in names],
                [local(self.parameters[n].grad) for n in names],  # type: ignore[arg-type]
                [local(self.state[n]["exp_avg"]) for n in names],
                [local(self.state[n]["exp_avg_sq"]) for n in names],
            ]
            padded = [[in_whole_vectors(t, self.vector) for t in tensors] for tensors in columns]
            parameters, gradients, first_moments, second_moments = padded
            adamw(
                parameters,
                gradients,
                first_moments,
                second_moments,
                [],
                [self.step_count.clone() for _ in names],
                fused=True,
                grad_scale=grad_scale,
                found_inf=skip,
                amsgrad=False,
                beta1=self.args.beta1,
                beta2=self.args.beta2,
                lr=lr,
                weight_decay=self.args.weight_decay if matrices else 0.0,
                eps=self.args.eps,
                maximize=False,
            )
            for tensors, others in zip(columns, padded, strict=True):
                for tensor, other in zip(tensors, others, strict=True):
                    if other is not tensor:
                        tensor.copy_(other[: tensor.numel()].view(tensor.shape))
        self.step_count += 1.0 if skip is None else 1.0 - skip


def in_whole_vectors(tensor: Tensor, size: int) -> Tensor:
    """The tensor if its number of elements is a multiple of `size`, else a flat copy with zeros appended."""
    left_over = tensor.numel() % size
    return F.pad(tensor.flatten(), (0, size - left_over)) if left_over else tensor


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], scale: Tensor | None = None) -> Tensor:
    """Global 2-norm of the gradients, a float32 scalar. One pass over them, no host sync.

    Shards are summed over the sharded mesh dimensions; replicas count once, as do plain-tensor gradients, which DDP has
    already made equal on all ranks. A non-finite norm is returned as is, and the caller skips the step. The norm is on
    the gradients' device, which is the host under CPU offload.

    Args:
        scale: loss scale that the gradients were multiplied by.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    assert grads, "gradient_norm needs gradients"
    squares = [sum_of_squares(layout, shards) for layout, shards in by_layout(grads).items()]
    norm = torch.stack(squares).sum().sqrt()
    return norm if scale is None else norm / scale.to(norm.device)


@torch.no_grad()
def clip_coefficient(norm: Tensor, max_norm: float, scale: Tensor | None = None) -> Tensor | None:
    """The factor that limits gradients of global norm `norm` to `max_norm`; a float32 scalar on the norm's device.

    min(1, max_norm / (norm + 1e-6)), as in torch.nn.utils.clip_grad_norm_, divided by the loss scale. None: 1.

    Args:
        max_norm: 0 disables clipping (`scale` still applies).
        scale: loss scale that the gradients were multiplied by.
    """
    if max_norm <= 0 and scale is None:
        return None
    coefficient = torch.ones_like(norm)
    if scale is not None:
        coefficient = coefficient / scale.to(norm.device)
    if max_norm > 0:
        coefficient = coefficient * torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    return coefficient


def scale_gradients(parameters: Iterable[nn.Parameter], coefficient: Tensor) -> None:
    """Multiply all gradients by a scalar on their device, in place."""
    torch._foreach_mul_([local(p.grad) for p in parameters if p.grad is not None], coefficient)


Layout = tuple[DeviceMesh, "tuple[Placement, ...]"] | None
"""How a tensor is distributed over the ranks; None: a plain tensor."""


def by_layout(grads: list[Tensor]) -> dict[Layout, list[Tensor]]:
    """Group local shards by layout, in order of first appearance, which is the same on every rank."""
    groups: dict[Layout, list[Tensor]] = {}
    for g in grads:
        layout = (g.device_mesh, g.placements) if is_dtensor(g) else None
        groups.setdefault(layout, []).append(local(g))
    return groups


def sum_of_squares(layout: Layout, shards: list[Tensor]) -> Tensor:
    """Sum of squares over full tensors of one layout, from this rank's shards; float32 scalar, equal on all ranks."""
    total = torch.stack(torch._foreach_norm(shards, 2.0)).to(torch.float32).square().sum()
    mesh, placements = layout if layout is not None else (None, ())
    for dim, placement in enumerate(placements):
        assert placement.is_shard() or placement.is_replicate(), f"gradients must be reduced before, not {placement}"
        if placement.is_shard():
            assert mesh is not None
            dist.all_reduce(total, group=mesh.get_group(dim))
    return total


@dataclass
class LossScale:
    """Dynamic loss scale for fp16, on the device: halved on an overflow, doubled after `interval` good steps.

    Same rule and constants as torch.amp.GradScaler, which we can't use since it syncs with the host every step.
    """

    scale: Tensor
    good_steps: Tensor
    interval: int = 2000

    @classmethod
    def create(cls, device: torch.device) -> LossScale:
        return cls(
            torch.full((), 65536.0, device=device),
            torch.zeros((), dtype=torch.int32, device=device),
        )

    def update(self, skip: Tensor) -> None:
        """Adjust the scale after a step. `skip`: float scalar, 1 if the gradients were not finite."""
        torch._amp_update_scale_(self.scale, self.good_steps, skip, 2.0, 0.5, self.interval)

    def to_dict(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "good_steps": self.good_steps.item()}

    def load(self, state: dict[str, float]) -> None:
        if not math.isfinite(state["scale"]):
            raise ValueError(f"the checkpoint's loss scale is {state['scale']}")
        self.scale.fill_(state["scale"])
        self.good_steps.fill_(int(state["good_steps"]))
