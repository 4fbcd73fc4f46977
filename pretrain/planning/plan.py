"""What a run will need, from its settings alone: memory, time, disk, energy. Nothing is allocated or started."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from lit_data.packed.manifest import MANIFEST
from lit_data.packed.reader import PackedDataset
from lit_model.config import ModelConfig
from lit_model.cost import (
    TrainingMemory,
    count_active_parameters,
    count_multiplying_parameters,
    count_parameters,
    flops_per_token,
    training_memory,
)
from lit_model.load import load_tensors
from lit_model.model import is_recomputed
from lit_model.registry import get_config
from pretrain.args import AUTO, SHARDED_ONLY, ModelArgs, RunArgs, TrainArgs
from pretrain.free_memory import CUDA_RESERVE_BYTES, TIGHT
from pretrain.init_from import model_config
from pretrain.memory_fit import checkpoint_bytes, host_bytes, training_setting
from pretrain.planning.devices import Device, Range, cpu_flops_per_second, flops_per_second

RECORD_BYTES_PER_SPAN = 23.2  # 1.0e9 spans took 23.3 GB (benchmarks/results/2026-11-21-record-1e9.json)
VOCABULARY = 32_000  # assumed where neither the model's name nor the data gives it
TOKENS_PER_SPAN = 300  # a document's, assumed where the data is not available
MOST_DEVICES = 4096
EXACT_SUMS_SPEED = (0.55, 0.8, 1.0)  # of a step with --train.topology_invariant (docs/reproducibility.md)
CPU_PROCESS_BYTES = (
    32 << 20
)  # beside the tensors: loader, scratch of the kernels, pages of libraries (benchmarks/plan_memory.py)
RECOMPUTE: tuple[Literal["none", "full"], ...] = ("none", "full")
DISK_BYTES_PER_S = 1e9  # assumed; --preflight measures it


@dataclass(frozen=True)
class Strategy:
    """One way to distribute the run, on one device of it.

    Attributes:
        memory: estimate at `rows` rows a micro-batch; `fits` the device.
        largest: rows of the largest micro-batch that fits and divides the batch; 0: not even one row does.
    """

    name: str
    flags: str
    rows: int
    memory: TrainingMemory
    fits: bool
    largest: int


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        tokens, steps: length of the run.
        epochs: passes over the data; None: the data is not available.
        mean_document: tokens of a document on average; None likewise.
        speed: tokens/s of all devices.
        disk: bytes of the checkpoints that are kept, of the data as packed tokens, and of the record.
    """

    args: RunArgs
    config: ModelConfig
    device: Device
    devices: int
    parameters: int
    active: int
    block_size: int
    tokens: int
    steps: int
    epochs: float | None
    mean_document: float | None
    flops: float
    strategies: list[Strategy]
    speed: Range
    checkpoint: int
    disk: tuple[int, int, int]

    @property
    def seconds(self) -> Range:
        """Of training; `low` is the fastest."""
        return self.speed.time_for(self.tokens)


def plan(args: RunArgs, gpu: str, device: Device, devices: int) -> Plan:
    """Plan a run on `devices` devices, `args.num_nodes` nodes together.

    Raises ValueError for settings that do not fit together, such as a length in epochs without the data.
    """
    data = open_data(args)
    n_tokens = sum(dataset.n_tokens for dataset in data) if data else None
    config = model_config(args, data[0].vocab_size if data else vocabulary(args.model))
    block_size = args.train.block_size or config.block_size
    tokens, steps = length(args, block_size, n_tokens)
    strategies = list(strategies_of(args, config, device, devices))
    checkpoint = checkpoint_bytes(config, args.optim)
    n_documents = sum(dataset.n_documents for dataset in data)
    mean_document = n_tokens / n_documents if n_tokens and n_documents else None
    speed = expected_speed(args, config, gpu, device, devices, block_size, mean_document)
    data_bytes = (
        sum(d.n_tokens * d.dtype.itemsize for d in data) if data else tokens * (2 if config.vocab_size <= 65536 else 4)
    )
    return Plan(
        args=args,
        config=config,
        device=device,
        devices=devices,
        parameters=count_parameters(config),
        active=count_active_parameters(config),
        block_size=block_size,
        tokens=tokens,
        steps=steps,
        epochs=tokens / n_tokens if n_tokens else None,
        mean_document=mean_document,
        flops=tokens * flops_per_token(config, block_size),
        strategies=strategies,
        speed=speed,
        checkpoint=checkpoint,
        disk=(
            checkpoint * (checkpoints(args, steps) + 1),
            data_bytes,
            record_bytes(args, tokens, block_size, mean_document),
        ),
    )


