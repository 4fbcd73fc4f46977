"""Writes RUN/environment.jsonl: software and hardware of each start and resume, referenced by the checkpoints.

Nothing here may stop or delay a run: unknown facts are null. Keys and passwords are never written: only the
environment variables listed here are read, and the command line is redacted.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lit_files.platform import read_at, usable_cores
from lit_files.publish import sync_file
from lit_files.run_files import ENVIRONMENT
from pretrain.logs.messages import warn
from pretrain.logs.metrics import append

ROOT = Path(__file__).resolve().parents[2]
CODE = ("lit_data", "lit_eval", "lit_files", "lit_model", "pretrain")
GIT_S = 5.0  # timeout of one git call, for slow file systems
PACKAGES = (
    *("torch", "lightning-fabric", "numpy", "transformers", "tokenizers", "sentencepiece", "safetensors", "pyarrow"),
    *("jsonargparse", "zstandard", "triton", "flash-attn", "flash-attn-3", "flash-attn-4", "nvidia-cutlass-dsl"),
    *("nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13", "liger-kernel"),
    *("quack-kernels", "torchao", "wandb", "tensorboard"),
)
IMAGE = ("APPTAINER_CONTAINER", "SINGULARITY_CONTAINER", "APPTAINER_NAME", "SINGULARITY_NAME")
SLURM = ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID", "RESTART_COUNT", "JOB_PARTITION", "JOB_NODELIST", "CLUSTER_NAME")
SETTINGS = ("OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "PYTORCH_CUDA_ALLOC_CONF")
SECRET_NAME = re.compile(
    r"(api|access|private|secret)[-_.]?key|secret|passw(or)?d|passphrase|credential|(^|[-_.])(token|auth|pwd)$", re.I
)
SECRET_VALUE = re.compile(
    r"(hf|api_org)_[A-Za-z0-9]{16,}|sk-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w+|wandb_v\d_\w+|AKIA[0-9A-Z]{16}|"
    r"eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*|\b[0-9a-f]{40}\b"
)
MASK = "***"


def record_environment(
    run: Path, attempt: str, step: int, argv: Sequence[str], device: torch.device, plan: dict[str, Any]
) -> None:
    """Append this start's line. Every rank calls this; rank 0 writes. Disk errors never raise.

    Args:
        attempt: the id of this start, stored in its checkpoints.
        step: optimizer steps completed at this start.
        plan: of rank 0, see pretrain/planning/expectation.py.
    """
    mine = {"host": socket.gethostname(), "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None}
    ranks: list[Any] = [mine]
    if dist.is_initialized() and dist.get_world_size() > 1:
        ranks = [None] * dist.get_world_size()
        dist.all_gather_object(ranks, mine)
        if dist.get_rank() != 0:
            return
    hosts = list(dict.fromkeys(rank["host"] for rank in ranks))
    facts = {
        "attempt": attempt,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": step,
        "world_size": len(ranks),
        "hosts": hosts,
        "gpus": sorted({f"{rank['gpu']}" for rank in ranks if rank["gpu"]}),
        **local_facts(),
        "command": clean_command(argv),
        "plan": plan,
    }
    try:
        append_line(run / ENVIRONMENT, json.dumps(facts, ensure_ascii=False))
    except OSError as error:
        warn(f"{run / ENVIRONMENT} cannot be written ({error.strerror}); the environment of this start is not recorded")


def append_line(path: Path, line: str) -> None:
    """Append a line atomically. An earlier line truncated by a kill or a full disk is kept, and terminated first."""
    with open(path, "a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        torn = size > 0 and read_at(file.fileno(), 1, size - 1) != b"\n"
        append(file, (b"\n" if torn else b"") + line.encode() + b"\n")
    sync_file(path)


def local_facts() -> dict[str, Any]:
    """Software and hardware of this process."""
    return {
        "code": code_hash(),
        "git": git_facts(ROOT),
        "python": platform.python_version(),
        "packages": package_versions(),
        "system": platform.platform(),
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "driver": driver_version(),
        "gpu_power_limit_w": power_limit_w() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "nccl": nccl_version(),
        "image": next((os.environ[name] for name in IMAGE if os.environ.get(name)), None),
        "slurm": {n.lower(): os.environ[f"SLURM_{n}"] for n in SLURM if f"SLURM_{n}" in os.environ} or None,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
    }


def code_hash() -> str:
    """Hash of the names and contents of the packages' Python files; 12 hexadecimal digits."""
    digest = hashlib.sha256()
    for package in CODE:
        for path in sorted((ROOT / package).rglob("*.py")):
            content = path.read_bytes()
            digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode() + content)
    return digest.hexdigest()[:12]


