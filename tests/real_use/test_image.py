"""The container image and its environment for jobs, as far as testable without a container engine."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from running import ROOT
from slurm_stand_ins import Cluster

from pretrain.preflight import nccl_transport
from pretrain.preflight.nccl_transport import ask_for_log, infiniband_devices, read_log, slow_for, transports

DEFINITION = (ROOT / "llammlein.def").read_text(encoding="utf-8")
# Replaces the image's python: its torch has the requested CUDA, and pip only resolves.
PYTHON = """#!/usr/bin/env bash
case "$*" in
*torch.version.cuda*) echo "$CUDA" ;;
*"-m pip install"*)
    printf '%s\\n' "$*" >>"$CALLS"
    if [ "$RESOLVE" = yes ]; then
        shift 3
        exec "$REAL" -m pip install --dry-run --no-input --disable-pip-version-check "$@"
    fi
    ;;
*"-m pip freeze"* | *importlib.metadata*) ;;
*) exec "$REAL" "$@" ;;
esac
"""


def build(
    folder: Path, flash_attn: str, cuda: str, resolve: bool
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run the %post sections with stand-ins for python and apt-get; returns the outcome and pip's calls."""
    parts = re.split(r"^%", DEFINITION, flags=re.MULTILINE)[1:]
    script = "".join(part.split("\n", 1)[1] for part in parts if part.startswith("post\n"))
    script = script.replace("{{ flash_attn }}", flash_attn).replace("/opt/llammlein", str(folder))
    script = script.replace("rm -rf /var/lib/apt/lists/*", ":")
    (folder / "bin").mkdir(parents=True)
    for name, text in (("python", PYTHON), ("apt-get", '#!/usr/bin/env bash\necho "$*" >>"$CALLS.apt"\n')):
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    environment = {
        **os.environ,
        "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
        "CALLS": str(folder / "calls"),
        "REAL": sys.executable,
        "CUDA": cuda,
        "RESOLVE": "yes" if resolve else "no",
    }
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True)
    return done, (folder / "calls").read_text().splitlines()


@pytest.mark.parametrize(("cuda", "extra"), [("13", "[cu13]"), pytest.param("12", "", marks=pytest.mark.slow)])
def test_flash_attention_four_by_default(cuda: str, extra: str, tmp_path: Path) -> None:
    """The extra of FA4 for the CUDA version of the image's torch, exactly pinned wheels, after libibverbs."""
    assert "    flash_attn=fa4\n" in DEFINITION
    done, calls = build(tmp_path, "fa4", cuda, resolve=False)
    assert done.returncode == 0, done.stderr
    assert calls[-1].endswith("-c torch.txt -r kernels.txt")
    pins = [line.partition(";")[0] for line in (tmp_path / "kernels.txt").read_text().splitlines()]
    assert pins == [f"flash-attn-4{extra}==4.0.0b36", f"nvidia-cutlass-dsl{extra}==4.8.1"]
    assert "libibverbs1" in (tmp_path / "calls.apt").read_text()


@pytest.mark.slow
def test_without_flash_attention_and_with_another(tmp_path: Path) -> None:
    """`none` installs none; a wheel's address is passed to pip."""
    assert "flash" not in build(tmp_path / "a", "none", "13", resolve=False)[1][-1]
    assert build(tmp_path / "b", "some.whl", "13", resolve=False)[1][-1].endswith("--no-deps some.whl")


@pytest.mark.parametrize(
    ("file", "status"),
    [
        ("flash_attn/cute/interface.py", 0),
        ("flash_attn_interface.py", 0),
        ("flash_attn/flash_attn_interface.py", 0),
        ("flash_attn/other.py", 1),
    ],
)
def test_each_flash_attention_is_recognised_by_its_own_module(file: str, status: int, tmp_path: Path) -> None:
    """FA3 has no module flash_attn, which used to fail the build; anything else still fails it."""
    code = re.search(r"python -c '\n(import importlib\.metadata.*?)'\n", DEFINITION, flags=re.DOTALL)
    assert code is not None
    (tmp_path / "flash-1.dist-info").mkdir()
    (tmp_path / "flash-1.dist-info" / "METADATA").write_text("Name: flash\nVersion: 1\n")
    (tmp_path / "flash-1.dist-info" / "RECORD").write_text(f"{file},,\n")
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code[1]], env=environment, capture_output=True, text=True)
    assert done.returncode == status, done.stderr


def test_the_torch_of_the_image_is_in_range_and_tested_versions_are_named() -> None:
    """The base image's torch is within the constraints' range, and is the tested version."""
    tag = re.search(r"From: pytorch/pytorch:([\d.]+)-cuda(\d+)\.", DEFINITION)
    assert tag is not None
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    (bound,) = [Requirement(line) for line in lines if re.match(r"torch\W", line)]
    assert tag[1] in bound.specifier
    assert f"torch {tag[1]} with CUDA {tag[2]}" in DEFINITION
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"] == ">=3.11"


