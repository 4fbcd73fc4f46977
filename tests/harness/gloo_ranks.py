"""For tests of collectives: runs a function in several processes, forked from one that has imported torch."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing

# Importing takes seconds in each process; a fork of this process itself could not run a backward.
multiprocessing.set_forkserver_preload(
    ["torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor", "torch._dynamo"]
)


def run_ranks(function: Callable[..., None], world_size: int, rendezvous: Path, *arguments: object) -> None:
    """Call function(rank, world_size, *arguments) in each rank of a gloo group; an error in one is raised here."""
    torch.multiprocessing.start_processes(
        _enter, (world_size, str(rendezvous), function, arguments), world_size, start_method="forkserver"
    )


def _enter(
    rank: int, world_size: int, rendezvous: str, function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world_size)
    function(rank, world_size, *arguments)
    dist.barrier()
    dist.destroy_process_group()
    # gloo processes occasionally abort while C++ tears down their threads ("terminate called without an active
    # exception", about 1 in 60 exits with torch 2.13), after everything above has passed: exit without teardown.
    os._exit(0)
