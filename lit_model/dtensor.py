"""Recognises DTensors (the shards of FSDP2) without importing `torch.distributed.tensor`.

That import is a fifth of the start of a run, and a run on one device, a conversion or an evaluation needs none of it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_dtensor(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor. None exists before its module has been imported."""
    known = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return known is not None and isinstance(tensor, known)


def local(tensor: Tensor) -> Tensor:
    """This rank's shard of a DTensor (sharing its storage), or the tensor itself."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def shard_group(tensor: Tensor) -> dist.ProcessGroup | None:
    """The ranks that hold the shards of a DTensor; None if this rank holds the whole tensor."""
    if not is_dtensor(tensor):
        return None
    groups = [tensor.device_mesh.get_group(dim) for dim, p in enumerate(tensor.placements) if p.is_shard()]
    assert len(groups) <= 1, "sharded over several dimensions of the device mesh"
    return groups[0] if groups and groups[0].size() > 1 else None
