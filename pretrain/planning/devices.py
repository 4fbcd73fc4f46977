"""The devices that a run can be planned for, and how fast they were or are expected to be."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from pretrain.logs.throughput import PEAK_FLOPS

MEASURED = ((124_766_976, 0.390), (1_100_310_528, 0.529))
"""(parameters, MFU with attention in full) of compiled bf16 steps on one H100 (docs/performance.md)."""
MEASURED_ON = ("h100", "h200")
NOT_COMPILED = 1 / 1.2
CPU_SHARE = (0.5, 0.7, 0.77)
"""Of the rate of a matrix multiply, low, likely and high: what steps reached on two cores (docs/performance.md)."""
HALF_WIDTHS = (64, 32, 0)
"""Widths at which a CPU reaches half of each share: in narrow models everything beside the products weighs more."""


@dataclass(frozen=True)
class Device:
    """One device.

    Attributes:
        kind: cuda or cpu.
        flops: dense FLOP/s of matrix multiplies in bf16, from the vendor's data sheet; of a CPU measured in fp32.
        flops_fp32: in fp32 without TF32, likewise.
        memory: bytes that a process can use.
        watts: of the board, at its limit; None: unknown.
    """

    name: str
    kind: str
    flops: float
    flops_fp32: float
    memory: int
    watts: float | None


def _gpu(name: str, peak: str, fp32: float, gib: float, watts: float) -> Device:
    return Device(name, "cuda", PEAK_FLOPS[peak], fp32, int(gib * 2**30), watts)


GPUS = {
    "h100": _gpu("NVIDIA H100 SXM 80GB", "H100", 67e12, 79.1, 700),
    "h200": _gpu("NVIDIA H200", "H200", 67e12, 139.8, 700),
    "a100": _gpu("NVIDIA A100 SXM 80GB", "A100", 19.5e12, 79.1, 400),
    "b200": _gpu("NVIDIA B200", "B200", 75e12, 178.0, 1000),
    "rtx4090": _gpu("NVIDIA RTX 4090", "RTX 4090", 82.6e12, 23.5, 450),
}


def this_cpu(memory: int, processes: float) -> Device:
    """One of some processes that share this machine's CPU, each with `memory` bytes; times products of 512 x 512."""
    n, seconds = 512, []
    a = torch.full((n, n), 0.5)  # not random: the run's generator stays as it is
    for _ in range(12):
        begin = time.perf_counter()
        a @ a
        seconds.append(time.perf_counter() - begin)
    flops = 2 * n**3 / min(seconds) / processes
    return Device(f"this CPU, {torch.get_num_threads()} threads", "cpu", flops, flops, memory, None)


@dataclass(frozen=True)
class Range:
    """A likely value, and the bounds of its uncertainty."""

    low: float
    likely: float
    high: float

    def times(self, low: float, likely: float, high: float) -> Range:
        return Range(self.low * low, self.likely * likely, self.high * high)

    def time_for(self, amount: float) -> Range:
        """The time that an amount takes at this rate; `low` is the shortest."""
        return Range(amount / self.high, amount / self.likely, amount / self.low)


def cpu_flops_per_second(device: Device, width: int, recompute: float) -> Range:
    """FLOP/s that a step of a model of this width is expected to reach on a CPU; `recompute`: see below."""
    shares = (share * width / (width + half) for share, half in zip(CPU_SHARE, HALF_WIDTHS, strict=True))
    return Range(*(share * device.flops * recompute for share in shares))


def flops_per_second(
    name: str,
    device: Device,
    parameters: int,
    precision: str,
    *,
    compiled: bool,
    recompute: float,
    devices: int,
    nodes: int,
) -> Range:
    """FLOP/s that a step is expected to reach on one GPU, in the convention of `flops_per_token`.

    The MFU of the measured steps, interpolated over the logarithm of the model's size and not extrapolated,
    times the device's peak. The bounds are 10 % on the kind of card that was measured, 30 % on others, and wider for
    what was not measured: several devices, fp32, no compilation. `recompute`: speed with activation checkpointing over
    that without.
    """
    (small, slow), (large, fast) = MEASURED
    position = (math.log(parameters) - math.log(small)) / (math.log(large) - math.log(small))
    mfu = slow + (fast - slow) * min(max(position, 0.0), 1.0)
    peak = device.flops_fp32 if precision == "fp32" else device.flops
    spread = 0.1 if name in MEASURED_ON else 0.3
    found = Range(1 - spread, 1.0, 1 + spread).times(*[mfu * peak * recompute] * 3)
    if not compiled:
        found = found.times(0.8 * NOT_COMPILED, NOT_COMPILED, 1.0)
    if precision == "fp32":
        found = found.times(0.8, 1.2, 1.6)  # the measured share is of bf16's peak; multiplies take a larger share here
    if devices > 1:
        found = found.times(0.85, 0.95, 1.0)
    if nodes > 1:
        found = found.times(0.7, 0.9, 1.0)
    return found
