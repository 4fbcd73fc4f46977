"""The bytes of a tensor, and checksums of tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
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


def weights_checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256, in hexadecimal, of tensors by name: names, dtypes, shapes and bytes. The order given does not matter."""
    facts = sorted((name, str(t.dtype), list(t.shape), tensor_checksum(t)) for name, t in tensors)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()
