"""The launcher (srun, torchrun or none) determines the number of processes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from running import ROOT, flags, metrics, same_checkpoints, train, warm_python, write_dataset
from slurm_stand_ins import Cluster

from pretrain import fabric_train, launch, parallel
from pretrain.cluster_environment import StepEnvironment
from pretrain.launch import Launch, find_launch, gpu_index, tasks_per_node
from pretrain.parallel import check_batch

CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
SAVES_ENVIRONMENT = '#!/usr/bin/env bash\nenv -0 >"$FAKE_SLURM/environment-$SLURM_PROCID"\n'


def step(n_tasks: int, per_node: str, rank: int = 0, local_rank: int = 0, **more: str) -> dict[str, str]:
    """The variables of a task of srun."""
    nodes = str(len(tasks_per_node(per_node)))
    return {
        "SLURM_JOB_ID": "4711",
        "SLURM_JOB_NAME": "llammlein",
        "SLURM_NTASKS": str(n_tasks),
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": str(n_tasks),
        "SLURM_STEP_NUM_NODES": nodes,
        "SLURM_STEP_TASKS_PER_NODE": per_node,
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(local_rank),
        **more,
    }


# An sbatch script: not a job step, although it has SLURM_PROCID.
SCRIPT = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_dataset(folder / "train", np.random.default_rng(7).integers(1, 90, size=90).tolist())
    write_dataset(folder / "val", [30, 40], seed=1)
    return folder


@pytest.fixture
def inside(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Set exactly these variables of SLURM and torchrun, as in a job."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_", "MASTER_")) or name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)

    def put(env: dict[str, str]) -> None:
        for name, value in env.items():
            monkeypatch.setenv(name, value)

    return put


@pytest.mark.parametrize(
    ("env", "found"),
    [
        (step(8, "4(x2)", 5, 1), Launch("srun", 8, 4, 5, 1)),
        ({**step(2, "2", 1, 1), "SLURM_NTASKS": "8", "SLURM_NNODES": "2"}, Launch("srun", 2, 2, 1, 1)),  # srun -n 2
        # Without --ntasks-per-node, which Lightning refuses; and without the newer variables of the step.
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
         Launch("srun", 4, 2, 3, 1)),
        # srun in a shell of salloc: Lightning would treat each task as a separate run.
        (step(4, "4", 2, 2, SLURM_JOB_NAME="interactive"), Launch("srun", 4, 4, 2, 2)),
        (step(1, "1"), Launch("srun", 1, 1, 0, 0)),
        (step(1, "1", SLURM_JOB_NAME="bash"), None),  # python in srun --pty bash
        (step(1, "1", SLURM_PTY_PORT="4242"), None),
        (SCRIPT, None),
        ({"SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "interactive", "SLURM_NTASKS": "4"}, None),  # python in salloc
        ({}, None),
        ({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1"},
         Launch("torchrun", 4, 2, 3, 1)),
        # torchrun started by one task of srun on each node.
        ({**step(2, "1(x2)", 1), "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "RANK": "5",
          "LOCAL_RANK": "1"}, Launch("torchrun", 8, 4, 5, 1)),
    ],
)  # fmt: skip
def test_what_started_this_process(env: dict[str, str], found: Launch | None) -> None:
    """Srun's step, a script without srun, interactive shells, torchrun inside and outside of SLURM."""
    assert find_launch(env) == found


def test_nodes_with_different_numbers_of_tasks() -> None:
    """SLURM_TASKS_PER_NODE "2(x3),1" is refused with its numbers."""
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1]
    with pytest.raises(ValueError, match=r"started 2, 2, 2, 1 tasks on its 4 nodes.*--ntasks-per-node"):
        find_launch(step(7, "2(x3),1"))
    with pytest.raises(ValueError, match=r"started 2, 1 tasks on its 2 nodes"):
        find_launch({"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_NTASKS": "3", "SLURM_NNODES": "2"})