def git_facts(root: Path) -> dict[str, Any] | None:
    """Commit of a checkout, whether it is clean, and a hash of the changes; None outside a checkout.

    Untracked files that git does not ignore make it not `clean`; the hash covers the diff of tracked files, and new
    Python files. Without git, or where git refuses (another user's checkout), the commit is read from its files.
    """
    if not (root / ".git").exists():
        return None
    try:
        status = git(root, "status", "--porcelain", "-z", "--no-renames").split(b"\0")
        commit = git(root, "rev-parse", "HEAD").decode().strip()
        changed = [entry for entry in status if entry]
        digest = None
        if changed:
            content = hashlib.sha256(git(root, "diff", "--binary", "HEAD"))
            for name in sorted(entry[3:].decode() for entry in changed if entry.startswith(b"?? ")):
                files = sorted((root / name).rglob("*.py")) if name.endswith("/") else [root / name]
                for path in files:
                    if path.suffix == ".py":
                        content.update(name.encode() + path.read_bytes())
            digest = content.hexdigest()
    except (OSError, ValueError, subprocess.SubprocessError):
        return {"commit": commit_of_files(root), "clean": None, "diff_sha256": None}
    return {"commit": commit, "clean": not changed, "diff_sha256": digest}


def git(root: Path, *arguments: str) -> bytes:
    """Output of a git command, run so that it writes nothing into the checkout."""
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(root), *arguments]
    foreign = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, capture_output=True, check=True, timeout=GIT_S, env=foreign).stdout


def commit_of_files(root: Path) -> str | None:
    """HEAD's commit, read from the files of a repository or worktree."""
    try:
        folder = root / ".git"
        if folder.is_file():
            folder = root / folder.read_text().partition("gitdir:")[2].strip()
        head = (folder / "HEAD").read_text().strip()
        if not head.startswith("ref:"):
            return head
        name = head.partition(":")[2].strip()
        common = folder / "commondir"
        homes = [folder, folder / common.read_text().strip()] if common.exists() else [folder]
        for home in homes:
            if (home / name).exists():
                return (home / name).read_text().strip()
            if (home / "packed-refs").exists():
                for line in (home / "packed-refs").read_text().splitlines():
                    if line.endswith(f" {name}"):
                        return line.split()[0]
    except (OSError, ValueError, IndexError):
        pass
    return None


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that affect a run's results."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__  # includes the build tag, which the metadata may lack
    return versions


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model"))]
    return names[0] if names else platform.processor() or platform.machine()


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None without one."""
    try:
        first = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").partition("\n")[0]
    except OSError:
        return None
    found = re.search(r"\d+\.\d+(\.\d+)?", first)
    return found[0] if found else first


def power_limit_w() -> float | None:
    """The largest power limit of this machine's NVIDIA GPUs, in watts; None if nvidia-smi does not report one."""
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10)
        limits = [float(line) for line in done.stdout.split("\n") if line.strip() not in ("", "[N/A]")]
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return max(limits, default=None)


def nccl_version() -> str | None:
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return None
    version = torch.cuda.nccl.version()
    return ".".join(map(str, version)) if isinstance(version, tuple) else str(version)


def clean_command(argv: Sequence[str]) -> list[str]:
    """Redact secrets from a command line: values of flags that name one, known key formats, passwords in URLs."""
    cleaned: list[str] = []
    hide = False
    for word in argv:
        name, equals, _ = word.partition("=")
        if hide and not word.startswith("--"):
            cleaned.append(MASK)
        elif equals and SECRET_NAME.search(name):
            cleaned.append(f"{name}={MASK}")
        else:
            word = re.sub(r"(\w+://[^/\s:@]*):[^/\s@]+@", rf"\1:{MASK}@", word)
            cleaned.append(SECRET_VALUE.sub(MASK, word))
        hide = word.startswith("-") and not equals and SECRET_NAME.search(word) is not None
    return cleaned


def command_line(argv: Sequence[str] | None) -> list[str]:
    """The command line of this process, or the one passed to `main`."""
    return sys.argv if argv is None else ["fabric_train.py", *argv]
