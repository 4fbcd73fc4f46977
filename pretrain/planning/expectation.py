"""The plan of a run as it starts, recorded so that its report can show plan and reality side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from lit_data.packed.reader import PackedDataset
from lit_files.platform import usable_cores
from lit_model.config import ModelConfig
from lit_model.cost import training_memory
from pretrain.args import RunArgs
from pretrain.logs.throughput import PEAK_FLOPS
from pretrain.memory_fit import checkpoint_bytes, training_setting
from pretrain.planning.devices import GPUS, Device, this_cpu
from pretrain.planning.plan import cpu_overhead_bytes, expected_speed, record_bytes


def expectation(
    args: RunArgs,
    config: ModelConfig,
    datasets: Iterable[PackedDataset],
    block_size: int,
    max_steps: int,
    device: torch.device,
    world_size: int,
) -> dict[str, Any]:
    """The plan of a run whose automatic settings are resolved, JSON-able.

    Returns `memory_bytes` of one device (on a CPU above the process with its imports), `tokens_per_s` of all devices
    and `seconds` of the whole run as [low, likely, high] (None for a device of unknown speed), `checkpoint_bytes` of
    one checkpoint, and `record_bytes` of the whole record.
    """
    memory = training_memory(config, training_setting(args, config, device.type, world_size))
    more = 0 if device.type == "cuda" else cpu_overhead_bytes(args, config, memory)
    tokens = max_steps * args.train.global_batch_samples * block_size
    datasets = list(datasets)
    documents = sum(d.n_documents for d in datasets)
    mean_document = sum(d.n_tokens for d in datasets) / documents if documents else None
    found: dict[str, Any] = {
        "memory_bytes": memory.total + more,
        "tokens_per_s": None,
        "seconds": None,
        "checkpoint_bytes": checkpoint_bytes(config, args.optim),
        "record_bytes": record_bytes(args, tokens, block_size, mean_document),
    }
    if (known := planned_device(device, int(args.devices), args.precision)) is not None:
        speed = expected_speed(args, config, *known, world_size, block_size, mean_document)
        found["tokens_per_s"] = [speed.low, speed.likely, speed.high]
        seconds = speed.time_for(tokens)
        found["seconds"] = [seconds.low, seconds.likely, seconds.high]
    return found


def planned_device(device: torch.device, ranks_here: int, precision: str) -> tuple[str, Device] | None:
    """(name, device) for the plan; None if the speed of this device is unknown in this precision.

    Args:
        ranks_here: ranks on this host.
    """
    if device.type == "cpu":
        # Its threads are this rank's own; those of all ranks may be more than the cores.
        return "cpu", this_cpu(0, max(1.0, torch.get_num_threads() * ranks_here / usable_cores()))
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    if (part := next((part for part in PEAK_FLOPS if part in name), None)) is None:
        return None
    key = part.lower().replace(" ", "")
    if key in GPUS:
        return key, GPUS[key]
    if precision == "fp32":
        return None
    return "other", Device(name, "cuda", PEAK_FLOPS[part], math.nan, 0, None)