@pytest.mark.parametrize("script", ["train", "debug"])
def test_every_config_under_the_jobs(script: str, tmp_path: Path, inside: Any) -> None:
    """Each config, with the environment and command line of the job's tasks: the world size is SLURM's, and the
    rows of a step are divisible by the devices.
    """
    cluster = Cluster(tmp_path)
    cluster.fake_python()
    (cluster.bin / "python").write_text(SAVES_ENVIRONMENT + 'printf "%s\\n" "$*" >>"$FAKE_SLURM/python"\n')
    size = ("--nodes=2", "--ntasks-per-node=2") if script == "train" else ()
    status, output = cluster.run("sbatch", *size, f"cluster/{script}.sbatch", "--config", "CONFIG")
    assert status == 0, output
    devices, nodes = (2, 2) if script == "train" else (1, 1)
    for rank in range(devices * nodes):
        text = (cluster.state / f"environment-{rank}").read_text()
        inside(dict(line.split("=", 1) for line in text.split("\0") if line.startswith("SLURM_")))
        found = find_launch()
        assert found is not None and (found.world_size, found.rank) == (devices * nodes, rank)
        for path in CONFIGS if rank == devices * nodes - 1 else ():
            line = cluster.calls("python")[0].removeprefix("pretrain/fabric_train.py ").replace("CONFIG", str(path))
            synthetic = "synthetic:" in path.read_text(encoding="utf-8")
            args = fabric_train.parse([*line.split(), *([] if synthetic else ["--data.train=x"])])
            assert (args.num_nodes, args.devices) == (nodes, devices), path
            check_batch(args.train, args.num_nodes * args.devices)
            # debug.sbatch has a GPU, and configs for a CPU use it; a job without GPUs does not.
            assert (args.accelerator == "cpu") == (script == "train" and path.stem in ("debug", "synthetic")), path


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_through_sbatch(path: Path, tmp_path: Path) -> None:
    """With real processes: a preflight of each config in a job of two tasks reports two processes."""
    cluster = Cluster(tmp_path)
    (cluster.bin / "python").symlink_to(warm_python())
    small = ["--accelerator=cpu", "--precision=fp32", "--data.train=nowhere", "--preflight"]
    small = [s for s in small if "synthetic:" not in path.read_text(encoding="utf-8") or "nowhere" not in s]
    size = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")
    _, output = cluster.run("sbatch", *size, "cluster/train.sbatch", "--config", path, "--out_dir=run", *small)
    assert "Preflight: 2 x cpu" in output, output


def test_a_job_trains_with_as_many_processes_as_slurm_started(data: Path, tmp_path: Path) -> None:
    """train.sbatch with --ntasks (without --ntasks-per-node) and a config for one device: two processes, with the
    same weights as two processes started otherwise. The config's accelerator is kept: the job has no GPUs.
    """
    cluster = Cluster(tmp_path)
    (cluster.bin / "python").symlink_to(warm_python())
    (tmp_path / "c.yaml").write_text("devices: 1\nnum_nodes: 16\naccelerator: cpu\n")
    settings = {"accelerator": None, "devices": None, "train__max_steps": 3, "eval__every_steps": 100}
    run, other = tmp_path / "run", tmp_path / "other"
    line = [f"--config={tmp_path / 'c.yaml'}", *flags(data, run, **settings)]
    status, output = cluster.run(
        "sbatch", "--nodes=1", "--ntasks=2", "--cpus-per-task=1", "cluster/train.sbatch", *line
    )
    assert status == 0, output
    assert output.count("srun started 2 processes on each of 1 nodes: devices 2 replaces the config's 1") == 1
    assert "devices  2 x cpu" in output and len(metrics(run)) > 0
    train(*flags(data, other, **{**settings, "accelerator": "cpu"}), "--devices=2", "--num_nodes=1")
    same_checkpoints(run / "iter-00000003-ckpt.pth", other / "iter-00000003-ckpt.pth")


def test_srun_without_devices(data: Path, tmp_path: Path, inside: Any) -> None:
    """`srun python fabric_train.py` used to be an IndexError on the second rank."""
    inside(step(2, "2", 1, 1))
    args = fabric_train.parse(flags(data, tmp_path, devices=None))
    assert parallel.choose_placement(args).devices == 2


