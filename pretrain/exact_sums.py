"""Gradients that do not depend on how many devices computed them, for --train.topology_invariant.

A floating-point sum depends on the order of its terms because each addition rounds. None rounds where all terms are
multiples of one power of two (the grid) and no partial sum needs more than 53 bits: float64 then adds them exactly, in
any order (the idea of Demmel and Nguyen 2013, "Fast reproducible floating-point summation"). So

- the unit of work is a micro-batch, a *leaf*: leaf k of a step holds the rows from k * micro_batch_samples on,
  whichever rank computes it, and one leaf's gradient has the same bits on each;
- each leaf's gradient is rounded to the grid, and summed in float64 over micro-batches and ranks;
- the grid follows from the largest element of the previous step's leaf gradients, which all ranks know and checkpoints
  keep. A step whose largest element is more than 2^HEADROOM_BITS times that, or less than 2^-FALL_BITS of it, is
  computed once more, with a grid that fits.

Everything after the sum is elementwise, except the gradient norm (`norm_by_rows`). More: docs/reproducibility.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lit_model.device import to_float64
from lit_model.dtensor import is_dtensor, local, shard_group
from lit_model.moe import RouterStatistics

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

MANTISSA_BITS = 52
HEADROOM_BITS = 6
"""An element of a leaf's gradient may be 2^6 times the largest of the step before, else the step is repeated."""
FALL_BITS = 12
"""The largest element of a step may be 2^-12 of that of the step before, else the grid would be too coarse for it."""
FIRST_PEAK = 1.0
"""Stands for the largest element before the first step."""
SMALLEST_EXPONENT, LARGEST_EXPONENT = -126, 126  # of the grid: it and its reciprocal are normal float32 numbers
LOSS_GRID = 2.0**-20
"""Of summed losses in nats: sums up to 2^32 nats are exact, which is more than any step has."""
SLICE = 1 << 25
"""Elements reduced over the ranks, or squared, at once; 256 MB of float64."""


def grid_exponent(peak: float, n_leaves: int) -> int:
    """The grid's exponent for leaf gradients whose elements are at most 2^HEADROOM_BITS times `peak`.

    The sum of `n_leaves` multiples of 2^e that are at most 2^b each is exact if b + log2(n_leaves) - e <= 52.
    """
    largest = math.frexp(peak)[1] + HEADROOM_BITS
    exponent = largest + (n_leaves - 1).bit_length() - MANTISSA_BITS
    return min(max(exponent, SMALLEST_EXPONENT), LARGEST_EXPONENT)


def round_to_grid(x: Tensor, exponent: int) -> Tensor:
    """The nearest multiples of 2^exponent, ties to even, in x's dtype; exact for float32 and float64.

    Rounding to a multiple of a power of two only removes low bits of the mantissa, so that the result needs no wider
    type. Not finite where x is not, or where x / 2^exponent overflows.
    """
    return x.mul(2.0**-exponent).round_().mul_(2.0**exponent)


