"""The memory item of a preflight: the estimate from the config beside what each rank has."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from lit_model.config import ModelConfig
from lit_model.cost import TrainingMemory, TrainingSetting, training_memory
from pretrain.distillation.teachers import teacher_bytes
from pretrain.parallel import uses_fsdp
from pretrain.preflight.context import Finding, PreflightContext, faults, results, show_bytes
from pretrain.preflight.machine import checkpoint_bytes

CUDA_RESERVE_BYTES = 1536 << 20  # context, NCCL's buffers, kernels' workspaces, fragmentation
TIGHT = 0.9  # of the available memory


def check_memory(s: PreflightContext) -> Finding:
    """Compare the estimate from the config with the memory of each rank. Nothing of the model is allocated."""
    if s.config is None:
        return Finding("skipped", "the model's size is unknown without the data: see data")
    setting = training_setting(s, s.config)
    s.memory = memory = training_memory(s.config, setting)
    host_need = host_bytes(s, memory)
    parts = f"state {show_bytes(memory.parameters + memory.gradients + memory.optimizer)}, activations "
    parts += f"{show_bytes(memory.activations)}, loss {show_bytes(memory.loss + memory.workspace)}"
    parts += f", weights gathered or cast {show_bytes(memory.gathered)}" if memory.gathered else ""
    parts += f", teachers {show_bytes(memory.frozen)}" if memory.frozen else ""
    measured = f"estimate {show_bytes(memory.total)} a device ({parts})"
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


def training_setting(s: PreflightContext, config: ModelConfig) -> TrainingSetting:
    args, t, world = s.args, s.args.train, s.world_size
    sharding, shards = ("none" if world == 1 and args.strategy != "ddp" else "ddp"), 1
    if uses_fsdp(args):
        sharding, shards = args.sharding_strategy, world
        if sharding == "HYBRID_SHARD":
            shards = max(1, world // args.num_nodes if args.num_nodes > 1 else world // 2)
    return TrainingSetting(
        micro_batch_samples=t.micro_batch_samples,
        block_size=t.block_size or config.block_size,
        compute_bytes=4 if args.precision == "fp32" else 2,
        sharding=sharding,
        shards=shards,
        recompute=t.activation_checkpointing,
        recompute_every=t.activation_checkpointing_every,
        accumulates=t.global_batch_samples > world * t.micro_batch_samples,
        defer_gradient_sync=t.defer_gradient_sync,
        cpu_offload=t.cpu_offload,
        prefetch_blocks=t.prefetch_blocks,
        reduce_bytes=4 if t.reduce_dtype == "fp32" else 2,
        on_cpu=s.kind == "cpu",
        muon=args.optim.name == "muon",
        frozen=teacher_bytes(args.distillation, args.precision, s.kind or "cuda", world),
    )


def host_bytes(s: PreflightContext, memory: TrainingMemory) -> int:
    """Host memory that one rank needs beyond the process itself: offloaded state, and the checkpoint being written."""
    state = memory.parameters + memory.optimizer
    need = state + memory.gradients if s.args.train.cpu_offload else 0
    if s.args.save.state_dict_type == "full":  # rank 0 holds the whole
        assert s.config is not None
        copies = s.kind == "cuda" or uses_fsdp(s.args) or s.args.save.asynchronous
        return need + (checkpoint_bytes(s.config, s.args.optim) if copies and s.ranks.rank == 0 else 0)
    return need + (state if s.args.save.asynchronous else 0)


def available_bytes(s: PreflightContext, neighbours: int) -> tuple[int, int]:
    """(bytes for this rank on its device, on the host); `neighbours` ranks share the host's memory."""
    host = host_memory_bytes() // neighbours
    if s.kind != "cuda":
        return host, host
    device = s.ranks.fabric.device if s.ranks.fabric is not None else torch.device("cuda", 0)
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device), host


def host_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that processes on this host can still allocate: available memory, capped by control-group limits."""
    if hasattr(os, "sysconf") and not (root / "proc/meminfo").exists():
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    facts = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    return min([available, *cgroup_rooms(root)])


def cgroup_rooms(root: Path) -> Iterator[int]:
    """Bytes left under each memory limit of this process's control groups, v2 and v1. The file cache counts as free."""
    groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            try:
                limit, used = ((place / name).read_text().strip() for name in names[:2])
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                yield max(0, int(limit) - int(used) + int(stat.get(names[2], 0)))


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
