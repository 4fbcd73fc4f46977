"""Detects the processes started by a launcher (srun, torchrun) from its environment variables.

The launcher decides how many processes run and where, which overrides a config; a contradicting flag is an error.
"""

from __future__ import annotations

import dataclasses
import os
import re
import threading
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from pretrain.args import AUTO, RunArgs, TrainArgs

# SLURM job names of interactive shells, where `python` runs as a single process, whatever the job size.
SHELLS = ("interactive", "bash", "sh", "zsh", "fish", "tcsh")
WAITING_S = 60.0  # before a process prints that it is waiting for the others

RANK_VARIABLES = ("RANK", "SLURM_PROCID", "LOCAL_RANK")


def is_first_process() -> bool:
    """Whether this process is rank 0 according to the environment, or spawns the others itself."""
    return all(os.environ.get(name, "0") == "0" for name in RANK_VARIABLES)


def rank_name() -> str:
    """The rank of this process according to the environment, for a message."""
    return next((os.environ[name] for name in RANK_VARIABLES if os.environ.get(name)), "0")


def is_rank() -> bool:
    """Whether this process is one of several, so that others may be waiting for it."""
    return any(name in os.environ for name in RANK_VARIABLES)


@dataclass(frozen=True)
class Launch:
    """World layout, and the ranks of this process. Each node runs `devices` processes."""

    by: Literal["srun", "torchrun"]
    world_size: int
    devices: int
    rank: int
    local_rank: int

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.devices


def find_launch(env: Mapping[str, str] | None = None) -> Launch | None:
    """Detect the launcher and this process's ranks; None: a single process, which may spawn others itself.

    Raises ValueError if nodes run different numbers of processes.
    """
    env = os.environ if env is None else env
    if "TORCHELASTIC_RUN_ID" in env and "LOCAL_WORLD_SIZE" in env:
        world_size, devices = int(env["WORLD_SIZE"]), int(env["LOCAL_WORLD_SIZE"])
        if world_size % devices:
            raise ValueError(
                f"torchrun started {world_size} processes, {devices} of them on this node: start as many on every node"
            )
        return Launch("torchrun", world_size, devices, int(env["RANK"]), int(env["LOCAL_RANK"]))
    # SLURM_PROCID is also set in a batch script; only srun sets the step variables.
    if "SLURM_STEP_ID" not in env or "SLURM_PROCID" not in env:
        return None
    world_size = int(env.get("SLURM_STEP_NUM_TASKS") or env.get("SLURM_NTASKS") or 1)
    if world_size == 1 and is_shell(env):
        return None
    nodes = int(env.get("SLURM_STEP_NUM_NODES") or env.get("SLURM_NNODES") or 1)
    # The job's counts apply to the step only if they add up to its number of tasks.
    places = next(
        (p for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE")
         if sum(p := tasks_per_node(env.get(name, ""))) == world_size),
        [world_size // nodes + (i < world_size % nodes) for i in range(nodes)],
    )  # fmt: skip
    if len(set(places)) > 1:
        raise ValueError(
            f"srun started {', '.join(map(str, places))} tasks on its {len(places)} nodes; each node needs the "
            "same number: give --ntasks-per-node and --nodes"
        )
    return Launch("srun", world_size, places[0], int(env["SLURM_PROCID"]), int(env.get("SLURM_LOCALID") or 0))


def tasks_per_node(text: str) -> list[int]:
    """SLURM's "2(x3),1" -> [2, 2, 2, 1]."""
    found = [re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part) for part in text.split(",") if part]
    return [int(match[1]) for match in found if match for _ in range(int(match[2] or 1))]


def is_shell(env: Mapping[str, str]) -> bool:
    """Whether this is a SLURM job with an interactive shell (salloc, srun --pty)."""
    return env.get("SLURM_JOB_NAME") in SHELLS or "SLURM_PTY_PORT" in env


