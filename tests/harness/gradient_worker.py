"""Trains in forked ranks; reports the gradients of some steps and whether a checkpoint was loaded exactly.

    python tests/harness/gradient_worker.py

reads requests from standard input and answers on standard output, one JSON object per line (see `train`). Importing
torch and Lightning takes seconds, a fork a few milliseconds, and strategy tests have many runs. Nothing that a fork
would break exists before it: no process group, and no library thread.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import pretrain.loop
import pretrain.muon
from lit_model.config import ModelConfig
from lit_model.load import Checkpoint
from lit_model.model import parameter_shapes
from pretrain.args import OptimArgs, RunArgs
from pretrain.build import set_up
from pretrain.fabric_train import parse
from pretrain.muon import Muon, newton_schulz
from pretrain.optim import clip_coefficient, gradient_norm, scale_gradients
from pretrain.run import Run


def train(request: dict[str, Any]) -> list[int]:
    """Fork the ranks of a run and wait for them. Returns their exit statuses.

    The request:
        world_size, arguments: ranks and command line; without a command line they clip gradients on several meshes,
            or with `muon`, a model config, compare a sharded optimizer with an unsharded one.
        report: path prefix of each rank's output (REPORT-R.log) and of the gradients (REPORT.pt).
        gradient_steps: steps (0-based) whose gradients are reported, before clipping.
        loaded: path of a checkpoint that the state must equal before the first step, or null.
        timeout_s: after this, everything is killed.
    """
    # Bound but not listening: reserves the port, and rank 0 can still bind it, as both set SO_REUSEADDR.
    reserved = socket.socket()
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("127.0.0.1", 0))
    args = parse(request["arguments"]) if "arguments" in request else None
    ranks = []
    for rank in range(request["world_size"]):
        pid = os.fork()
        if pid == 0:
            try:
                become(rank, request, reserved.getsockname()[1])
                if args is not None:
                    work(args, request)
                else:
                    muon_on_meshes(request) if "muon" in request else clip_on_meshes(request)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)  # interpreter teardown takes longer than most runs here
        ranks.append(pid)
    statuses, deadline = [], time.monotonic() + request["timeout_s"]
    for pid in ranks:
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            # The other ranks would wait for a failed one.
            if time.monotonic() > deadline or any(statuses):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.002)
        statuses.append(os.waitstatus_to_exitcode(done[1]))
    reserved.close()
    return statuses


def become(rank: int, request: dict[str, Any], port: int) -> None:
    """Turn a forked child into a rank as torchrun would start it, with its output in a file."""
    output = os.open(f"{request['report']}-{rank}.log", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
        os.dup2(descriptor, target)
    world = str(request["world_size"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked"}


def work(args: RunArgs, request: dict[str, Any]) -> None:
    """One rank's run."""
    run = set_up(args)
    if request["loaded"] is not None:
        check_loaded(run, Path(request["loaded"]))
    steps: dict[int, dict[str, Any]] = {}
    train_step = pretrain.loop.train_step

    def watched_step(run: Run, data: Any, *more: Any) -> Any:
        if data.step in request["gradient_steps"]:
            steps[data.step] = {"counts": everyone([m.n_targets for m in data.micro_batches])}
        return train_step(run, data, *more)

    def watched_norm(*arguments: Any) -> Tensor:
        seen = steps.get(run.step)
        if seen is not None:
            gradients = {n: p.grad for n, p in run.raw_model.named_parameters()}
            seen["gradients"] = {n: whole(g).clone() for n, g in gradients.items() if g is not None}
        norm = gradient_norm(*arguments)
        if seen is not None:
            seen["norm"] = norm
        return norm

    pretrain.loop.gradient_norm, pretrain.loop.train_step = watched_norm, watched_step
    pretrain.loop.fit(run)
    if run.fabric.global_rank == 0:
        torch.save(steps, f"{request['report']}.pt")
    run.close()


