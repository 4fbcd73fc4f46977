"""The bytes of a tensor, and checksums of tensors."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor


def byte_view(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor as bytes, without a copy: writes to it change the tensor."""
    assert tensor.is_contiguous() and tensor.device.type == "cpu", "only contiguous host memory is a row of bytes"
    flat: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(flat)


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256, in hexadecimal, of a tensor's bytes in row-major order. Shape and dtype do not enter."""
    return hashlib.sha256(byte_view(tensor.detach().cpu().contiguous())).hexdigest()
