"""Muon (Jordan et al. 2024) for the matrices inside the blocks, AdamW for all other parameters.

The update of a matrix is its momentum, orthogonalized by Newton-Schulz iterations. That needs the matrix whole: where
FSDP2 shards it by rows, one rank gathers the rows, orthogonalizes, and sends each rank its rows back, so that every
matrix is orthogonalized once. Experts are sharded by whole matrices and stay where they are.

Dimensions: m rows and n columns of a logical matrix (fused and stacked ones hold several, lit_model/matrices.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_model.config import ModelConfig
from lit_model.device import to_float64
from lit_model.dtensor import local, shard_group
from lit_model.matrices import hidden_matrices
from pretrain.args import OptimArgs
from pretrain.optim import AdamW, Optimizer, scale_gradients

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, steepest at 0
ITERATIONS = 5
MATCH_ADAMW_RMS = 0.2  # root mean square of AdamW's updates (Liu et al. 2025, section 2.2)
BATCH_ELEMENTS = 1 << 27  # orthogonalized at once; 256 MB in bf16, and the iteration holds a few of them


class Muon(Optimizer):
    """Muon with Nesterov momentum and decoupled weight decay, as torch.optim.Muon with adjust_lr_fn="match_rms_adamw".

    The update has the root mean square of AdamW's, so both kinds of parameters share learning rate and weight decay
    (Liu et al. 2025, "Muon is scalable for LLM training", eq. 4).

    Attributes:
        state: {"momentum_buffer": Tensor} of each matrix, fp32, sharded like it; of other parameters as in AdamW.
        dtype: of the iteration: bf16 on CUDA; fp32 elsewhere (a CPU without bf16 units multiplies bf16 far slower).
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], args: OptimArgs, config: ModelConfig) -> None:
        super().__init__(parameters, args)
        self.rows = hidden_matrices(config)
        self.matrices = {name: p for name, p in self.parameters.items() if name in self.rows}
        self.adamw = AdamW(((name, p) for name, p in self.parameters.items() if name not in self.rows), args)
        self.state = {
            name: {"momentum_buffer": torch.zeros_like(p)} if name in self.rows else self.adamw.state[name]
            for name, p in self.parameters.items()
        }
        self.step_count = self.adamw.step_count
        self.dtype = torch.bfloat16 if self.step_count.is_cuda else torch.float32
        self._batches = list(self._in_batches())

    @torch.no_grad()
    def step(self, lr: float, skip: Tensor | None = None, coefficient: Tensor | None = None) -> None:
        """As `AdamW.step`. The matrices' gradients are always multiplied by the coefficient first."""
        self.adamw.step(lr, skip, coefficient)
        keep = torch.ones_like(self.step_count) if skip is None else 1 - skip
        decay = (1 - lr * self.args.weight_decay * to_float64(keep)).float()
        if coefficient is not None:
            scale_gradients(self.matrices.values(), coefficient)
        for names in self._batches:
            updates = self._orthogonalized(names, [self._momentum(name, keep) for name in names])
            for name, update in zip(names, updates, strict=True):
                p = self.matrices[name]
                local(p).mul_(decay).addcmul_(update, keep, value=-lr * update_scale(self.rows[name], p.shape[-1]))

    def _momentum(self, name: str, keep: Tensor) -> Tensor:
        """Add a gradient to the momentum. Returns this rank's shard of the Nesterov update, in `dtype`.

        For a skipped step (`keep` 0) the momentum stays, and the update is finite. Overwrites the gradient.
        """
        momentum, grad = local(self.state[name]["momentum_buffer"]), self.matrices[name].grad
        assert grad is not None, f"{name} has no gradient"
        grad = local(grad).masked_fill_(keep == 0, 0.0)
        momentum.lerp_(grad, (1 - self.args.momentum) * keep)
        return grad.lerp_(momentum, self.args.momentum).to(self.dtype)

    def _in_batches(self) -> Iterator[list[str]]:
        """Names of matrices that are orthogonalized together: alike in shape; of sharded ones at most one a rank."""
        alike: dict[tuple[object, ...], list[str]] = {}
        for name, p in self.matrices.items():
            if local(p).numel() or self._shard_group(name) is not None:
                alike.setdefault((p.shape, self.rows[name]), []).append(name)
        for names in alike.values():
            group = self._shard_group(names[0])
            n_local = local(self.matrices[names[0]]).numel()
            size = max(1, BATCH_ELEMENTS // n_local) if group is None else group.size()
            yield from (names[i : i + size] for i in range(0, len(names), size))

    def _shard_group(self, name: str) -> dist.ProcessGroup | None:
        """The ranks that hold a matrix's rows; None if this rank's part consists of whole matrices."""
        p = self.matrices[name]
        return shard_group(p) if p.dim() == 2 else None  # FSDP2 shards the first dimension: experts, not their rows

    def _orthogonalized(self, names: Sequence[str], updates: list[Tensor]) -> Sequence[Tensor]:
        """This rank's shards of updates, of matrices of one shape -> the shards of the orthogonalized updates."""
        rows, group = self.rows[names[0]], self._shard_group(names[0])
        if group is None:
            return orthogonalize(torch.stack(updates), rows).unbind()
        shape = self.matrices[names[0]].shape
        return across_ranks(updates, shape, group, lambda whole: orthogonalize(whole, rows))


def across_ranks(
    shards: list[Tensor], shape: torch.Size, group: dist.ProcessGroup, work: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Apply `work` to whole matrices of one shape, the i-th on rank i, given and returning this rank's rows of each.

    Two all-to-all exchanges, so that each rank sends and receives no more than its shards and its matrix. FSDP2's
    sharding: torch.chunk of the rows.
    """
    world_size, rank, n_owners = group.size(), group.rank(), len(shards)
    chunk = -(-shape[0] // world_size)
    sizes = [shape[1] * min(max(shape[0] - r * chunk, 0), chunk) for r in range(world_size)]
    outgoing = [sizes[rank] if r < n_owners else 0 for r in range(world_size)]
    incoming = sizes if rank < n_owners else [0] * world_size

    received = shards[0].new_empty(sum(incoming))
    dist.all_to_all_single(received, torch.stack(shards).flatten(), incoming, outgoing, group=group)
    whole = work(received.view(shape)).flatten() if rank < n_owners else received
    returned = shards[0].new_empty(sum(outgoing))
    dist.all_to_all_single(returned, whole, outgoing, incoming, group=group)
    return list(returned.view(n_owners, *shards[0].shape).unbind())


def update_scale(rows: tuple[int, ...], n_columns: int) -> float:
    """Factor that gives an orthogonalized update AdamW's root mean square: 0.2 sqrt(max(m, n)).

    Of a parameter that holds several matrices: the largest of theirs; `orthogonalize` corrects for the others.
    """
    return MATCH_ADAMW_RMS * math.sqrt(max(*rows, n_columns))


def orthogonalize(x: Tensor, rows: tuple[int, ...]) -> Tensor:
    """[..., sum(rows), n]: orthogonalize each matrix of a stack along the rows; the same shape and dtype.

    Matrices for which `update_scale` is smaller than for the largest are scaled down by the ratio.
    """
    parts = []
    for matrix in x.split(rows, dim=-2):
        ratio = update_scale((matrix.shape[-2],), x.shape[-1]) / update_scale(rows, x.shape[-1])
        parts.append(newton_schulz(matrix) if ratio == 1 else newton_schulz(matrix) * ratio)
    return torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]


def newton_schulz(x: Tensor) -> Tensor:
    """[..., m, n] -> about U V^T, where U S V^T is the singular value decomposition of x; in the dtype of x.

    The singular values end up between about 0.7 and 1.2, which serves as well as 1 (Jordan et al. 2024). Per matrix
    of m <= n: 5 (4 m^2 n + 2 m^3) FLOPs.
    """
    a, b, c = COEFFICIENTS
    wide = x if x.shape[-2] <= x.shape[-1] else x.mT
    norm = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    y = (wide / norm.clamp(min=1e-7)).reshape(-1, *wide.shape[-2:])
    for _ in range(ITERATIONS):
        gram = y @ y.mT
        y = torch.baddbmm(y, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    orthogonal: Tensor = y.view(wide.shape)
    return orthogonal if wide is x else orthogonal.mT