@pytest.mark.slow
@pytest.mark.parametrize("cuda", ["13", "12"])
def test_pip_resolves_what_the_image_installs(cuda: str, tmp_path: Path) -> None:
    """Every install line of the definition, with pip's --dry-run, against the package index and the installed
    torch.
    """
    look = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--dest",
        str(tmp_path / "d"),
        "einops==0.8.1",
    ]
    if subprocess.run(look, capture_output=True).returncode != 0:
        pytest.skip("no package index can be reached")
    done, calls = build(tmp_path, "fa4", cuda, resolve=True)
    assert done.returncode == 0 and len(calls) == 2, done.stdout[-3000:] + done.stderr[-3000:]
    found = re.search(r"Would install (.*flash-attn-4.*)", done.stdout)
    assert found is not None and {"flash-attn-4-4.0.0b36", "nvidia-cutlass-dsl-4.8.1"} <= set(found[1].split())
    assert ("nvidia-cutlass-dsl-libs-cu13-4.8.1" in found[1].split()) == (cuda == "13")
    assert not re.search(r"Would install .*\btorch-\d", done.stdout), "pip would replace torch"


def test_the_callers_library_paths_do_not_reach_the_tasks(tmp_path: Path) -> None:
    """PYTHONPATH and LD_LIBRARY_PATH of the shell that called sbatch are dropped; those of cluster/env are kept."""
    cluster = Cluster(tmp_path)
    cluster.fake_python()
    (cluster.bin / "python").write_text("#!/usr/bin/env bash\nenv\n")
    (cluster.checkout / "cluster" / "env").write_text("export TRITON_CACHE_DIR=/tmp/triton\n")
    cluster.env |= {"PYTHONPATH": "/caller/lib", "LD_LIBRARY_PATH": "/caller/lib"}
    status, output = cluster.run("sbatch", "--nodes=1", "--ntasks-per-node=1", "cluster/train.sbatch")
    assert status == 0 and "/caller/lib" not in output and "TRITON_CACHE_DIR=/tmp/triton" in output, output


def test_the_example_lists_common_cluster_settings() -> None:
    """NCCL, the proxy, caches of compiled kernels: as comments, so that an unedited copy changes nothing."""
    text = (ROOT / "cluster" / "env.example").read_text()
    for name in (
        "NCCL_SOCKET_IFNAME",
        "NCCL_IB_HCA",
        "https_proxy",
        "no_proxy",
        "TRITON_CACHE_DIR",
        "TORCHINDUCTOR_CACHE_DIR",
    ):
        assert re.search(rf"^#export .*\b{name}=", text, flags=re.MULTILINE), name


# NCCL's transport

SOCKETS = """\
n1:100:100 [0] NCCL INFO NET/IB : No device found.
n1:100:100 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.1<0>
n1:100:100 [0] NCCL INFO Using network Socket
"""
INFINIBAND = """\
n1:100:100 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [RO]; OOB ib0:10.0.0.1<0>
n1:100:120 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:100:120 [0] NCCL INFO Channel 00/0 : 7[7] -> 8[0] [receive] via NET/IB/0/GDRDMA
"""


@pytest.mark.parametrize(
    ("log", "used"),
    [
        (SOCKETS, ["NET/Socket"]),
        (INFINIBAND, ["NET/IB", "P2P"]),
        ("n1:1:1 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct\n", ["SHM"]),
        ("n1:1:1 [0] NCCL INFO Assigned NET plugin IB to comm\n", ["NET/IB"]),
        ("", []),
    ],
)
def test_the_transport_in_the_log_of_nccl(log: str, used: list[str]) -> None:
    """Preflight reports NCCL's transport from NCCL's own log lines."""
    assert transports(log) == used


def test_why_nccl_uses_sockets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With cards but without libibverbs, or switched off; no message without cards, or on one host."""
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    (tmp_path / "sys/class/infiniband/mlx5_0").mkdir(parents=True)
    cards = infiniband_devices(tmp_path)
    assert cards == ["mlx5_0"] and infiniband_devices(tmp_path / "sys") == []
    assert "libibverbs.so.1 is missing" in slow_for([], cards, False, 2)
    assert (
        slow_for(["NET/IB"], cards, True, 2) == slow_for(["P2P"], cards, False, 1) == slow_for([], [], False, 2) == ""
    )
    assert "NCCL_IB_HCA" in slow_for(["NET/Socket"], cards, True, 2)
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert "NCCL_IB_DISABLE is set" in slow_for(["NET/Socket"], cards, True, 2)


def test_nccls_log_is_requested_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A user's own NCCL_DEBUG is kept."""
    monkeypatch.setattr(nccl_transport.tempfile, "tempdir", str(tmp_path))
    for name in ("NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE"):
        monkeypatch.setenv(name, "x")
    assert ask_for_log() is None and read_log(None) == ""
    monkeypatch.delenv("NCCL_DEBUG")
    folder = ask_for_log()
    assert folder is not None and os.environ["NCCL_DEBUG_FILE"] == f"{folder}/%h-%p.log"
    (folder / "n1-7.log").write_text(SOCKETS)
    assert transports(read_log(folder)) == ["NET/Socket"]
