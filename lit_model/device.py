"""The device of this machine, and sums in float64 for devices that lack it."""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)


def best_kind() -> str:
    """cuda, mps or cpu: the fastest that torch finds here."""
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def sums_device(device: torch.device) -> torch.device:
    """Where sums of a device's values are kept in float64: the device, or the host for one that lacks float64."""
    return torch.device("cpu") if device.type in WITHOUT_FLOAT64 else device


def to_float64(values: Tensor) -> Tensor:
    """The values in float64 on their `sums_device`. Waits for a device without float64."""
    return values.to(sums_device(values.device)).double()
