"""From the flags of a run to the lines of its plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pretrain.cli.choices import read_words
from pretrain.cli.run_parser import build_parser, parse
from pretrain.free_memory import host_memory_bytes
from pretrain.launch import share_batch
from pretrain.planning.describe import describe
from pretrain.planning.devices import GPUS, this_cpu
from pretrain.planning.loss import predict_loss, read_finished_runs
from pretrain.planning.plan import plan

DATA = ("data.train", "data.mixture", "data.synthetic.tokens")
GPUS_OF_A_NODE = 8
NO_DATA = ("--data.train", "/dev/null/no data yet")
"""Stands for data that is not prepared yet: a path that cannot exist."""


def plan_for(gpu: str, gpus: int, flags: Sequence[str], runs: Sequence[Path] = ()) -> list[str]:
    """The plan of a run on `gpus` devices of a kind, eight a node, from the trainer's flags.

    Args:
        runs: finished runs to predict the final loss from; none: it is not predicted.

    Raises ValueError for flags that do not fit together or to this number of devices, and for runs that cannot be
    compared.
    """
    for flag in ("--devices", "--num_nodes"):
        if (word := next((word for word in flags if word.partition("=")[0] == flag), None)) is not None:
            raise ValueError(f"{word}: a plan takes the number of devices from --gpus; give that instead")
    known = [flag for action in build_parser()._actions for flag in action.option_strings]
    layers = read_words(list(flags), known).layers()
    given = {key for layer in layers for key in layer.values}
    args = parse([*flags, *(() if any(key.startswith(DATA) for key in given) else NO_DATA)])
    if gpus < 1 or (gpus > GPUS_OF_A_NODE and gpus % GPUS_OF_A_NODE):
        raise ValueError(f"--gpus {gpus} must be 1 to {GPUS_OF_A_NODE}, or a multiple of {GPUS_OF_A_NODE}, a node's")
    args = replace(args, devices=min(gpus, GPUS_OF_A_NODE), num_nodes=max(1, gpus // GPUS_OF_A_NODE))
    args, _ = share_batch(args, gpus, layers[-1].values)
    device = this_cpu(host_memory_bytes() // gpus, gpus) if gpu == "cpu" else GPUS[gpu]
    finished = read_finished_runs(runs) if runs else []
    found = plan(args, gpu, device, gpus)
    loss = predict_loss(finished, found.config, found.tokens) if finished else None
    return list(describe(found, loss, len(finished)))
