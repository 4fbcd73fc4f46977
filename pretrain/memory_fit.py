"""Chooses settings by the memory of a device: the largest micro-batch that fits (`--train.micro_batch_samples auto`),
and the fewest recomputed blocks (`--train.activation_checkpointing auto`).

Both are a choice among candidates in order of memory. The estimate from the config (lit_model/cost.py) gives the first
one; on CUDA, steps of the real run are then measured, until the largest candidate that fits is known.
"""

from __future__ import annotations

import gc
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from lit_model.config import ModelConfig
from lit_model.cost import TrainingMemory, TrainingSetting, training_memory
from lit_model.float8 import ALIGNMENT
from lit_model.kernels.choose import choose_attention
from lit_model.kernels.cuda import repeats_heads
from pretrain.args import AUTO, MAX_MICRO_BATCH_TOKENS, OptimArgs, RunArgs
from pretrain.distillation.teachers import teacher_bytes
from pretrain.free_memory import CUDA_RESERVE_BYTES, TIGHT, free_device_bytes, show_bytes
from pretrain.parallel import DTYPES, uses_fsdp

Gather = Callable[[Any], list[Any]]
"""The values of all ranks, on all ranks."""
Trial = Callable[[RunArgs], int]
"""Takes steps of a run with these settings: the peak bytes of this rank's device. Raises torch.OutOfMemoryError."""

SHARE = {"cuda": 0.95, "cpu": 0.8}  # of the free memory; a measurement includes fragmentation, the host serves others
CPU_TOKENS = 8192  # of an automatic micro-batch: longer ones make a CPU no faster
KEPT = ("activation_checkpointing", "activation_checkpointing_every", "activation_checkpointing_blocks")


@dataclass(frozen=True)
class Candidate:
    """Settings to try. `blocks`: how many blocks are recomputed, from the first one; None: as configured."""

    rows: int
    blocks: int | None

    def apply(self, args: RunArgs) -> RunArgs:
        train = replace(args.train, micro_batch_samples=self.rows)
        if self.blocks is not None:
            how: Literal["none", "block"] = "block" if self.blocks else "none"
            first = self.blocks or None
            train = replace(train, activation_checkpointing=how, activation_checkpointing_blocks=first)
        return replace(args, train=train)

    def __str__(self) -> str:
        blocks = f", {self.blocks} blocks recomputed" if self.blocks else ""
        return f"micro-batch of {self.rows} row{'s' * (self.rows > 1)}{blocks}"