class ExactSums:
    """Sums the gradients of a step's leaves exactly.

    For each step: `begin`, then for each micro-batch `begin_leaf` and a backward, then `finish`; if that returns False,
    all of it again. Gradients are then in `grad` of the parameters, as float32. `keep_peak` ends the step.

    Args:
        model: whose parameters have their final form; sharded by FSDP2 or not.
        parameters: of the model, in the same order on all ranks.
        device: that computes the gradients.

    Attributes:
        peak: the largest element of the previous step's leaf gradients; a checkpoint keeps it.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[nn.Parameter], device: torch.device) -> None:
        self.parameters, self.device = list(parameters), device
        self.peak = FIRST_PEAK
        self._assumed: float | None = None  # the peak of this step, if `peak` did not fit it
        self._found = FIRST_PEAK
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self.sharded = is_dtensor(self.parameters[0])
        self._exponent, self._limit = 0, 0.0
        self._seen = torch.zeros((), device=self.device)  # the largest element of this rank's leaves
        self._totals: list[Tensor] = []
        if self.sharded:
            self._hook_into_fsdp(model)
        else:
            self._hook_into_parameters()

    def begin(self, n_leaves: int) -> None:
        """Begin a step of `n_leaves` leaves over all ranks, or repeat it."""
        peak = self.peak if self._assumed is None else self._assumed
        self._exponent = grid_exponent(peak, n_leaves)
        self._limit = 2.0 ** (math.frexp(peak)[1] + HEADROOM_BITS)
        self._seen.zero_()
        for total in self._totals:
            total.zero_()

    def begin_leaf(self) -> None:
        """FSDP adds to gradients in float32: there must be none when it hands over a leaf's."""
        for p in self.parameters:
            p.grad = None

    def finish(self) -> bool:
        """Add up over the ranks. False if the grid did not fit: the step must be computed again, with the grid that
        the next `begin` chooses. Waits for the device. Gradients that are not finite stay so.
        """
        seen = torch.nan_to_num(self._seen, nan=math.inf, posinf=math.inf)
        if self.world_size > 1:
            dist.all_reduce(seen, op=dist.ReduceOp.MAX)
        peak = seen.item()
        if 0 < peak < math.inf:
            if not self._limit * 2.0 ** -(HEADROOM_BITS + FALL_BITS) <= peak <= self._limit:
                self._assumed = peak
                return False
            self._found = peak
        else:
            self._found = self.peak
        if not self.sharded:
            if self.world_size > 1:
                for part in self._flat.split(SLICE):
                    dist.all_reduce(part)
            for p, total in zip(self.parameters, self._totals, strict=True):
                p.grad = total.to(p.dtype)
        return True

    def keep_peak(self) -> None:
        """Call once the state is no longer that of the step before: until then a checkpoint keeps that step's peak."""
        self.peak, self._assumed = self._found, None

    def _hook_into_parameters(self) -> None:
        """One device, or DDP, whose own reduction is left out: leaves are added to one float64 tensor."""
        self._flat = torch.zeros(sum(p.numel() for p in self.parameters), dtype=torch.float64, device=self.device)
        parts = self._flat.split([p.numel() for p in self.parameters])
        self._totals = [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]
        for p, total in zip(self.parameters, self._totals, strict=True):
            p.register_hook(self._rounded)

            def add(p: Tensor, total: Tensor = total) -> None:
                total.add_(cast(Tensor, p.grad))
                p.grad = None

            p.register_post_accumulate_grad_hook(add)

    def _hook_into_fsdp(self, model: nn.Module) -> None:
        """FSDP2: rounding on the whole parameters, which autograd sees; it then reduces in float64 without dividing
        (`parallelize`); a hook on the reduced shards adds up the leaves and returns the running sum."""
        from torch.distributed.fsdp import FSDPModule

        for module in (cast("FSDPModule", m) for m in model.modules() if isinstance(m, FSDPModule)):
            module.unshard()
            for p in cast(nn.Module, module).parameters():
                if not is_dtensor(p):
                    p.register_hook(self._rounded)
            module.reshard()
            total: list[Tensor] = []

            def add(reduced: Tensor, total: list[Tensor] = total) -> None:
                if reduced.is_cuda:  # FSDP frees it on the stream that allocated it, this hook runs on another
                    reduced.record_stream(torch.cuda.current_stream())
                if not total:
                    total.append(torch.zeros_like(reduced))
                    self._totals.append(total[0])
                reduced.copy_(total[0].add_(reduced))

            module.set_gradient_divide_factor(1.0)
            module.set_all_reduce_hook(add)

    def _rounded(self, grad: Tensor) -> Tensor:
        torch.maximum(self._seen, torch.linalg.vector_norm(grad, math.inf), out=self._seen)
        return round_to_grid(grad, self._exponent)


def summand(value: Tensor, sums: ExactSums | None) -> Tensor:
    """A leaf's share of a sum of losses or counts, as float64: rounded if sums must be exact."""
    value = to_float64(value)
    return value if sums is None else (value / LOSS_GRID).round() * LOSS_GRID


def summands(router: RouterStatistics, sums: ExactSums | None) -> RouterStatistics:
    """A leaf's router statistics, likewise; as they are without exact sums."""
    return router if sums is None else RouterStatistics(*(summand(value, sums) for value in router))


@torch.no_grad()
def norm_by_rows(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Global 2-norm of the gradients, float32, the same bits however they are sharded along the first dimension.

    The squares of each row (of a vector: each element) are added in float64 by halves, with elementwise additions, so
    that no kernel chooses their order; then the rows' sums of all parameters, likewise.
    """
    parameters = list(parameters)
    n_rows = [p.numel() // row_length(p) for p in parameters]
    grads = [local(cast(Tensor, p.grad)) for p in parameters]
    rows = torch.zeros(sum(n_rows), dtype=torch.float64, device=grads[0].device)
    for p, grad, mine in zip(parameters, grads, rows.split(n_rows), strict=True):
        flat = grad.reshape(-1, row_length(p))
        first = first_row(p)
        for start in range(0, len(flat), step := max(1, SLICE // row_length(p))):
            part = flat[start : start + step].double().square_()
            mine[first + start : first + start + len(part)] = sum_by_halves(part)
    group = shard_group(parameters[0])
    if group is not None:
        dist.all_reduce(rows, group=group)
    return sum_by_halves(rows[None])[0].sqrt().float()


def row_length(p: Tensor) -> int:
    return p.shape[-1] if p.dim() > 1 else 1


def first_row(p: Tensor) -> int:
    """The first of this rank's rows of a parameter. FSDP2 cuts the first dimension as torch.chunk does."""
    group = shard_group(p)
    if group is None:
        return 0
    chunk = -(-p.shape[0] // group.size())
    return min(chunk * group.rank(), p.shape[0]) * (p.numel() // p.shape[0] // row_length(p))


def sum_by_halves(x: Tensor) -> Tensor:
    """[n, m] -> [n]: each row's sum, adding its second half to its first until one column is left. Overwrites x."""
    while (m := x.shape[1]) > 1:
        half = -(-m // 2)
        x[:, : m - half] += x[:, half:]
        x = x[:, :half]
    return x[:, 0]
