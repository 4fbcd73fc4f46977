"""Measures the memory of a run with given settings, by steps of that run in a temporary folder."""

from __future__ import annotations

from dataclasses import replace

import torch

from pretrain.args import ProfileArgs, RunArgs
from pretrain.build import set_up
from pretrain.logs.layer_norms import LayerNorms
from pretrain.logs.throughput import peak_memory_gib
from pretrain.loop import train_step
from pretrain.trial_args import STEPS, without_side_outputs


def peak_of_steps(args: RunArgs) -> int:
    """Peak bytes of this rank's device in steps of a run with these settings, in the new folder `out_dir`.

    On CUDA the peak that the allocator reserved, on a CPU the peak resident memory of this process. Raises
    torch.OutOfMemoryError.
    """
    t = args.train
    world_size = args.num_nodes * int(args.devices)
    accumulates = t.global_batch_samples > world_size * t.micro_batch
    rows = world_size * t.micro_batch * (2 if accumulates else 1)
    args = replace(without_side_outputs(args), train=replace(t, global_batch_samples=rows), profile=ProfileArgs())
    run = set_up(args, watched=False)
    try:
        norms = LayerNorms(run.raw_model, run.optimizer.parameters, run.device) if args.log.layers else None
        for data in run.loader.steps(0, min(STEPS, run.data.max_steps)):
            train_step(run, data, norms)
            run.step += 1
            if norms is not None:
                norms.read()
        if run.device.type != "cuda":
            return int(peak_memory_gib(run.device) * 2**30)
        torch.cuda.synchronize(run.device)
        return torch.cuda.max_memory_reserved(run.device)
    finally:
        run.close()
