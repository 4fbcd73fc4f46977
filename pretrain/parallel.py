"""Processes and devices: world-size arithmetic, Fabric with our strategies, sharding of the model."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from lit_model.init import initialise
from lit_model.model import GPT
from pretrain.args import RunArgs

T = TypeVar("T")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def uses_fsdp(args: RunArgs) -> bool:
    return args.strategy == "fsdp" and args.sharding_strategy != "NO_SHARD"


def device_kind(args: RunArgs) -> str:
    """cpu, cuda or mps."""
    if args.accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--accelerator cuda: torch finds no CUDA device here; use --accelerator cpu or check the driver"
        )
    return args.accelerator


def check_shapes(args: RunArgs) -> int:
    """World-size arithmetic, before any process starts. Returns the number of devices per node."""
    kind = device_kind(args)
    devices = (
        args.devices if isinstance(args.devices, int) else max(1, torch.cuda.device_count()) if kind == "cuda" else 1
    )
    if kind == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs")
    if kind == "cpu" and args.precision == "fp16":
        raise ValueError("--precision fp16 is not supported on a CPU; use bf16 or fp32")
    world = devices * args.num_nodes
    group = world * args.train.micro_batch_samples
    batch = args.train.global_batch_samples
    if batch % group:
        below, above = batch // group * group, -(-batch // group) * group
        near = " or ".join(str(b) for b in (below, above) if b)
        raise ValueError(
            f"--train.global_batch_samples {batch} is not a multiple of devices x micro-batch = {world} x "
            f"{args.train.micro_batch_samples} = {group}; the nearest are {near}"
        )
    if args.sharding_strategy == "HYBRID_SHARD" and uses_fsdp(args) and args.num_nodes < 2 and devices % 2:
        raise ValueError("--sharding_strategy HYBRID_SHARD needs several nodes, or an even number of devices on one")
    return devices


def build_fabric(args: RunArgs, devices: int) -> Fabric:
    """Fabric with our strategies; `launch` starts or joins the processes."""
    timeout = timedelta(seconds=args.timeout_s)
    strategy: str | Strategy = "auto"
    if uses_fsdp(args):
        strategy = ModelParallelStrategy(
            lambda model, mesh: parallelize(model, mesh, args, devices),
            data_parallel_size=devices * args.num_nodes,
            tensor_parallel_size=1,
            timeout=timeout,
        )
    elif args.strategy in ("ddp", "fsdp") or devices * args.num_nodes > 1:
        strategy = DDPStrategy(gradient_as_bucket_view=True, broadcast_buffers=False, timeout=timeout)
    fabric = Fabric(
        accelerator=device_kind(args), devices=devices, num_nodes=args.num_nodes, strategy=strategy, precision="32-true"
    )
    if "OMP_NUM_THREADS" not in os.environ and device_kind(args) == "cpu":
        torch.set_num_threads(max(1, affinity_count() // devices))
    fabric.launch()
    return fabric


def affinity_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def parallelize(model: GPT, mesh: DeviceMesh, args: RunArgs, devices: int) -> GPT:
    """FSDP2: shard each block, then the root (embedding, last norm and head), then materialise and initialise."""
    compile_blocks(model, args)
    dtype = DTYPES[args.precision]
    policy = MixedPrecisionPolicy(
        param_dtype=None if dtype == torch.float32 else dtype,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,  # the rotary tables stay float32; the embedding already gives param_dtype
    )
    if args.sharding_strategy == "HYBRID_SHARD":
        inner = devices if args.num_nodes > 1 else devices // 2
        shape = (args.num_nodes * devices // inner, inner)
        data_mesh = init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))
    else:
        data_mesh = mesh["data_parallel"]
    reshard = args.sharding_strategy != "SHARD_GRAD_OP"
    for block in model.blocks():
        fully_shard(block, mesh=data_mesh, mp_policy=policy, reshard_after_forward=reshard)
    fully_shard(model, mesh=data_mesh, mp_policy=policy, reshard_after_forward=reshard)
    device = torch.device(mesh.device_type, torch.cuda.current_device()) if mesh.device_type == "cuda" else "cpu"
    model.to_empty(device=device)
    initialise(model, model.config, args.seed)
    return model


def compile_blocks(model: GPT, args: RunArgs) -> None:
    """torch.compile block by block: one graph for all of them, and sharding stays outside of it."""
    if args.compile:
        for block in model.blocks():
            block.compile()


def on_rank_zero(fabric: Fabric, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and give every rank its result, or its mistake (ValueError, FileNotFoundError)."""
    outcome: tuple[str, Any] = ("", None)
    if fabric.global_rank == 0:
        try:
            outcome = ("result", work())
        except (ValueError, FileNotFoundError) as error:
            outcome = (type(error).__name__, str(error))
    kind, value = fabric.broadcast(outcome)
    if kind == "result":
        return value  # type: ignore[no-any-return]
    raise (FileNotFoundError if kind == "FileNotFoundError" else ValueError)(value)
