"""Measures tokens per second, model FLOPs utilisation and peak memory."""

from __future__ import annotations

import time

import torch

from lit_files.platform import peak_resident_bytes
from lit_model.config import ModelConfig
from lit_model.cost import flops_per_token

# Dense bf16 peak FLOP/s of one device, by substring of its name (vendor data sheets).
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100": 989.5e12,
    "GH200": 989.5e12,
    "A100": 312e12,
    "A40": 149.7e12,
    "A10": 125e12,
    "L40S": 362e12,
    "L4": 121e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165.2e12,
}


class Throughput:
    """Tokens per second and model FLOPs utilisation between two log steps."""

    def __init__(self, config: ModelConfig, block_size: int, device: torch.device, world_size: int) -> None:
        self.flops = flops_per_token(config, block_size)
        self.flops_causal = flops_per_token(config, block_size, causal=True)
        self.device, self.world_size = device, world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self.peak = next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
        self._tokens, self._start = 0, time.perf_counter()
        self.begin = self._start

    def add(self, tokens: int) -> None:
        """Count a step's tokens over all ranks, including padding, which is computed too."""
        self._tokens += tokens

    def pause(self) -> float:
        """Start an interval to exclude from the timing; pass the returned value to `resume`."""
        return time.perf_counter()

    def resume(self, paused: float) -> None:
        self._start += time.perf_counter() - paused

    def elapsed_s(self) -> float:
        """Seconds since training began or resumed in this process, pauses included."""
        return time.perf_counter() - self.begin

    def read(self) -> dict[str, float]:
        """Values since the last read. The caller must have just waited for the device."""
        now = time.perf_counter()
        rate = self._tokens / max(now - self._start, 1e-9)
        self._tokens, self._start = 0, now
        row = {"tokens_per_s": rate, "memory_gib": peak_memory_gib(self.device), "seconds": now - self.begin}
        if self.peak is not None:
            row["mfu"] = rate * self.flops / (self.peak * self.world_size)
            row["mfu_causal"] = rate * self.flops_causal / (self.peak * self.world_size)
        return row


def peak_memory_gib(device: torch.device) -> float:
    """Peak memory of this process: allocated on CUDA, resident otherwise; GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return peak_resident_bytes() / 2**30
