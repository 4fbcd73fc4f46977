"""Run as a script with the trainer's flags: dump the gradients of one step (GRADIENT_STEP), whole, to GRADIENT_FILE."""

import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch
from torch.distributed.tensor import DTensor

from pretrain.fabric_train import leave, parse
from pretrain.loop import train_step
from pretrain.setup import set_up


def main() -> None:
    run = set_up(parse())
    data = run.loader.read_step(int(os.environ["GRADIENT_STEP"]))
    counts = [m.n_targets for m in data.micro_batches]
    run.optimizer.step = lambda *args, **kwargs: None  # type: ignore[method-assign]
    run.optimizer.zero_grad = lambda: None  # type: ignore[method-assign]
    result = train_step(run, data)
    gradients = {}
    for name, p in run.raw_model.named_parameters():
        assert p.grad is not None
        gradients[name] = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad).clone()
    every_count = [None] * run.world_size
    if run.world_size > 1:
        torch.distributed.all_gather_object(every_count, counts)
    else:
        every_count = [counts]
    if run.fabric.global_rank == 0:
        torch.save(
            {"gradients": gradients, "norm": result.grad_norm, "n_targets": result.n_targets, "counts": every_count},
            os.environ["GRADIENT_FILE"],
        )


if __name__ == "__main__":
    main()
    leave(0)
