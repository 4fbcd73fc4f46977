"""The job scripts of cluster/ are executed, with stand-ins for SLURM and Apptainer on PATH; llammlein.def is checked.

The stand-ins in fake_slurm/ start local processes with SLURM's variables. Tests of the job's decisions alone also
replace `python` by a stand-in that exits with given statuses.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from running import ROOT, flags, metrics, train, warm_python, write_dataset
from slurm_stand_ins import CLUSTER, PYTHON, STAND_INS, Cluster, wait_for

from lit_data.record.trace import open_run
from lit_data.record.verify import verify
from lit_files.checkpoint_name import list_checkpoints
from lit_model.load import Checkpoint

SCRIPTS = sorted([*CLUSTER.glob("*.sh"), *CLUSTER.glob("*.sbatch")])
SIZE = ("--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=1")


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


# Shell and definition file


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_syntax(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    text = script.read_text()
    assert script.name == "job.sh" or (os.access(script, os.X_OK) and text.startswith("#!/usr/bin/env bash\n"))
    assert script.name == "job.sh" or "set -euo pipefail" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    subprocess.run(["shellcheck", *map(str, SCRIPTS), str(CLUSTER / "env.example")], check=True)
    shells = [path for path in sorted(STAND_INS.iterdir()) if "bash" in path.read_text().splitlines()[0]]
    subprocess.run(["shellcheck", *map(str, shells)], check=True)


def test_jobs_contain_no_hyperparameters() -> None:
    for script in SCRIPTS:
        for flag in re.findall(r"--(\w+\.\w+)", script.read_text()):
            assert flag == "stop.exit_code", f"{script.name}: {flag}"


SECTIONS = ("arguments", "environment", "files", "help", "labels", "post", "runscript", "setup", "startscript", "test")


def read_definition() -> tuple[dict[str, str], list[tuple[str, str]]]:
    """The header, and the sections in order, with the build arguments' defaults substituted."""
    head, *parts = re.split(r"^%", (ROOT / "llammlein.def").read_text(), flags=re.MULTILINE)
    lines = [line for line in head.splitlines() if line.strip() and not line.startswith("#")]
    header = dict(line.split(": ", 1) for line in lines)
    sections = [(part.split("\n", 1)[0], part.split("\n", 1)[1]) for part in parts]
    (arguments,) = [body for name, body in sections if name == "arguments"]
    defaults = dict(line.strip().split("=", 1) for line in arguments.splitlines() if line.strip())
    fill = lambda body: re.sub(r"\{\{ (\w+) \}\}", lambda match: defaults[match[1]], body)  # noqa: E731
    return header, [(name, fill(body)) for name, body in sections]


def test_definition_has_known_sections_and_existing_files() -> None:
    header, sections = read_definition()
    assert list(header) == ["Bootstrap", "From"] and header["Bootstrap"] == "docker"
    assert re.fullmatch(r"pytorch/pytorch:\d+\.\d+\.\d+-cuda\d+\.\d+-cudnn\d+-devel", header["From"])
    assert {name for name, _ in sections} <= set(SECTIONS)
    for name, body in sections:
        assert all(line.startswith("    ") for line in body.splitlines() if name == "files" and line.strip())
        for line in body.split("\n") if name == "files" else ():
            assert not line or (ROOT / line.split()[0]).is_file(), line


@pytest.mark.parametrize("section", ["post", "environment", "test"])
def test_shell_of_the_definition(section: str, tmp_path: Path) -> None:
    script = tmp_path / "section.sh"
    script.write_text("#!/bin/sh\n" + "".join(body for name, body in read_definition()[1] if name == section))
    subprocess.run(["sh", "-n", str(script)], check=True)
    if shutil.which("shellcheck") is not None:
        # SC2050: a build argument is a constant once substituted.
        subprocess.run(["shellcheck", "--exclude=SC2050", str(script)], check=True)


