"""Recognises DTensors (the shards of FSDP2) without importing `torch.distributed.tensor`.

That import is a fifth of the start of a run, and a run on one device, a conversion or an evaluation needs none of it.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, TypeGuard

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
