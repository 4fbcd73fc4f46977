"""Measures the memory of a run with given settings, by steps of that run in a temporary folder."""

from __future__ import annotations

from dataclasses import replace

import torch

from pretrain.args import ProfileArgs, RunArgs
from pretrain.build import set_up
from pretrain.logs.throughput import peak_memory_gib
from pretrain.loop import train_step

STEPS = 2  # the first compiles and fills caches


def peak_of_steps(args: RunArgs) -> int:
    """Peak bytes of this rank's device in steps of a run with these settings, in the new folder `out_dir`.

    On CUDA all that the allocator reserved since its peak was reset, on a CPU all that this process has had. Raises
    torch.OutOfMemoryError.
    """
    t = args.train
    world_size = args.num_nodes * int(args.devices)
    accumulates = t.global_batch_samples > world_size * t.micro_batch
    rows = world_size * t.micro_batch * (2 if accumulates else 1)
    args = replace(without_traces(args), train=replace(t, global_batch_samples=rows), profile=ProfileArgs())
    run = set_up(args, watched=False)
    try:
        for data in run.loader.steps(0, min(STEPS, run.data.max_steps)):
            train_step(run, data)
            run.step += 1
        if run.device.type != "cuda":
            return int(peak_memory_gib(run.device) * 2**30)
        torch.cuda.synchronize(run.device)
        return torch.cuda.max_memory_reserved(run.device)
    finally:
        run.close()


def without_traces(args: RunArgs) -> RunArgs:
    """The same settings without cache, record and trackers."""
    data, log = replace(args.data, cache_dir=None, datapoints=False), replace(args.log, trackers=[])
    return replace(args, data=data, log=log, preflight=False)