def expected_speed(
    args: RunArgs,
    config: ModelConfig,
    gpu: str,
    device: Device,
    devices: int,
    block_size: int,
    mean_document: float | None,
    teachers: Sequence[ModelConfig] | None = None,
) -> Range:
    """Tokens/s of all devices. Teachers that compute beside the student are counted; None: read from their files."""
    flops, recompute = partial(flops_per_token, block_size=block_size), recomputed_speed(args.train, config)
    if device.kind == "cpu":  # the attention that is computed; GPUs were measured by the convention
        flops = partial(flops_per_token, block_size=int(min(block_size, mean_document or block_size)), causal=True)
        rate = cpu_flops_per_second(device, config.n_embd, recompute)
    else:
        rate = flops_per_second(
            gpu,
            device,
            count_active_parameters(config),
            args.precision,
            compiled=args.compile,
            recompute=recompute,
            devices=devices,
            nodes=args.num_nodes,
        )
    if args.train.topology_invariant:
        rate = rate.times(*EXACT_SUMS_SPEED)
    per_token = flops(config)
    if teachers is None:
        teachers = [load_tensors(entry.path)[0] for entry in args.distillation.teachers]
    per_token += sum(map(flops, teachers)) / 3  # forward only
    return rate.times(*[devices / per_token] * 3)


def cpu_overhead_bytes(args: RunArgs, config: ModelConfig, memory: TrainingMemory) -> int:
    """Memory of a process that trains on a CPU beside the tensors that are estimated."""
    return host_bytes(args, config, memory, "cpu") + CPU_PROCESS_BYTES


def recomputed_speed(train: TrainArgs, config: ModelConfig) -> float:
    """Speed with activation checkpointing over that without it: a recomputed block computes its forward, a third of
    its work, twice."""
    if train.activation_checkpointing == "op":
        return 0.9  # docs/parallelism.md
    if train.activation_checkpointing in ("none", AUTO):
        return 1.0
    every, first = train.activation_checkpointing_every, train.activation_checkpointing_blocks
    layers = range(config.n_layer)
    whole = train.activation_checkpointing == "full"
    share = sum(whole or is_recomputed(layer, every, first) for layer in layers) / config.n_layer
    head = config.padded_vocab_size * config.n_embd / count_multiplying_parameters(config)
    return 1 / (1 + share * (1 - head) / 3)


def record_bytes(args: RunArgs, tokens: int, block_size: int, mean_document: float | None) -> int:
    """Bytes of the record of so many tokens. A document begins a span, and so does a row."""
    if not args.data.datapoints:
        return 0
    return int(RECORD_BYTES_PER_SPAN * tokens * (1 / (mean_document or TOKENS_PER_SPAN) + 1 / block_size))


def vocabulary(args: ModelArgs) -> int:
    """The vocabulary of a model whose data is not available."""
    if args.vocab_size is not None:
        return args.vocab_size
    return get_config(args.name).vocab_size if args.name is not None else VOCABULARY


def open_data(args: RunArgs) -> list[PackedDataset]:
    """The training data; empty unless all of it is there."""
    paths = [Path(entry.path) for entry in args.data.mixture] + ([args.data.train] if args.data.train else [])
    return [PackedDataset(path) for path in paths] if all((path / MANIFEST).is_file() for path in paths) else []


