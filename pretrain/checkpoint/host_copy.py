"""The training state in host memory: gathered whole on rank 0, or each rank's own shards."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_model.dtensor import is_dtensor, local


def gather(tensors: dict[str, Tensor], rank: int, *, copy: bool) -> dict[str, Tensor]:
    """Gather whole tensors in host memory on rank 0, one at a time. The other ranks get none.

    With `copy` none shares memory with the training state.
    """
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if is_dtensor(tensor) else tensor
        if rank == 0:
            host = full.detach().cpu()
            whole[name] = host.clone() if copy and host.data_ptr() == local(tensor).data_ptr() else host
    return whole


class HostBuffers:
    """Host memory for each rank's shards, used again by every save."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def copy(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy the shards into the buffers, and wait for the copies.

        Not DCP's DefaultStager: on torch 2.11 its second call fails (it clears its own table of types), and it
        allocates and pins new memory for every save.
        """
        for name, tensor in tensors.items():
            if name not in self._buffers:
                self._buffers[name] = host_buffer(tensor)
            local(self._buffers[name].detach()).copy_(local(tensor.detach()), non_blocking=tensor.is_cuda)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return {name: self._buffers[name] for name in tensors}


def host_buffer(tensor: Tensor) -> Tensor:
    """Host memory for a tensor of the same shape and shards, pinned if the tensor is on a GPU."""
    buffer = tensor.detach().to("cpu", copy=True)
    if not tensor.is_cuda:
        return buffer
    if is_dtensor(buffer):  # from_local would move it to the mesh's device; DCP's stagers set it likewise
        buffer._local_tensor = buffer._local_tensor.pin_memory()
        return buffer
    return buffer.pin_memory()


def copy_without_waiting(tensor: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """Start to copy a small tensor to the host. Returns the copy, and the function that waits until it is complete."""
    if not tensor.is_cuda:
        return tensor.clone(), lambda: None
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return host, event.synchronize