def candidates(args: RunArgs, n_layer: int, block_size: int, world_size: int, kind: str) -> list[Candidate]:
    """From the least memory to the most. With both settings automatic, blocks are recomputed only if one row needs it:
    it costs more time than a smaller micro-batch. Never the last block: it would be recomputed at the peak."""
    t = args.train
    per_device = t.global_batch_samples // world_size
    tokens = CPU_TOKENS if kind == "cpu" else MAX_MICRO_BATCH_TOKENS
    most = max(1, tokens // block_size)
    rows = [m for m in range(1, min(per_device, most) + 1) if per_device % m == 0]
    if args.precision == "fp8":
        rows = [m for m in rows if m * block_size % ALIGNMENT == 0] or rows  # else build_model names the mistake
    if t.micro_batch_samples != AUTO:
        return [Candidate(t.micro_batch, blocks) for blocks in range(n_layer - 1, -1, -1)]
    if t.activation_checkpointing != AUTO:
        return [Candidate(m, None) for m in rows]
    return [Candidate(1, blocks) for blocks in range(n_layer - 1, 0, -1)] + [Candidate(m, 0) for m in rows]


def largest_fitting(
    estimates: Sequence[int], limit: float, measure: Callable[[int], int | None] | None
) -> tuple[int | None, int | None]:
    """The last of some candidates, of increasing memory, that fits, and its bytes.

    If not even the first fits: None, and the bytes of the smallest, or None if it ran out of memory.

    Args:
        estimates: bytes of each.
        measure: bytes of a candidate, None if it ran out of memory. Without it the estimates decide.
    """
    if measure is None:
        fits = [i for i, n in enumerate(estimates) if n <= limit]
        return (fits[-1], estimates[fits[-1]]) if fits else (None, estimates[0])
    fits_at, fails_at = -1, len(estimates)
    peak: int | None = None
    correction, out_of_memory = 0, False  # correction of the estimates, by the last measurement
    while fits_at + 1 < fails_at:
        hopeful = [i for i in range(fits_at + 1, fails_at) if estimates[i] + correction <= limit]
        if not hopeful and fits_at >= 0:
            break
        i = (fits_at + fails_at) // 2 if out_of_memory else hopeful[-1] if hopeful else 0
        measured = measure(i)
        out_of_memory = measured is None
        if measured is not None:
            correction = measured - estimates[i]
        if measured is not None and measured <= limit:
            fits_at, peak = i, measured
        else:
            fails_at = i
            peak = measured if fits_at < 0 else peak
    return (fits_at if fits_at >= 0 else None), peak


def fit_to_memory(
    args: RunArgs,
    config: ModelConfig,
    block_size: int,
    device: torch.device,
    gather: Gather,
    *,
    kept: dict[str, Any] | None = None,
    trial: Trial | None = None,
) -> tuple[RunArgs, str | None]:
    """Replace the automatic settings by values that fit on every rank. Returns them and a line for the log.

    Args:
        kept: `train` of the checkpoint to resume: its values stay, if they still divide the global batch, since another
            micro-batch rounds differently.
        trial: used on CUDA; every rank takes part in it.

    Raises ValueError if nothing fits.
    """
    if not args.train.is_automatic:
        return args, None
    world_size = len(gather(None))
    if kept is not None and (same := as_before(args, kept, world_size)) is not None:
        return same, None
    tried = candidates(args, config.n_layer, block_size, world_size, device.type)
    settings = [training_setting(c.apply(args), config, device.type, world_size) for c in tried]
    estimates = [training_memory(config, s).total for s in settings]
    hosts = gather(socket.gethostname())
    measured = trial is not None and device.type == "cuda"
    limit = min(gather(memory_limit(args, device, hosts.count(socket.gethostname()), measured)))

    def measure(i: int) -> int | None:
        assert trial is not None
        release_memory(device)
        try:
            peak: int | None = trial(tried[i].apply(args))
        except torch.OutOfMemoryError:
            peak = None
        peaks = gather(peak)
        return None if None in peaks else max(peaks)

    chosen, peak = largest_fitting(estimates, limit, measure if measured else None)
    if measured:
        release_memory(device)
    room = show_bytes(limit)
    if peak is None:
        found = f"it ran out of memory; the limit is {room}"
    else:
        found = f"{show_bytes(peak)} of {room} {'measured' if measured else 'estimated'}"
    if chosen is None:
        fixed = args.train.micro_batch_samples != AUTO
        advice = "a smaller --train.micro_batch_samples, " if fixed else ""
        advice += "--train.activation_checkpointing full, --strategy fsdp with more devices, "
        advice += "a smaller --train.block_size"
        advice += ", or a larger --train.memory_limit_gib" if args.train.memory_limit_gib is not None else ""
        raise ValueError(f"not even a {tried[0]} fits: {found}. Give {advice}")
    return tried[chosen].apply(args), f"{tried[chosen]}: {found}"


def release_memory(device: torch.device) -> None:
    """Free what a trial left behind: its tensors, including those held by an exception, and its compiled blocks."""
    gc.collect()
    torch._dynamo.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def as_before(args: RunArgs, kept: dict[str, Any], world_size: int) -> RunArgs | None:
    """The values of a checkpoint in place of the automatic settings; None if they don't divide the global batch."""
    t = args.train
    if t.micro_batch_samples == AUTO:
        t = replace(t, micro_batch_samples=int(kept["micro_batch_samples"]))
    if t.activation_checkpointing == AUTO:
        t = replace(t, **{name: kept[name] for name in KEPT if name in kept})
    if t.global_batch_samples % (world_size * t.micro_batch):
        return None
    return replace(args, train=t)


def training_setting(args: RunArgs, config: ModelConfig, kind: str, world_size: int) -> TrainingSetting:
    """The inputs of the memory estimate. `kind`: cpu, cuda or mps."""
    t, world = args.train, world_size
    sharding, shards = ("none" if world == 1 and args.strategy != "ddp" else "ddp"), 1
    if uses_fsdp(args):
        sharding, shards = args.sharding_strategy, world
        if sharding == "HYBRID_SHARD":
            shards = max(1, world // args.num_nodes if args.num_nodes > 1 else world // 2)
    return TrainingSetting(
        micro_batch_samples=t.micro_batch,
        block_size=t.block_size or config.block_size,
        compute_bytes=4 if args.precision == "fp32" else 2,
        float8=args.precision == "fp8",
        compiled=args.compile,
        repeats_heads=kind == "cuda" and _repeats_heads(args, config),
        sharding=sharding,
        shards=shards,
        recompute=t.activation_checkpointing,
        recompute_every=t.activation_checkpointing_every,
        recompute_blocks=t.activation_checkpointing_blocks,
        accumulates=t.global_batch_samples > world * t.micro_batch,
        defer_gradient_sync=t.defer_gradient_sync,
        cpu_offload=t.cpu_offload,
        prefetch_blocks=t.prefetch_blocks,
        reduce_bytes=8 if t.topology_invariant else 4 if t.reduce_dtype == "fp32" else 2,
        on_cpu=kind == "cpu",
        muon=args.optim.name == "muon",
        exact_sums=t.topology_invariant,
        frozen=teacher_bytes(args.distillation, args.precision, kind, world),
    )


def _repeats_heads(args: RunArgs, config: ModelConfig) -> bool:
    """Whether attention on this machine's GPU has no grouped heads; of a GPU elsewhere the best is assumed."""
    if args.precision == "fp32":
        return True
    if not torch.cuda.is_available():
        return False
    name: str = args.train.attention
    dtype = DTYPES[args.precision]
    if name == "auto":
        name = choose_attention("cuda", dtype, config.head_size, documents=args.data.document_mask).name
    return repeats_heads(name)


def checkpoint_bytes(config: ModelConfig, args: OptimArgs) -> int:
    """Parameters and the optimizer's moments, fp32."""
    memory = training_memory(config, TrainingSetting(1, 1, muon=args.name == "muon"))
    return memory.parameters + memory.optimizer


def host_bytes(args: RunArgs, config: ModelConfig, memory: TrainingMemory, kind: str, rank: int = 0) -> int:
    """Host memory that one rank needs beyond the process itself: offloaded state, and the checkpoint being written."""
    state = memory.parameters + memory.optimizer
    need = state + memory.gradients if args.train.cpu_offload else 0
    if args.save.state_dict_type == "full":  # rank 0 holds the whole
        copies = kind == "cuda" or uses_fsdp(args) or args.save.asynchronous
        return need + (checkpoint_bytes(config, args.optim) if copies and rank == 0 else 0)
    return need + (state if args.save.asynchronous else 0)


def memory_limit(args: RunArgs, device: torch.device, neighbours: int, measured: bool) -> int:
    """Bytes that automatic settings may use on this rank's device; `neighbours` ranks share the host's memory.

    On CUDA an estimate leaves room for what it does not count; a measurement has counted it.
    """
    if args.train.memory_limit_gib is not None:
        return int(args.train.memory_limit_gib * 2**30)
    free = free_device_bytes(device, neighbours)
    if device.type != "cuda" or measured:
        return int(SHARE["cuda" if device.type == "cuda" else "cpu"] * free)
    return int(TIGHT * free) - CUDA_RESERVE_BYTES