def length(args: RunArgs, block_size: int, n_tokens: int | None) -> tuple[int, int]:
    """(tokens, steps) of the run."""
    t, step_tokens = args.train, args.train.global_batch_samples * block_size
    if t.max_steps is not None:
        return t.max_steps * step_tokens, t.max_steps
    if t.max_tokens is not None:
        steps = -(-t.max_tokens // step_tokens)
        return steps * step_tokens, steps
    assert t.max_epochs is not None
    if n_tokens is None:
        raise ValueError(
            f"--train.max_epochs {t.max_epochs}: the number of tokens of an epoch is unknown; give --data.train a "
            "prepared dataset, or --train.max_tokens"
        )
    tokens = int(t.max_epochs * n_tokens)
    return tokens, -(-tokens // step_tokens)


def checkpoints(args: RunArgs, steps: int) -> int:
    """Checkpoints that are kept at the end."""
    save = args.save
    written = -(-steps // save.every_steps)
    if not save.keep_last:
        return written + len(save.word_budgets)
    more = steps // math.lcm(save.keep_every, save.every_steps) if save.keep_every else 0
    return min(written, save.keep_last + more) + len(save.word_budgets)


def sharded_only(args: RunArgs) -> bool:
    """Whether a setting needs sharded state."""
    return any(getattr(args.train, flag) for flag in SHARDED_ONLY) or args.distillation.shard_teachers


def memory_limit(device: Device) -> int:
    """Bytes that a plan may use of a device."""
    return int(TIGHT * device.memory) - (CUDA_RESERVE_BYTES if device.kind == "cuda" else 0)


def least_devices(plan: Plan) -> int | None:
    """The least number of devices, in whole nodes, that fits with sharding and recomputation and divides the batch;
    None if there is none up to MOST_DEVICES."""
    args, rows = plan.args, plan.args.train.global_batch_samples
    train = replace(args.train, micro_batch_samples=1, activation_checkpointing="full")
    args = replace(args, train=train, strategy="fsdp", sharding_strategy="FULL_SHARD")
    sizes: Iterator[int] = (n for n in (2, 4, *range(8, MOST_DEVICES + 1, 8)) if n > plan.devices and rows % n == 0)
    for n in sizes:
        setting = training_setting(args, plan.config, plan.device.kind, n)
        if training_memory(plan.config, setting).total <= memory_limit(plan.device):
            return n
    return None


def strategies_of(args: RunArgs, config: ModelConfig, device: Device, devices: int) -> Iterator[Strategy]:
    """The strategies for this number of devices, without and with recomputation of every block."""
    ways: list[tuple[str, dict[str, str]]] = [("one device", {"strategy": "auto"})]
    if devices > 1 or sharded_only(args):
        ways = [] if sharded_only(args) else [("DDP", {"strategy": "ddp"})]
        ways += [(s, {"strategy": "fsdp", "sharding_strategy": s}) for s in ("FULL_SHARD", "SHARD_GRAD_OP")]
        if args.num_nodes > 1 or (devices > 1 and devices % 2 == 0):
            ways.append(("HYBRID_SHARD", {"strategy": "fsdp", "sharding_strategy": "HYBRID_SHARD"}))
    limit = memory_limit(device)
    per_device = args.train.global_batch_samples // devices
    divisors = [m for m in range(1, per_device + 1) if per_device % m == 0]
    for name, changes in ways:
        for recompute in RECOMPUTE:

            def estimate(
                rows: int, recompute: Literal["none", "full"] = recompute, changes: dict[str, str] = changes
            ) -> TrainingMemory:
                train = replace(
                    args.train,
                    micro_batch_samples=rows,
                    activation_checkpointing=recompute,
                    activation_checkpointing_blocks=None,
                )
                tried = replace(args, train=train, **changes)  # type: ignore[arg-type]
                memory = training_memory(config, training_setting(tried, config, device.kind, devices))
                if device.kind == "cpu":
                    memory = replace(memory, total=memory.total + cpu_overhead_bytes(tried, config, memory))
                return memory

            largest = 0
            for m in divisors:  # memory grows with the rows
                if estimate(m).total > limit:
                    break
                largest = m
            given = args.train.micro_batch_samples
            rows = given if given != AUTO and per_device % given == 0 else max(1, largest)
            memory = estimate(rows)
            flags = " ".join(f"--{key} {value}" for key, value in changes.items() if value != "auto")
            flags += " --train.activation_checkpointing full" if recompute == "full" else ""
            label = f"{name}, recomputing" if recompute == "full" else name
            yield Strategy(label, flags.strip(), rows, memory, memory.total <= limit, largest)
