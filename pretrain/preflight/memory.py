"""The memory item of a preflight: the estimate from the config, compared with the free memory of each rank."""

from __future__ import annotations

import socket
from dataclasses import replace

import torch

from lit_model.config import ModelConfig
from lit_model.cost import TrainingSetting, training_memory
from lit_model.load import Checkpoint
from pretrain.free_memory import CUDA_RESERVE_BYTES, TIGHT, free_device_bytes, show_bytes
from pretrain.memory_fit import fit_to_memory, host_bytes, training_setting
from pretrain.preflight.context import Finding, PreflightContext, faults, results


def check_memory(s: PreflightContext) -> Finding:
    """Compare the estimate from the config with the memory of each rank. Nothing of the model is allocated."""
    if s.config is None:
        return Finding("skipped", "the model's size is unknown without the data: see data")
    try:
        chosen = fit_settings(s, s.config)
    except ValueError as error:
        return Finding("failed", str(error))
    setting = training_setting(s.args, s.config, s.kind or "cuda", s.world_size)
    s.memory = memory = training_memory(s.config, setting)
    host_need = host_bytes(s.args, s.config, memory, s.kind or "cuda", s.ranks.rank)
    parts = f"state {show_bytes(memory.parameters + memory.gradients + memory.optimizer)}, activations "
    parts += f"{show_bytes(memory.activations)}, loss {show_bytes(memory.loss + memory.workspace)}"
    parts += f", weights gathered or cast {show_bytes(memory.gathered)}" if memory.gathered else ""
    parts += f", teachers {show_bytes(memory.frozen)}" if memory.frozen else ""
    measured = f"{chosen}estimate {show_bytes(memory.total)} a device ({parts})"
    if s.kind is None:
        return Finding("skipped", f"{measured}; there is no device of this kind to compare with")
    neighbours = s.ranks.gather(socket.gethostname()).count(socket.gethostname())
    outcomes = s.ranks.together(lambda: available_bytes(s, neighbours))
    if fault := faults(outcomes):
        return Finding("failed", fault, "")
    on_cpu = s.kind == "cpu"
    least = min((o for o in outcomes if o.result), key=lambda o: (o.result or (0, 0))[0])
    device, host = min(d for d, _ in results(outcomes)), min(h for _, h in results(outcomes))
    need = memory.total + (0 if s.kind != "cuda" else CUDA_RESERVE_BYTES) + (host_need if on_cpu else 0)
    measured += f" of {show_bytes(device)} on {least.who}" if s.ranks.world_size > 1 else f" of {show_bytes(device)}"
    measured += f", host {show_bytes(host_need)} of {show_bytes(host)}" if host_need else ""
    if need > device:
        return Finding("failed", measured, memory_advice(s, s.config, setting, device - (need - memory.total)))
    if host_need > host:
        return Finding(
            "failed", measured, "host memory: --save.state_dict_type sharded, no --save.asynchronous or offload"
        )
    if need > TIGHT * device:
        return Finding("warning", measured, memory_advice(s, s.config, setting, TIGHT * device - (need - memory.total)))
    return Finding("ok", measured)


def fit_settings(s: PreflightContext, config: ModelConfig) -> str:
    """Replace automatic settings in `s.args` by those that the estimate gives. Returns them for the finding."""
    device = torch.device(s.kind or "cpu") if s.ranks.fabric is None else s.ranks.fabric.device
    kept = None if s.checkpoint is None else Checkpoint(s.checkpoint).meta["config"]["train"]
    block_size = s.args.train.block_size or config.block_size
    s.args, line = fit_to_memory(s.args, config, block_size, device, s.ranks.gather, kept=kept)
    return "" if line is None else f"{line.partition(':')[0]} (auto), "


def available_bytes(s: PreflightContext, neighbours: int) -> tuple[int, int]:
    """(bytes for this rank on its device, on the host); `neighbours` ranks share the host's memory."""
    device = s.ranks.fabric.device if s.ranks.fabric is not None else torch.device(s.kind or "cpu")
    return free_device_bytes(device, neighbours), free_device_bytes(torch.device("cpu"), neighbours)


def memory_advice(s: PreflightContext, config: ModelConfig, setting: TrainingSetting, room: float) -> str:
    """The changes that save most memory, each with its estimate; those that suffice by themselves come first."""
    t, world = s.args.train, s.world_size
    tried: dict[str, TrainingSetting] = {}
    if setting.micro_batch_samples > 1:
        tried["--train.micro_batch_samples 1"] = replace(setting, micro_batch_samples=1, accumulates=True)
    if t.activation_checkpointing != "full":
        tried["--train.activation_checkpointing full"] = replace(setting, recompute="full")
    if world > 1 and setting.sharding != "FULL_SHARD":
        tried["--strategy fsdp"] = replace(setting, sharding="FULL_SHARD", shards=world)
    if setting.sharded and not setting.cpu_offload:
        tried["--train.cpu_offload true"] = replace(setting, cpu_offload=True)
    if setting.micro_batch_samples > 1:
        everything = replace(setting, micro_batch_samples=1, accumulates=True, recompute="full")
        if world > 1:
            everything = replace(everything, sharding="FULL_SHARD", shards=world)
        all_of_it = "--train.micro_batch_samples 1 with --train.activation_checkpointing full"
        tried[all_of_it + (" and --strategy fsdp" if world > 1 else "")] = everything
    totals = {name: training_memory(config, changed).total for name, changed in tried.items()}
    options = [
        f"{name} takes {show_bytes(n)}"
        for name, n in sorted(totals.items(), key=lambda item: (item[1] > room, item[1]))
    ]
    enough = any(n <= room for n in totals.values())
    more = "" if enough else "; use more devices that share the state (--strategy fsdp), or larger ones"
    return "; ".join(options) + more