@pytest.mark.parametrize(
    ("typed", "named"),
    [("--devices=3", "--devices 3"), ("--num_nodes=2", "--num_nodes 2"), ("--devices=1", "--devices 1")],
)
def test_flags_that_contradict_srun(
    typed: str, named: str, data: Path, tmp_path: Path, inside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only contradicting flags on the command line are refused; preflight reports the same."""
    inside(step(2, "2"))
    for more in ([], ["--preflight"]):
        assert fabric_train.main([*flags(data, tmp_path / "run", devices=None), typed, *more]) == 2
        error = capsys.readouterr().err
        assert f"error: {named} contradicts the launcher: srun started 2 processes on each of 1 nodes" in error
    fabric_train.parse([*flags(data, tmp_path / "run", devices=None), "--devices=2", "--num_nodes=1"])


@pytest.mark.parametrize("devices", [None, 4], ids=["srun", "--devices"])
def test_a_configs_micro_batch_adapts_to_the_number_of_devices(
    devices: int | None, inside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """A config for one device whose micro-batch is the whole step; one given as a flag is an error."""
    if devices is None:
        inside(step(4, "4"))
    config = ["--config", str(ROOT / "configs/babylm2025/gemma2.yaml"), "--data.train=x"]
    config += [] if devices is None else [f"--devices={devices}"]
    assert fabric_train.parse(config).train.micro_batch_samples == 4
    assert "train.micro_batch_samples 4 replaces 16: 4 devices share the 16 rows of a step" in capsys.readouterr().err
    assert fabric_train.parse([*config, "--train.micro_batch_samples=16"]).train.micro_batch_samples == 16


@pytest.mark.parametrize("preflight", [[], ["--preflight"]])
def test_a_job_without_srun(
    preflight: list[str], data: Path, tmp_path: Path, inside: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Four tasks and one process: used to wait silently for 1800 s, now an immediate error."""
    inside(SCRIPT)
    assert fabric_train.main([*flags(data, tmp_path / "run", devices=None), *preflight]) == 2
    error = capsys.readouterr().err
    assert "this SLURM job has 4 tasks, but this process was not started by srun" in error and "srun python" in error
    assert not (tmp_path / "run").exists()


def test_a_job_without_srun_on_purpose(data: Path, tmp_path: Path, inside: Any, capsys: Any) -> None:
    """Tasks requested as cores, with --devices on the command line; and a shell of salloc, which gets a message."""
    inside({**SCRIPT, "SLURM_NTASKS": "", "SLURM_TASKS_PER_NODE": "4"})
    args = fabric_train.parse(flags(data, tmp_path / "run"))
    fabric = parallel.build_fabric(args, parallel.choose_placement(args))
    assert (fabric.world_size, fabric.global_rank) == (1, 0)
    inside({"SLURM_JOB_NAME": "interactive"})
    fabric_train.parse(flags(data, tmp_path / "run", devices=None))
    assert "has 4 tasks, but this process was not started by srun: it runs alone" in capsys.readouterr().err


def test_nodes_without_a_launcher(data: Path, tmp_path: Path, inside: Any, capsys: Any) -> None:
    """configs/llammlein_7B.yaml on a workstation would wait for 16 nodes."""
    inside({})
    assert fabric_train.main([*flags(data, tmp_path / "run"), "--num_nodes=16"]) == 2
    assert "--num_nodes 16: this process cannot start others on other nodes" in capsys.readouterr().err


def test_which_gpu_a_task_uses() -> None:
    """All GPUs of the node visible; only one, by --gpus-per-task or --gpu-bind; too few."""
    third = Launch("srun", 8, 4, 6, 2)
    assert gpu_index(third, 4, {}) == 2
    assert gpu_index(third, 1, {}) == gpu_index(third, 1, {"SLURM_GPUS_ON_NODE": "4"}) == 0
    assert gpu_index(third, 2, {"SLURM_GPUS_PER_TASK": "2"}) == 0
    for visible, env in ((2, {}), (0, {}), (1, {"SLURM_GPUS_ON_NODE": "1"})):
        with pytest.raises(ValueError, match="started 4 processes on this node, which has"):
            gpu_index(third, visible, env)


def test_one_visible_gpu_per_task_is_accepted(data: Path, tmp_path: Path, inside: Any, monkeypatch: Any) -> None:
    """With one GPU visible to each of four tasks the sizes are those of four devices."""
    inside(step(4, "4", 3, 3))
    monkeypatch.setattr(parallel, "device_kind", lambda args: "cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    args = fabric_train.parse(flags(data, tmp_path, devices=None, accelerator=None))
    assert parallel.choose_placement(args).devices == 4


def test_where_the_tasks_rendezvous(inside: Any) -> None:
    """At the first node of the step, not of the job; steps of one job use different ports."""
    inside(step(2, "1(x2)", SLURM_STEP_NODELIST="node[07-08]", SLURM_NODELIST="node[01-08]", SLURM_STEP_ID="3"))
    found = find_launch()
    assert found is not None
    assert (StepEnvironment(found).main_address, StepEnvironment(found).main_port) == ("node07", 15000 + 4714)


def test_waiting_is_reported(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A rank that waits for others that were never started prints a message."""
    monkeypatch.setattr(launch, "WAITING_S", 0.0)
    with launch.WaitingNotice(4) as _:
        subprocess.run(["sleep", "0.2"], check=True)
    assert "rank 0 is still waiting for the other ranks: 4 processes" in capfd.readouterr().out