def check_loaded(run: Run, path: Path) -> None:
    """Assert that the state of this run equals a checkpoint, read unsharded."""
    checkpoint, state = Checkpoint(path), run.tensors()
    assert set(checkpoint.names()) == set(state)
    for name, tensor in state.items():
        assert torch.equal(whole(tensor), checkpoint.tensor(name)), name


def clip_on_meshes(request: dict[str, Any]) -> None:
    """Clip plain gradients and those on a line and on a square of 4 ranks together; (norm, expected) to REPORT.pt."""
    dist.init_process_group("gloo")
    line = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    layouts: list[tuple[DeviceMesh, list[Placement]] | None] = [
        None,
        (line, [Shard(0)]),
        (line, [Replicate()]),
        (square, [Replicate(), Shard(0)]),
        (square, [Shard(0), Shard(1)]),
        (square, [Replicate(), Replicate()]),
    ]
    generator = torch.Generator().manual_seed(0)
    wholes, parameters = [], []
    for layout in layouts:
        gradient = torch.randn(5, 3, generator=generator)  # 5 rows: some of 4 ranks get none
        wholes.append(gradient.clone())
        if layout is not None:
            gradient = distribute_tensor(gradient, *layout)
        parameter = torch.nn.Parameter(torch.zeros_like(gradient))
        parameter.grad = gradient
        parameters.append(parameter)
    norm = gradient_norm(parameters)
    coefficient = clip_coefficient(norm, 0.5)
    assert coefficient is not None
    scale_gradients(parameters, coefficient)
    clipped = [whole(p.grad) for p in parameters if p.grad is not None]
    if dist.get_rank() == 0:
        torch.save({"norm": norm, "gradients": wholes, "clipped": clipped}, f"{request['report']}.pt")


def muon_on_meshes(request: dict[str, Any]) -> None:
    """Three steps of Muon with rows sharded over a line and a square of 4 ranks, and unsharded: matrices to REPORT.pt.

    Also how many matrices each rank orthogonalized.
    """
    dist.init_process_group("gloo")
    config = ModelConfig.from_dict(request["muon"])
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    layouts: dict[str, tuple[DeviceMesh, list[Placement]] | None] = {
        "whole": None,
        "line": (init_device_mesh("cpu", (4,)), [Shard(0)]),
        "square": (square, [Replicate(), Shard(0)]),
    }
    count = 0

    def counted(x: Tensor) -> Tensor:
        nonlocal count
        count += x.numel() // (x.shape[-1] * x.shape[-2])
        return newton_schulz(x)

    pretrain.muon.newton_schulz = counted
    report: dict[str, Any] = {}
    for name, layout in layouts.items():
        generator, count = torch.Generator().manual_seed(0), 0

        def draw(shape: tuple[int, ...], place: Any = layout, generator: torch.Generator = generator) -> Tensor:
            drawn = torch.randn(shape, generator=generator)
            return drawn if place is None else distribute_tensor(drawn, *place)

        parameters = {n: torch.nn.Parameter(draw(shape)) for n, shape in parameter_shapes(config).items()}
        optimizer = Muon(parameters.items(), OptimArgs(name="muon", weight_decay=0.3), config)
        for _ in range(3):
            for p in parameters.values():
                p.grad = draw(tuple(p.shape))
            optimizer.step(0.02)
        report[name] = {n: whole(p.detach()) for n, p in optimizer.matrices.items()}
        report[f"orthogonalized on a {name}"] = everyone(count)
    if dist.get_rank() == 0:
        torch.save(report, f"{request['report']}.pt")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a DTensor (a collective: every rank must call it), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everyone(value: Any) -> list[Any]:
    """Gather `value` from every rank."""
    values = [value]
    if dist.is_initialized():
        values = [None] * dist.get_world_size()
        dist.all_gather_object(values, value)
    return values


if __name__ == "__main__":
    gc.freeze()  # keeps garbage collection in a fork from touching pages shared with this process
    for line in sys.stdin:
        assert not dist.is_initialized() and len(os.listdir("/proc/self/task")) == 1
        print(json.dumps(train(json.loads(line))), flush=True)