def test_requirements_of_the_definition(tmp_path: Path) -> None:
    """The pyproject.toml entries it reads exist; the pinned torch and flash-attn satisfy the project's bounds."""
    header, sections = read_definition()
    post = "".join(body for name, body in sections if name == "post")
    script = re.search(r"python -c '\n(import tomllib.*?)' > requirements.txt", post, flags=re.DOTALL)
    assert script is not None
    made = subprocess.run([sys.executable, "-c", script[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    names = {Requirement(line).name for line in made.stdout.splitlines()}
    assert {"torch", "lightning-fabric", "transformers", "datasets", "pytest", "wandb", "tensorboard"} <= names
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    torch_version = header["From"].split(":")[1].split("-")[0]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    bounds = [Requirement(line) for line in [*project["dependencies"], *lines] if re.match(r"torch\W", line)]
    assert len(bounds) == 2 and all(torch_version in bound.specifier for bound in bounds)
    (pinned,) = re.findall(r"flash_attn=(flash-attn==\S+)", (CLUSTER / "build_image.sh").read_text())
    (version,) = Requirement(pinned).specifier
    assert version.version in Requirement(project["optional-dependencies"]["flash"][0]).specifier
    assert pinned in (ROOT / "llammlein.def").read_text()


def test_build_image(cluster: Cluster) -> None:
    image = cluster.checkout / "new.sif"
    status, output = cluster.run("cluster/build_image.sh", image)
    assert status == 0 and f"built {image}" in output and image.exists()
    assert "flash_attn=fa4" in cluster.calls("apptainer")[0]
    status, output = cluster.run("cluster/build_image.sh", image)
    assert status == 2 and "exists already" in output
    status, _ = cluster.run("cluster/build_image.sh", "--flash_attn", "compile", cluster.checkout / "flash.sif")
    assert status == 0 and "flash_attn=flash-attn==2.8.3" in cluster.calls("apptainer")[1]


# Which jobs are requeued


@pytest.mark.parametrize(
    ("statuses", "restarts", "end"),
    [
        ([0], 0, 0),
        ([1, 0], 0, 1),
        ([2, 0], 0, 2),
        ([75, 0], 1, 0),  # a signal that the job script did not see: preempted with a grace time
        ([76, 0], 1, 0),
        (["killed", 0], 1, 0),
        ([76, "killed", 76, 76, 0], 3, 76),
        ([76, 76, 75, 76, 76, 76, 0], 6, 0),  # counted since the last clean stop
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_which_jobs_are_requeued(cluster: Cluster, statuses: list[object], restarts: int, end: int) -> None:
    cluster.fake_python(*statuses)
    status, output = cluster.run("sbatch", *SIZE, "cluster/train.sbatch", "--config", "configs/a b.yaml")
    assert (status, cluster.restarts()) == (end, restarts), output
    assert len(cluster.calls("python")) == 2 * (restarts + 1)
    assert set(cluster.calls("python")) == {
        "pretrain/fabric_train.py --resume auto --config configs/a b.yaml --stop.exit_code 75"
    }
    left = list(cluster.checkout.glob("*.restarts"))
    assert len(left) == (end == 76), left


def test_number_of_restarts_is_configured(cluster: Cluster) -> None:
    cluster.fake_python(76, 76, 76)
    (cluster.checkout / "cluster" / "env").write_text("export LLAMMLEIN_MAX_RESTARTS=1\n")
    status, output = cluster.run("sbatch", *SIZE, "cluster/train.sbatch")
    assert status == 76 and cluster.restarts() == 1 and "after 1 restarts (LLAMMLEIN_MAX_RESTARTS)" in output


@pytest.mark.parametrize(
    ("task", "to_the_script", "caught", "restarts", "end"),
    [
        ("wait", "USR1", "USR1", 1, 0),
        ("deaf", "USR1", None, 1, 0),  # during its imports
        ("wait", "TERM", "TERM", 0, 0),
        ("deaf", "TERM", None, 0, 143),
    ],
)
def test_signals(cluster: Cluster, task: str, to_the_script: str, caught: str | None, restarts: int, end: int) -> None:
    """Signals to the job script are passed on to the tasks; near the time limit (USR1) the job is requeued."""
    cluster.fake_python(task, 0)
    process = cluster.start("sbatch", "--nodes=1", "--ntasks-per-node=1", "cluster/train.sbatch")
    wait_for((cluster.state / "ready").exists, process)
    subprocess.run(["scancel", "--batch", f"--signal={to_the_script}", str(cluster.job)], env=cluster.env, check=True)
    process.communicate(timeout=60)
    assert (process.returncode, cluster.restarts()) == (end, restarts), cluster.log
    assert (f"caught {caught}" in cluster.log) == (caught is not None), cluster.log


def test_a_run_that_finishes_near_the_limit_is_not_requeued(cluster: Cluster) -> None:
    cluster.fake_python("wait", 0)
    (cluster.bin / "python").write_text(PYTHON.replace("exit 75", "exit 0"))
    process = cluster.start("sbatch", "--nodes=1", "--ntasks-per-node=1", "cluster/train.sbatch")
    wait_for((cluster.state / "ready").exists, process)
    subprocess.run(["scancel", "--batch", "--signal=USR1", str(cluster.job)], env=cluster.env, check=True)
    process.communicate(timeout=60)
    assert process.returncode == 0 and cluster.restarts() == 0


def test_a_job_that_cannot_be_requeued_reports_it(cluster: Cluster) -> None:
    cluster.fake_python(75)
    cluster.env["FAKE_SLURM_NO_REQUEUE"] = "1"
    status, output = cluster.run("sbatch", *SIZE, "cluster/train.sbatch")
    assert status == 75 and "could not be requeued; submit it once more" in output


@pytest.mark.parametrize("job", ["train", "debug", "convert", "prepare"])
def test_mistakes(cluster: Cluster, job: str) -> None:
    size = SIZE if job == "train" else ()
    (cluster.checkout / "llammlein.sif").unlink()
    status, output = cluster.run("sbatch", *size, f"cluster/{job}.sbatch")
    assert status == 2 and "build it with cluster/build_image.sh" in output
    (cluster.checkout / "pretrain").unlink()
    status, output = cluster.run("sbatch", *size, f"cluster/{job}.sbatch")
    assert status == 2 and "is not the checkout" in output


def test_without_slurm() -> None:
    """Run by hand, on a machine without it."""
    none = {"PATH": "/usr/bin:/bin"}
    assert shutil.which("sbatch", path=none["PATH"]) is None
    for line, message in (
        *(([str(path)], "error: submit this file with sbatch") for path in SCRIPTS if path.suffix == ".sbatch"),
        (["cluster/prepare.sh", "2", "--", "--input", "a"], "error: there is no sbatch here; without SLURM run"),
    ):
        done = subprocess.run(["bash", *line], cwd=ROOT, env=none, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith(message) and done.stderr.count("\n") == 1, done.stderr


def test_the_number_of_tasks_is_required(cluster: Cluster) -> None:
    status, output = cluster.run("sbatch", "--nodes=2", "cluster/train.sbatch")
    assert status == 2 and "give sbatch --ntasks-per-node" in output


def test_debug_job(cluster: Cluster) -> None:
    cluster.fake_python(1)
    status, _ = cluster.run("sbatch", "cluster/debug.sbatch", "--config", "configs/debug.yaml")
    assert status == 1 and cluster.restarts() == 0
    assert cluster.calls("python") == ["pretrain/fabric_train.py --config configs/debug.yaml"]


def test_environment_of_the_tasks(cluster: Cluster) -> None:
    cluster.fake_python()
    (cluster.bin / "python").write_text("#!/usr/bin/env bash\nenv\npwd\n")
    (cluster.checkout / "cluster" / "env").write_text("export NCCL_SOCKET_IFNAME=ib0 LLAMMLEIN_BIND=/data,/scratch\n")
    cluster.env |= {"MASTER_ADDR": "login", "MASTER_PORT": "1"}
    status, output = cluster.run("sbatch", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=8",
                                 "cluster/train.sbatch")  # fmt: skip
    assert status == 0, output
    lines = output.splitlines()
    assert lines.count("NCCL_SOCKET_IFNAME=ib0") == lines.count("OMP_NUM_THREADS=8") == 2
    assert lines.count(str(cluster.checkout)) == 2 and "MASTER_" not in output
    assert f"--bind {cluster.checkout},/data,/scratch --pwd {cluster.checkout} " in cluster.calls("apptainer")[0]


# Preparation


def test_prepare_submits_its_stages_in_order(cluster: Cluster) -> None:
    cluster.fake_python(*[0] * 6)
    call = ["cluster/prepare.sh", 2, "--cpus-per-task=3", "--", "--input", "a b/*.jsonl", "--near_dedup", "0.8"]
    status, output = cluster.run(*call)
    assert status == 0, output
    common = "scripts/prepare_data.py --parts 2 --input a b/*.jsonl --near_dedup 0.8 --workers 3 --stage"
    stages = ["hash --part 0", "hash --part 1", "join --part 0", "encode --part 0", "encode --part 1", "merge --part 0"]
    assert cluster.calls("python") == [f"{common} {stage}" for stage in stages]
    first = cluster.job
    assert [re.findall(r"--dependency=(\S+)", call) for call in cluster.calls("sbatch")] == [
        [], *([f"afterok:{first + i}"] for i in range(3))]  # fmt: skip


def test_a_dry_run_prints_what_would_be_submitted(cluster: Cluster) -> None:
    """The same calls of sbatch, but for the ids of the jobs; without SLURM too."""
    call = [
        "cluster/prepare.sh",
        "2",
        "--dry_run",
        "--cpus-per-task=3",
        "--",
        "--input",
        "a b/*.jsonl",
        "--dedup",
        "exact",
    ]
    none = {"PATH": "/usr/bin:/bin"}
    done = subprocess.run(["bash", *call], cwd=ROOT, env=none, capture_output=True, text=True, check=True)
    shown = [shlex.split(line.partition(": sbatch ")[2]) for line in done.stdout.splitlines()]
    cluster.fake_python(*[0] * 6)
    status, output = cluster.run(*(word for word in call if word != "--dry_run"))
    assert status == 0, output
    ids = {f"ID_OF_{stage.upper()}": number for stage, number in re.findall(r"(\w+): job (\d+)", output)}
    real = [re.sub(r"ID_OF_\w+", lambda name: ids[name[0]], " ".join(words)) for words in shown]
    assert real == cluster.calls("sbatch") and len(ids) == 4


def test_a_given_workers_flag_is_used(cluster: Cluster) -> None:
    """The flag is passed once: the job omits its own."""
    cluster.fake_python(0, 0)
    status, output = cluster.run("cluster/prepare.sh", 1, "--", "--input", "a", "--workers=2")
    assert status == 0 and all(call.count("--workers") == 1 for call in cluster.calls("python")), output
    cluster = Cluster(cluster.checkout.parent / "train")
    cluster.fake_python(0)
    status, output = cluster.run("sbatch", *SIZE, "cluster/train.sbatch", "--resume", "latest")
    assert status == 0 and all(call.count("--resume") == 1 for call in cluster.calls("python")), output


def test_prepare_does_not_merge_after_a_failure(cluster: Cluster) -> None:
    cluster.fake_python(0, 1, 0)
    status, _ = cluster.run("cluster/prepare.sh", 2, "--", "--input", "a", "--dedup", "bloom")
    assert status != 0 or "merge" not in "".join(cluster.calls("python"))
    assert [call.split("--stage ")[1] for call in cluster.calls("python")] == ["encode --part 0", "encode --part 1"]


@pytest.mark.parametrize("arguments", [[], ["2"], ["0", "--", "--input"], ["2", "--input", "a"]])
def test_prepare_requires_its_arguments(cluster: Cluster, arguments: list[str]) -> None:
    status, output = cluster.run("cluster/prepare.sh", *arguments)
    assert status == 2 and "usage: cluster/prepare.sh PARTS" in output
    status, output = cluster.run("cluster/prepare.sh", 2, "--", "--input", "a", "--parts", "3")
    assert status == 2 and "--parts is the first argument" in output
    status, output = cluster.run("cluster/prepare.sh", 2, "--", "--input", "a", "--dry_run")
    assert status == 2 and "give --dry_run before --" in output and cluster.calls("sbatch") == []


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and `whole`, an undisturbed run on two processes."""
    folder = tmp_path_factory.mktemp("runs")
    lengths = np.random.default_rng(7).integers(1, 90, size=90).tolist()
    write_dataset(folder / "train", lengths)
    write_dataset(folder / "val", lengths[:9], seed=1)
    train(*settings(folder, folder / "whole"), "--devices=2")
    return folder


def settings(folder: Path, run: Path, **changes: object) -> list[str]:
    fixed = {"train__max_steps": 40, "save__every_steps": 30, "eval__every_steps": 20, "model__dropout": 0.1}
    return flags(folder, run, **(fixed | changes), devices=None)


def check(whole: Path, run: Path) -> None:
    """Check that the run equals the undisturbed one."""
    names = [path.name for path in list_checkpoints(whole)]
    one, two = Checkpoint(whole / names[-1]), Checkpoint(run / names[-1])
    assert sorted(one.names()) == sorted(two.names())
    for name in one.names():
        assert torch.equal(one.tensor(name), two.tensor(name)), name
    assert verify(open_run(run)) == []
    assert not (run / "stopped.json").exists()


def interrupt(cluster: Cluster, runs: Path, *how: str, nodes: int = 1) -> Path:
    """Train in a job and call scancel with `how` in the middle of it. Returns the run once the job has ended."""
    run = cluster.checkout / "run"
    (cluster.bin / "python").symlink_to(warm_python())
    size = (f"--nodes={nodes}", f"--ntasks-per-node={2 // nodes}", "--cpus-per-task=1")
    process = cluster.start("sbatch", *size, "cluster/train.sbatch", *settings(runs, run))
    wait_for(lambda: (run / "metrics.csv").exists() and len(metrics(run)) > 4, process)
    subprocess.run(["scancel", *how, str(cluster.job)], env=cluster.env, check=True)
    process.communicate(timeout=200)
    assert process.returncode == 0, cluster.log
    return run


def test_near_the_limit_it_saves_requeues_and_resumes(cluster: Cluster, runs: Path) -> None:
    run = interrupt(cluster, runs, "--batch", "--signal=USR1")
    assert cluster.restarts() == 1, cluster.log
    assert "stopped by SIGUSR1" in cluster.log and "stopped by a signal, saved; the job is requeued" in cluster.log
    names = [path.name for path in list_checkpoints(run)]
    assert len(names) == 3 or "iter-00000030-ckpt.pth" in cluster.log, names
    check(runs / "whole", run)


@pytest.mark.slow
def test_preempted_with_grace_on_two_nodes(cluster: Cluster, runs: Path) -> None:
    """SIGTERM only to the tasks; here each of the two is on a separate node."""
    run = interrupt(cluster, runs, "--signal=TERM", nodes=2)
    assert cluster.restarts() == 1 and "stopped by SIGTERM" in cluster.log
    check(runs / "whole", run)


@pytest.mark.slow
def test_a_cancelled_job_saves_and_is_not_requeued(cluster: Cluster, runs: Path) -> None:
    run = interrupt(cluster, runs, "--batch", "--signal=TERM")
    assert cluster.restarts() == 0 and (run / "stopped.json").exists()
    status, _ = cluster.run("sbatch", *SIZE, "cluster/train.sbatch", *settings(runs, run))
    assert status == 0
    check(runs / "whole", run)


@pytest.mark.slow
def test_a_lost_rank_requeues_the_job(cluster: Cluster, runs: Path) -> None:
    """One task is killed; the others exit on their own, and the job resumes the newest checkpoint."""
    run, whole = cluster.checkout / "run", cluster.checkout / "whole"
    longer: dict[str, object] = {"train__max_steps": 400, "save__every_steps": 20, "eval__every_steps": 400}
    process = cluster.start("sbatch", *SIZE, "cluster/train.sbatch", *settings(runs, run, **longer))
    wait_for((run / "iter-00000020-ckpt.pth").exists, process)
    task = (cluster.state / str(cluster.job) / "tasks").read_text().split()[1]
    os.killpg(int(task), signal.SIGKILL)
    process.communicate(timeout=200)
    assert process.returncode == 0 and cluster.restarts() == 1, cluster.log
    train(*settings(runs, whole, **longer), "--devices=2")
    check(whole, run)


@pytest.mark.slow
def test_convert_job(cluster: Cluster, runs: Path) -> None:
    status, output = cluster.run("sbatch", "cluster/convert.sbatch", runs / "whole", "hf")
    assert status == 0 and list((cluster.checkout / "hf").glob("*.safetensors")), output
    status, output = cluster.run("sbatch", "cluster/convert.sbatch", runs / "whole", "hf")
    assert status == 2 and "error:" in output
