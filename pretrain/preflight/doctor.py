"""What this machine offers to a run, without a config: each item with its remedy. `make doctor`"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from lit_files.platform import open_file_limits, usable_cores
from lit_files.publish import sync_file
from lit_model.kernels.choose import choose_attention
from pretrain.free_memory import host_memory_bytes
from pretrain.logs.environment import cpu_model, driver_version
from pretrain.preflight.context import Finding
from pretrain.preflight.outcomes import describe

LEAST_OPEN_FILES = 4096  # shards, ranks and their logs
LEAST_SHARED_GIB = 1.0  # NCCL and loaders of several ranks on a node
DISK_TRIAL_BYTES = 64 << 20
SLOW_DISK_GBS = 0.1
HEAD_SIZE = 64


def python() -> Finding:
    virtual = sys.prefix != sys.base_prefix
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if virtual:
        return Finding("ok", found)
    return Finding("warning", f"{found}, outside a virtual environment", "`make install` makes one in .venv")


def devices() -> Finding:
    """torch, and the devices it can use."""
    driver = driver_version()
    found = f"torch {torch.__version__}"
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        each = ", ".join(f"{p.name} ({p.total_memory / 2**30:.0f} GiB)" for p in names)
        return Finding("ok", f"{found}, driver {driver}: {each}")
    if driver is not None and torch.version.cuda is None:
        advice = "install a torch with CUDA: docs/install.md"
        return Finding("failed", f"{found} has no CUDA, but there is an NVIDIA driver ({driver})", advice)
    if driver is not None:
        advice = "update the driver, or install a torch for an older CUDA; check CUDA_VISIBLE_DEVICES"
        return Finding("failed", f"{found} with CUDA {torch.version.cuda} finds no GPU; driver {driver}", advice)
    if torch.backends.mps.is_available():
        return Finding("ok", f"{found}, mps")
    return Finding("ok", f"{found}, no GPU: {cpu_model() or platform.processor() or 'CPU'}")


def attention() -> Finding:
    """The kernel for bf16 with documents kept apart."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    name, reason = choose_attention(device, torch.bfloat16, HEAD_SIZE)
    faster = 'the extra "' in reason or "not fa" in reason
    return Finding("warning" if faster else "ok", f"{name}: {reason}", "docs/performance.md" if faster else "")


def compiler() -> Finding:
    """What torch.compile needs."""
    command = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "cl") if shutil.which(c)), None)
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return Finding("warning", "no triton: --compile true fails on CUDA", "pip install triton, or reinstall torch")
    if command is None or shutil.which(command) is None:
        return Finding("warning", "no C++ compiler: --compile true fails", "install g++, or train without --compile")
    return Finding("ok", f"{command} for --compile true")


def threads() -> Finding:
    cores, given = usable_cores(), os.environ.get("OMP_NUM_THREADS")
    found = f"{torch.get_num_threads()} threads, {cores} usable cores, OMP_NUM_THREADS {given or 'unset'}"
    if given is not None and given.isdigit() and int(given) > cores:
        return Finding("warning", found, f"set OMP_NUM_THREADS to at most {cores}, or leave it unset")
    return Finding("ok", found)


def memory() -> Finding:
    found = f"{host_memory_bytes() / 2**30:.1f} GiB available"
    shared = Path("/dev/shm")
    if not shared.is_dir():
        return Finding("ok", found)
    gib = shutil.disk_usage(shared).free / 2**30
    if gib < LEAST_SHARED_GIB and torch.cuda.is_available():
        advice = "give the container more shared memory (docker run --shm-size 8g)"
        return Finding("warning", f"{found}, shared memory {gib:.2f} GiB free", advice)
    return Finding("ok", f"{found}, shared memory {gib:.1f} GiB")


def open_files() -> Finding:
    limits = open_file_limits()
    if limits is None:
        return Finding("skipped", "no limit on this system")
    soft, hard = limits
    found = f"{soft} open files allowed (at most {hard})"
    if 0 <= soft < LEAST_OPEN_FILES:
        more = f"ulimit -n {min(hard, 65536) if hard > 0 else 65536}" if hard != soft else "ask for a higher hard limit"
        return Finding("warning", found, more)
    return Finding("ok", found)


def disk() -> Finding:
    """The current folder's: room, and speed with fsync."""
    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if free < 4 * DISK_TRIAL_BYTES:
        return Finding("failed", f"{free / 1e9:.2f} GB free in {here}", "free some space")
    block = os.urandom(4 << 20)
    try:
        with tempfile.TemporaryFile(dir=here, buffering=0) as file:
            began = time.perf_counter()
            for _ in range(DISK_TRIAL_BYTES // len(block)):
                file.write(block)
            sync_file(file)
            rate = DISK_TRIAL_BYTES / (time.perf_counter() - began) / 1e9
    except OSError as error:
        return Finding("failed", f"{here} cannot be written: {error.strerror}", "choose another folder for --out_dir")
    found = f"{free / 1e9:,.1f} GB free, {rate:.2f} GB/s written with fsync, in {here}"
    if rate < SLOW_DISK_GBS:
        return Finding(
            "warning", found, "checkpoints will take long: use a faster disk for --out_dir, or --save.asynchronous true"
        )
    return Finding("ok", found)


ITEMS: tuple[tuple[str, Callable[[], Finding]], ...] = (
    ("python", python),
    ("devices", devices),
    ("attention", attention),
    ("compiler", compiler),
    ("threads", threads),
    ("memory", memory),
    ("open files", open_files),
    ("disk", disk),
)


def examine() -> Iterator[tuple[str, Finding]]:
    """Each item's finding; an item that raises has failed."""
    for name, item in ITEMS:
        try:
            yield name, item()
        except Exception as error:
            yield name, Finding("failed", describe(error))
