"""Free memory of a device, and of the host within its control-group limits."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch

from lit_files.platform import memory_bytes

CUDA_RESERVE_BYTES = 1536 << 20  # not estimated: CUDA context, NCCL buffers, kernel workspaces, fragmentation
TIGHT = 0.9  # fraction of the free memory; estimates above it leave too little margin


def show_bytes(n_bytes: float) -> str:
    """`1.50 GiB`, in the largest of GiB, MiB and KiB that leaves a digit before the point."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB")):
        if n_bytes >= unit:
            return f"{n_bytes / unit:.2f} {name}"
    return f"{n_bytes / 2**10:.2f} KiB"


def free_device_bytes(device: torch.device, neighbours: int) -> int:
    """Bytes that this process can still use on its device. `neighbours`: ranks that share the host's memory."""
    if device.type != "cuda":
        return host_memory_bytes() // neighbours
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def host_memory_bytes(root: Path = Path("/")) -> int:
    """Memory that processes on this host can still allocate: available memory, capped by control-group limits."""
    if not (root / "proc/meminfo").exists():
        return memory_bytes()
    facts = dict(line.split(":", 1) for line in (root / "proc/meminfo").read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    return min([available, *cgroup_rooms(root)])


def resident_bytes() -> int | None:
    """Memory of this process that is resident now; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except OSError:
        return None


def cgroup_rooms(root: Path) -> Iterator[int]:
    """Bytes left within each memory limit of this process's control groups (v1, v2). The file cache counts as free."""
    groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for _, controllers, path in groups:
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = base / path.lstrip("/")
        for place in (folder, *folder.parents):
            if not place.is_relative_to(base):
                break
            try:
                limit, used = ((place / name).read_text().strip() for name in names[:2])
                stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
            except OSError:
                continue
            if limit != "max":
                yield max(0, int(limit) - int(used) + int(stat.get(names[2], 0)))