def fit_to_launch(args: RunArgs, typed: Collection[str], configured: Collection[str]) -> tuple[RunArgs, list[str]]:
    """Settings with the launcher's number of nodes and devices, and messages to print about it.

    `typed` and `configured` are the settings given on the command line and in configs. A micro-batch that is not typed
    is lowered so that the devices share the rows of a step.

    Raises ValueError if --devices or --num_nodes on the command line contradict the launcher, or if a job with several
    tasks started a single process without srun.
    """
    launch = find_launch()
    if launch is None:
        lines = _alone(args, typed, os.environ)
        if args.devices == "auto":
            return args, lines
        args, more = share_batch(args, args.devices * args.num_nodes, typed)
        return args, [*lines, *more]
    lines, started = [], f"{launch.by} started {launch.devices} processes on each of {launch.num_nodes} nodes"
    for name, here in (("num_nodes", launch.num_nodes), ("devices", launch.devices)):
        asked = getattr(args, name)
        if asked in (here, "auto"):
            continue
        if name in typed:
            how = "--ntasks-per-node and --nodes" if launch.by == "srun" else "--nproc-per-node and --nnodes"
            raise ValueError(f"--{name} {asked} contradicts the launcher: {started}; remove the flag, or change {how}")
        if name in configured:
            lines.append(f"{started}: {name} {here} replaces the config's {asked}")
    args = dataclasses.replace(args, num_nodes=launch.num_nodes, devices=launch.devices)
    args, more = share_batch(args, launch.world_size, typed)
    lines += more
    if launch.by == "srun" and args.accelerator == "cpu" and "accelerator" not in typed and has_gpus(os.environ):
        lines.append("this SLURM job has GPUs: accelerator auto replaces the config's cpu (--accelerator cpu keeps it)")
        args = dataclasses.replace(args, accelerator="auto")
    return args, lines


def share_batch(args: RunArgs, world_size: int, typed: Collection[str]) -> tuple[RunArgs, list[str]]:
    """Lower the micro-batch to the largest one that divides each device's rows of a step, and say so in a message.

    Unchanged if it divides them already, if the rows do not divide over the devices, or if the micro-batch was typed or
    is measured (`auto`)."""
    if "train.micro_batch_samples" in typed or (fitting := _fitting(args.train, world_size)) is None:
        return args, []
    line = (
        f"train.micro_batch_samples {fitting} replaces {args.train.micro_batch_samples}: {world_size} devices share "
        f"the {args.train.global_batch_samples} rows of a step"
    )
    return dataclasses.replace(args, train=dataclasses.replace(args.train, micro_batch_samples=fitting)), [line]


def _alone(args: RunArgs, typed: Collection[str], env: Mapping[str, str]) -> list[str]:
    """Messages for a run without a launcher, where this process spawns the others, if any."""
    if "SLURM_JOB_ID" not in env or "LOCAL_RANK" in env:
        return []
    n_tasks = int(env.get("SLURM_NTASKS") or sum(tasks_per_node(env.get("SLURM_TASKS_PER_NODE", ""))) or 1)
    if n_tasks == 1 or "devices" in typed:
        return []
    problem = f"this SLURM job has {n_tasks} tasks, but this process was not started by srun"
    if is_shell(env):
        return [f"{problem}: it runs alone (`srun python pretrain/fabric_train.py ...` starts all tasks)"]
    raise ValueError(
        f"{problem}: start it with `srun python pretrain/fabric_train.py ...`, or give --devices N to run N processes "
        "on this node without srun"
    )


def _fitting(train: TrainArgs, world_size: int) -> int | None:
    """The largest smaller micro-batch that divides the global batch evenly over the devices; None if the current one
    does already, or none does."""
    per_device, left = divmod(train.global_batch_samples, world_size)
    if left or train.micro_batch_samples == AUTO or per_device % train.micro_batch == 0:
        return None
    return max(m for m in range(1, min(per_device, train.micro_batch) + 1) if per_device % m == 0)


def has_gpus(env: Mapping[str, str]) -> bool:
    """Whether SLURM gave GPUs to this job or step."""
    return bool(env.get("SLURM_STEP_GPUS") or env.get("SLURM_JOB_GPUS") or env.get("SLURM_GPUS_ON_NODE", "0") != "0")


def gpu_index(launch: Launch, n_visible: int, env: Mapping[str, str] | None = None) -> int:
    """Index of this process's GPU among the visible ones. Raises ValueError if there are too few for all processes.

    With --gpus-per-task or --gpu-bind each srun task sees only its own GPU, as index 0.
    """
    env = os.environ if env is None else env
    if n_visible >= launch.devices:
        return launch.local_rank
    on_node = env.get("SLURM_GPUS_ON_NODE", "")
    bound = n_visible == 1 or "SLURM_GPUS_PER_TASK" in env or "SLURM_GPU_BIND" in env
    if n_visible == 0 or not bound or (on_node.isdigit() and 0 < int(on_node) < launch.devices):
        n = int(on_node) if on_node.isdigit() and bound else n_visible
        raise ValueError(
            f"{launch.by} started {launch.devices} processes on this node, which has {n} GPUs: start one for each GPU"
        )
    return 0


class WaitingNotice:
    """Prints after a minute of start-up, in each process, that it is waiting for the others."""

    def __init__(self, world_size: int) -> None:
        message = f"rank {rank_name()} is still waiting for the other ranks: {world_size} processes must be started"
        self.timer = threading.Timer(WAITING_S, print, [message], {"flush": True})
        self.timer.daemon = True

    def __enter__(self) -> None:
        self.timer.start()

    def __exit__(self, *_: object) -> None:
        self.timer.cancel()
