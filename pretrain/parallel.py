"""Processes and devices: world-size arithmetic, Fabric with our strategies, sharding of the model."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from lit_files.platform import usable_cores
from lit_model.device import best_kind
from lit_model.init import initialise
from lit_model.kernels.cross_entropy import choose_loss
from lit_model.model import GPT
from pretrain.args import AUTO, RunArgs, TrainArgs
from pretrain.cluster_environment import environment_for_fabric
from pretrain.compiling import compile_blocks
from pretrain.fabric import DDPStrategy, Fabric, ModelParallelStrategy, Strategy
from pretrain.launch import WaitingNotice, find_launch, gpu_index

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule

# Of the computation; fp8 is the matter of lit_model/float8.py, everything else in such a run is bf16.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.bfloat16}


def uses_fsdp(args: RunArgs) -> bool:
    return args.strategy == "fsdp" and args.sharding_strategy != "NO_SHARD"


@dataclass(frozen=True)
class Placement:
    """The devices of a run and how they compute, fixed before any process starts.

    Attributes:
        kind: cpu, cuda or mps.
        devices: per node.
        fsdp: the ranks shard parameters, gradients and optimizer state.
        dtype: of the computation.
        casts_shards: FSDP gathers the weights in `dtype`; else autocast casts them, as without FSDP.
    """

    kind: str
    devices: int
    fsdp: bool
    dtype: torch.dtype
    casts_shards: bool

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision of one forward."""
        if self.dtype == torch.float32 or self.casts_shards:
            return nullcontext()
        return torch.autocast(self.kind, self.dtype)


def device_kind(args: RunArgs) -> str:
    """cpu, cuda or mps."""
    if args.accelerator == "auto":
        return best_kind()
    if args.accelerator == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "--accelerator cuda: torch finds no CUDA device here; use --accelerator cpu or check the driver"
        )
    if args.accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--accelerator mps: torch finds no Apple GPU here; use --accelerator cpu")
    return args.accelerator


def choose_placement(args: RunArgs) -> Placement:
    """Choose the devices and check the world-size arithmetic. Raises ValueError naming the flag that does not fit."""
    kind = device_kind(args)
    devices = (
        args.devices if isinstance(args.devices, int) else max(1, torch.cuda.device_count()) if kind == "cuda" else 1
    )
    launch = find_launch()
    if launch is None and args.num_nodes > 1 and not {"MASTER_ADDR", "NODE_RANK", "GROUP_RANK"} & set(os.environ):
        raise ValueError(
            f"--num_nodes {args.num_nodes}: this process cannot start others on other nodes; use srun "
            "(cluster/train.sbatch) or torchrun, or give --num_nodes 1"
        )
    if launch is not None and launch.by == "srun":
        if kind == "cuda":
            gpu_index(launch, torch.cuda.device_count())
    elif kind == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(f"--devices {devices}: this machine has {torch.cuda.device_count()} GPUs")
    if kind == "cpu" and args.precision == "fp16":
        raise ValueError("--precision fp16 is not supported on a CPU; use bf16 or fp32")
    if kind == "mps" and args.train.topology_invariant:
        raise ValueError(
            "--train.topology_invariant true sums in float64, which mps lacks; use --accelerator cpu, or leave it out"
        )
    if args.precision == "fp8" and kind == "mps":
        raise ValueError("--precision fp8 is not supported on mps; use bf16 or fp32")
    if args.precision == "fp8" and kind == "cuda" and not args.compile:
        raise ValueError(
            "--precision fp8 without --compile true is several times slower than bf16, since every cast is a kernel of "
            "its own; give --compile true, or --precision bf16"
        )
    choose_loss(args.train.loss_kernel, kind, DTYPES[args.precision])
    check_batch(args.train, devices * args.num_nodes)
    if (teacher := args.distillation.teacher_device) is not None and teacher != "cpu":
        number = int(teacher.partition(":")[2] or 0)
        if number >= torch.cuda.device_count():
            raise ValueError(
                f"--distillation.teacher_device {teacher}: this machine has {torch.cuda.device_count()} GPUs"
            )
        if devices > 1 and ":" in teacher:
            raise ValueError(
                f"--distillation.teacher_device {teacher}: {devices} devices would all put their teachers there; leave "
                "it out to put them beside the student (or shard them: --distillation.shard_teachers true)"
            )
    if args.sharding_strategy == "HYBRID_SHARD" and uses_fsdp(args) and args.num_nodes < 2 and devices % 2:
        raise ValueError("--sharding_strategy HYBRID_SHARD needs several nodes, or an even number of devices on one")
    fsdp = uses_fsdp(args)
    return Placement(kind, devices, fsdp, DTYPES[args.precision], fsdp and not args.train.topology_invariant)


def float8_fault(precision: str, device: torch.device) -> str | None:
    """Why --precision fp8 does not run on this device; None if it does, or with another precision."""
    if precision == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return f"--precision fp8: {torch.cuda.get_device_name(device)} has no float8 arithmetic"
    return None


