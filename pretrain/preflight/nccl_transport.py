"""NCCL's transports, read from its log, and why they may be slower than the hardware allows."""

from __future__ import annotations

import ctypes
import os
import re
import tempfile
from pathlib import Path


def ask_for_log() -> Path | None:
    """Have NCCL log to a new folder, set before the first communicator. None if the user has set NCCL_DEBUG."""
    if "NCCL_DEBUG" in os.environ:
        return None
    folder = Path(tempfile.mkdtemp(prefix="llammlein-nccl-"))
    os.environ |= {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET", "NCCL_DEBUG_FILE": f"{folder}/%h-%p.log"}
    return folder


def read_log(folder: Path | None) -> str:
    """The log in the folder; empty if there is none."""
    return "" if folder is None else "".join(path.read_text(errors="replace") for path in sorted(folder.glob("*.log")))


def transports(log: str) -> list[str]:
    """The transports of its log: P2P and SHM inside a node, NET/IB or NET/Socket between nodes; sorted.

    Before it has connected two ranks the log names the network alone.
    """
    channels = re.findall(r" via ((?:P2P|SHM)\b|NET/\w+)", log)
    network = re.findall(r"(?:Using network|Assigned NET plugin) (\w+)", log)
    return sorted(set(channels) or {f"NET/{name}" for name in network})


def infiniband_devices(root: Path = Path("/")) -> list[str]:
    """Names of the host's RDMA devices, as the kernel shows them."""
    folder = root / "sys/class/infiniband"
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


def has_verbs() -> bool:
    """Whether libibverbs, which NCCL opens for InfiniBand and RoCE, can be loaded here (in the image, say)."""
    try:
        ctypes.CDLL("libibverbs.so.1")
    except OSError:
        return False
    return True


def slow_for(used: list[str], devices: list[str], verbs: bool, n_hosts: int) -> str:
    """Why NCCL falls back to sockets though there is InfiniBand; empty if it does not, or is not known to."""
    if not devices or (n_hosts < 2 and "NET/Socket" not in used):
        return ""
    there = f"there is {', '.join(devices[:4])}"
    if os.environ.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        return f"NCCL uses sockets although {there}: NCCL_IB_DISABLE is set"
    if not verbs:
        return f"NCCL uses sockets although {there}: libibverbs.so.1 is missing (in the image)"
    return f"NCCL uses sockets although {there}: see NCCL_DEBUG=INFO and NCCL_IB_HCA" if "NET/Socket" in used else ""