def check_batch(args: TrainArgs, world_size: int) -> None:
    """Global batch = ranks x micro-batch x accumulation. Raises ValueError that names the nearest that fit."""
    batch = args.global_batch_samples
    micro_batch = 1 if args.micro_batch_samples == AUTO else args.micro_batch
    group = world_size * micro_batch
    if batch % group == 0:
        return
    near = _either([batch // group * group, -(-batch // group) * group])
    fitting = [m for m in range(1, batch // world_size + 1) if batch % (world_size * m) == 0]
    if fitting:
        smaller = max((m for m in fitting if m < micro_batch), default=0)
        larger = min((m for m in fitting if m > micro_batch), default=0)
        instead = f"micro-batches that fit {batch} are {_either([smaller, larger])} (--train.micro_batch_samples)"
    else:
        instead = f"no micro-batch fits {batch}, which is not a multiple of the {world_size} devices"
    raise ValueError(
        f"--train.global_batch_samples {batch} is not a multiple of devices x micro-batch = {world_size} x "
        f"{micro_batch} = {group}; the nearest are {near}; {instead}"
    )


def _either(numbers: list[int]) -> str:
    """Those that are not 0."""
    return " or ".join(str(n) for n in numbers if n)


def build_fabric(args: RunArgs, placement: Placement) -> Fabric:
    """Fabric with our strategies; starts or joins the processes."""
    devices, kind = placement.devices, placement.kind
    timeout = timedelta(seconds=args.timeout_s)
    strategy: str | Strategy = "auto"
    if placement.fsdp:
        strategy = ModelParallelStrategy(
            lambda model, mesh: parallelize(model, mesh, args, devices),
            data_parallel_size=devices * args.num_nodes,
            tensor_parallel_size=1,
            # Offloaded shards are summed and saved on the host.
            process_group_backend="cpu:gloo,cuda:nccl" if args.train.cpu_offload and kind == "cuda" else None,
            timeout=timeout,
        )
    elif args.strategy in ("ddp", "fsdp") or devices * args.num_nodes > 1:
        strategy = _DDPOnOneStream(gradient_as_bucket_view=True, timeout=timeout)
    launch, num_nodes = find_launch(), args.num_nodes
    environment = environment_for_fabric(launch)
    chosen: int | list[int] = devices
    if launch is not None and launch.by == "srun":  # see StepEnvironment
        num_nodes = launch.world_size
        chosen = [gpu_index(launch, torch.cuda.device_count())] if kind == "cuda" else 1
    fabric = Fabric(
        accelerator=kind,
        devices=chosen,
        num_nodes=num_nodes,
        strategy=strategy,
        precision="32-true",
        plugins=None if environment is None else [environment],
    )
    if "OMP_NUM_THREADS" not in os.environ and kind == "cpu":
        # A product's bits depend on the number of threads.
        torch.set_num_threads(1 if args.train.topology_invariant else max(1, usable_cores() // devices))
    with WaitingNotice(devices * args.num_nodes):
        fabric.launch()
    return fabric


class _DDPOnOneStream(DDPStrategy):
    """DDP built on the stream of the backward pass.

    Lightning up to 2.6.6 builds it on a stream of its own, so that torch orders the sum of each gradient behind two
    streams, and warns of it (Lightning issue 21567). No buffers are broadcast: GPT registers none.
    """

    def setup_module(self, module: torch.nn.Module) -> DistributedDataParallel:
        devices = [self.root_device.index] if self.root_device.type == "cuda" else None
        return DistributedDataParallel(module, device_ids=devices, **self._ddp_kwargs)


def parallelize(model: GPT, mesh: DeviceMesh, args: RunArgs, devices: int) -> GPT:
    """FSDP2: shard each block, then the root (embedding, last norm and head), then materialise and initialise."""
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    if args.compile:
        compile_blocks(model)
    dtype, exact = DTYPES[args.precision], args.train.topology_invariant
    options: dict[str, Any] = {
        "mesh": data_mesh(mesh, args, devices),
        "mp_policy": MixedPrecisionPolicy(
            param_dtype=None if dtype == torch.float32 or exact else dtype,
            reduce_dtype=torch.float64 if exact else DTYPES[args.train.reduce_dtype],
            cast_forward_inputs=False,  # the rotary tables stay float32; the embedding already gives param_dtype
        ),
        "reshard_after_forward": args.sharding_strategy != "SHARD_GRAD_OP",
    }
    if args.train.cpu_offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    for block in model.blocks():
        fully_shard(block, **options)
    fully_shard(model, **options)
    if args.train.prefetch_blocks:
        prefetch(model, args.train.prefetch_blocks)
    on_host = mesh.device_type != "cuda" or args.train.cpu_offload
    model.to_empty(device="cpu" if on_host else torch.device("cuda", torch.cuda.current_device()))
    initialise(model, model.config, args.seed)
    return model


def data_mesh(mesh: DeviceMesh, args: RunArgs, devices: int) -> DeviceMesh:
    """The ranks that data and state are spread over: one dimension, or with HYBRID_SHARD (replicate, shard).

    A group that shards is a node; on a single node half of it, so that there is something to replicate.
    """
    if args.sharding_strategy != "HYBRID_SHARD":
        return mesh["data_parallel"]
    inner = devices if args.num_nodes > 1 else devices // 2
    shape = (args.num_nodes * devices // inner, inner)
    return init_device_mesh(mesh.device_type, shape, mesh_dim_names=("replicate", "shard"))


def prefetch(model: GPT, n_blocks: int) -> None:
    """Gather `n_blocks` ahead of the block in work: the next ones in the forward, those before it in the backward."""
    blocks, root = cast("list[FSDPModule]", list(model.blocks())), cast("FSDPModule", model)
    root.set_modules_to_forward_prefetch(blocks[:n_blocks])
    root.set_modules_to_backward_prefetch(blocks[-n_blocks:][::-1])
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + n_blocks])
        block.set_modules_to_backward_prefetch(blocks[max(0, i - n_blocks) : i][::-1])
