"""Items of a preflight that look at the machine: devices, environment, network, disk (see preflight.py beside it)."""

from __future__ import annotations

import math
import os
import platform
import shutil
import tempfile
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from lit_files.checkpoint_name import list_checkpoints
from lit_files.platform import allocated_bytes, drop_from_cache, usable_core_numbers, usable_cores
from lit_files.publish import scratch_folder, sync_file, write_text
from pretrain.free_memory import show_bytes
from pretrain.logs.environment import code_hash, driver_version
from pretrain.memory_fit import checkpoint_bytes
from pretrain.parallel import float8_fault
from pretrain.preflight.context import Finding, PreflightContext, odd_ones, results
from pretrain.preflight.nccl_transport import has_verbs, infiniband_devices, read_log, slow_for, transports
from pretrain.preflight.outcomes import Ranks

# GB/s of the largest message, bus bandwidth. Far below any sound network (NVLink: hundreds; InfiniBand: 10 to 50 a
# card; 10 Gbit Ethernet: 1.2; loopback: 0.3 and more), so that only a broken one fails: NCCL that fell back to a
# management network, a cable at a hundredth of its speed.
LEAST_BUS_GBS = {"nccl": 1.0, "gloo": 0.005}
MESSAGE_BYTES = {"nccl": (1 << 20, 256 << 20), "gloo": (1 << 20, 16 << 20)}
MESSAGE_REPEATS = 5

DISK_BYTES = 64 << 20  # of the temporary file, at most; and a quarter of what is free
LEAST_DISK_GBS = 0.02  # slower than a hard disk
MARKER_WAIT_S = 10.0  # for a network file system to show another node's writes

CLOCK_SKEW_S = 5.0


# --- devices ----------------------------------------------------------------------------------------------------------


def check_devices(s: PreflightContext) -> Finding:
    """Check number, kind and memory of the devices: the same on all ranks, and fit for the precision."""
    outcomes = s.together(lambda: device_facts(s), "check the driver and CUDA_VISIBLE_DEVICES on that rank")
    counts = Counter(o.result["device"] for o in outcomes if o.result)
    hosts = len({o.host for o in outcomes})
    first = results(outcomes)[0]
    measured = f"{', '.join(f'{n} x {name}' for name, n in counts.items())}; {hosts} host{'s' * (hosts > 1)}"
    measured += "".join(f", {k} {first[k]}" for k in ("driver", "CUDA") if first[k]) + f", torch {torch.__version__}"
    if s.shape_fault:
        return Finding(
            "failed", f"{s.shape_fault} (here: {measured})", "request the devices that exist, or allocate more"
        )
    unfit = [f"{o.who}: {o.result['unfit']}" for o in outcomes if o.result and o.result["unfit"]]
    if unfit:
        fitting = "bf16" if s.args.precision == "fp8" else "fp16 or fp32"
        return Finding("failed", "; ".join(unfit[:3]), f"use --precision {fitting}")
    shared = Counter(o.result["uuid"] for o in outcomes if o.result and o.result["uuid"]).most_common(1)
    if shared and shared[0][1] > 1:
        who = ", ".join(o.who for o in outcomes if o.result and o.result["uuid"] == shared[0][0])
        return Finding(
            "failed", f"{who} have the same GPU", "give each task all GPUs of its node, or one GPU of its own"
        )
    for key in ("device", "driver", "CUDA"):
        if odd := odd_ones(outcomes, key):
            return Finding("warning", f"{measured}; {odd}", "the slowest device sets the pace; ask for equal nodes")
    return Finding("ok", measured)


def device_facts(s: PreflightContext) -> dict[str, str]:
    """Of this rank's device."""
    facts = {"uuid": "", "driver": "", "CUDA": "", "unfit": ""}
    fabric = s.ranks.fabric
    if (fabric.device.type == "cuda") if fabric is not None else torch.cuda.is_available():
        device = fabric.device if fabric is not None else torch.device("cuda", 0)
        properties = torch.cuda.get_device_properties(device)
        capability = f"{properties.major}.{properties.minor}"
        facts["device"] = f"{properties.name} ({show_bytes(properties.total_memory)}, capability {capability})"
        facts["uuid"] = str(getattr(properties, "uuid", ""))
        facts["driver"], facts["CUDA"] = driver_version() or "", torch.version.cuda or ""
        if s.args.precision == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
            facts["unfit"] = f"--precision bf16: {properties.name} does not support it"
        facts["unfit"] = float8_fault(s.args.precision, device) or facts["unfit"]
    else:
        kind = "cpu" if fabric is None else fabric.device.type
        facts["device"] = f"{kind} ({platform.machine()}, {usable_cores()} cores)"
    return facts


# --- environment ------------------------------------------------------------------------------------------------------


def check_environment(s: PreflightContext) -> Finding:
    """Check threads, temporary folder, and that all ranks run the same code and their clocks agree."""
    facts = s.together(environment_facts, "make the temporary folder (TMPDIR) writable on that rank")
    s.ranks.gather(None)  # ends on all ranks within milliseconds; then the clocks are read
    clocks = s.ranks.gather(time.time())
    skew = max(clocks) - min(clocks)
    if s.launch_fault:
        return Finding(
            "failed", f"the processes could not connect: {s.launch_fault}", "check MASTER_ADDR and the network"
        )
    for key, what in (("code", "code of the checkout"), ("torch", "torch"), ("lightning", "lightning")):
        if odd := odd_ones(facts, key):
            return Finding(
                "failed", f"the ranks differ in the {what}: {odd}", "start all ranks from one checkout and image"
            )
    first = results(facts)[0]
    measured = (
        f"code {first['code']}, Python {first['python']}, torch {first['torch']}, lightning {first['lightning']}, "
        f"OMP_NUM_THREADS {first['omp']}, clocks within {skew:.3f} s"
    )
    if skew > CLOCK_SKEW_S:
        return Finding("warning", measured, "synchronize the node clocks (NTP): the logs of ranks cannot be compared")
    for host in sorted({o.host for o in facts}):
        there = [o.result for o in facts if o.host == host and o.result]
        threads, cores = sum(f["threads"] for f in there), len(set().union(*(f["cores"] for f in there)))
        if threads > cores:
            measured = f"{measured}; host {host}: {threads} threads of {len(there)} ranks on {cores} cores"
            return Finding("warning", measured, f"set OMP_NUM_THREADS to {max(1, cores // len(there))}")
    for key in ("python", "numpy"):
        if odd := odd_ones(facts, key):
            return Finding("warning", f"{measured}; {key}: {odd}", "start all ranks from one image")
    return Finding("ok", measured)


def environment_facts() -> dict[str, Any]:
    with tempfile.NamedTemporaryFile() as f:
        f.write(b"0" * 4096)
        f.flush()
    return {
        "code": code_hash(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": metadata.version("lightning-fabric"),
        "numpy": np.__version__,
        "omp": os.environ.get("OMP_NUM_THREADS", "unset"),
        "threads": torch.get_num_threads(),
        "cores": usable_core_numbers(),
    }


# --- network ----------------------------------------------------------------------------------------------------------


def check_network(s: PreflightContext) -> Finding:
    """All-reduce over the data-parallel group: its sum, and its bandwidth."""
    if not s.launched:
        return Finding("skipped", s.not_launched)
    if s.ranks.world_size == 1:
        return Finding("skipped", "one process: no communication")
    backend = str(dist.get_backend())
    sizes = MESSAGE_BYTES.get(backend, MESSAGE_BYTES["gloo"])
    advice = "check NCCL_DEBUG=INFO, NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME"
    outcomes = s.watched(lambda: [reduce_message(s, size) for size in sizes], advice)
    n, rates, slow = s.ranks.world_size, [], False
    for i, size in enumerate(sizes):
        wrong = [o.who for o in outcomes if o.result and not o.result[i][1]]
        if wrong:
            return Finding(
                "failed",
                f"{backend}: the sum of {size >> 20} MiB over {n} ranks is wrong on {', '.join(wrong[:3])}",
                "a device or a link corrupts data: exclude the nodes one by one to find it",
            )
        seconds = max(o.result[i][0] for o in outcomes if o.result)
        algorithm = size / seconds / 1e9
        bus = algorithm * 2 * (n - 1) / n
        rates.append(f"{size >> 20} MiB {algorithm:.3f} GB/s (bus {bus:.3f})")
        slow = bus < LEAST_BUS_GBS.get(backend, 0.0)  # of the last, the largest
    measured = f"{backend}, {n} ranks, all-reduce: {', '.join(rates)}"
    reason = ""
    if backend != "gloo":
        facts = s.ranks.together(lambda: (transports(read_log(s.nccl_logs)), infiniband_devices(), has_verbs()))
        some, n_hosts = results(facts), len({o.host for o in facts})
        used = sorted({name for names, _, _ in some for name in names})
        measured += f"; over {', '.join(used) or 'a transport that its log does not name'}"
        reasons = [slow_for(used, devices, verbs, n_hosts) for _, devices, verbs in some]
        reason = next((r for r in reasons if r), "")
        measured += f"; {reason}" * bool(reason)
    if slow:
        measured = f"{measured}; at least {LEAST_BUS_GBS[backend]:g} GB/s on the bus is expected"
        return Finding("failed", measured, "the fast network is not in use: see NCCL_DEBUG=INFO and NCCL_SOCKET_IFNAME")
    if reason:
        return Finding("warning", measured, "install libibverbs1 and ibverbs-providers where the ranks run")
    return Finding("ok", measured)


def reduce_message(s: PreflightContext, n_bytes: int) -> tuple[float, bool]:
    """(seconds of one all-reduce of fp32, whether the sum is right)."""
    assert s.ranks.fabric is not None
    device, n = s.ranks.fabric.device, s.ranks.world_size
    pattern = torch.arange(n_bytes // 4, device=device, dtype=torch.float32) % 1021  # sums stay exact in fp32
    message = pattern * (s.ranks.rank + 1)
    dist.all_reduce(message)
    right = torch.equal(message, pattern * (n * (n + 1) // 2))
    dist.all_reduce(message)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    for _ in range(MESSAGE_REPEATS):
        dist.all_reduce(message)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / MESSAGE_REPEATS, right


# --- disk -------------------------------------------------------------------------------------------------------------


def check_disk(s: PreflightContext) -> Finding:
    """Whether all ranks share out_dir, its speed, and room for the checkpoints; room for the cache on every node."""
    advice = "choose another --out_dir, or make it writable"
    made = s.together(lambda: make_scratch(s) if s.ranks.rank == 0 else None, advice)
    assert made[0].result is not None
    s.scratch, token = made[0].result
    s.together(lambda: see_marker(s.scratch, token), "put --out_dir on a file system that all nodes share")
    # As a checkpoint is written: by rank 0, or by every rank its part.
    writes = s.ranks.rank == 0 or s.args.save.state_dict_type == "sharded"
    advice = "free some space, or choose another --out_dir"
    speeds = s.together(lambda: measure_disk(s.scratch, s.ranks) if writes else None, advice)
    some = [r for r in results(speeds) if r is not None]
    write, read = sum(w for w, _ in some), sum(r for _, r in some)
    measured = f"write {write:.2f} GB/s with fsync, read {read:.2f} GB/s"
    if s.config is not None:
        room = room_for_checkpoints(s, free_bytes(s.scratch) if s.ranks.rank == 0 else 0)
        verdict, free_space = s.ranks.gather(room)[0]
        measured += f"; {free_space}"
        if not verdict:
            advice = "free some space, keep fewer with --save.keep_last, or raise --save.every_steps"
            return Finding("failed", measured, advice)
    if s.args.data.cache_dir is not None:
        cached = s.together(lambda: room_for_cache(s), "lower --data.cache_gb, or choose another --data.cache_dir")
        measured += f"; cache {min(results(cached)) / 1e9:.1f} GB free for {s.args.data.cache_gb:g}"
    if write < LEAST_DISK_GBS:
        return Finding(
            "warning", measured, "checkpoints will take long: choose a faster file system, or save.asynchronous"
        )
    return Finding("ok", measured)


def make_scratch(s: PreflightContext) -> tuple[Path, str]:
    """Rank 0: a temporary folder in out_dir with a marker in it. Missing parents are made too."""
    s.folder.mkdir(parents=True, exist_ok=True)
    scratch = s.holding.enter_context(scratch_folder(s.folder.resolve() / "preflight"))
    s.scratch = scratch
    token = os.urandom(16).hex()
    write_text(scratch / "marker", token)
    return scratch, token


def see_marker(scratch: Path | None, token: str) -> None:
    assert scratch is not None
    deadline = time.monotonic() + MARKER_WAIT_S
    while True:
        try:
            if (scratch / "marker").read_text() == token:
                return
        except OSError:
            pass
        if time.monotonic() > deadline:
            raise ValueError(f"it cannot see the file that rank 0 wrote to {scratch.parent}")
        time.sleep(0.2)


def measure_disk(scratch: Path | None, ranks: Ranks) -> tuple[float, float]:
    """(GB/s written with fsync, GB/s read) of a temporary file."""
    assert scratch is not None
    size = min(DISK_BYTES, free_bytes(scratch) // (4 * ranks.world_size)) // 2**10 * 2**10
    path = scratch / f"speed-{ranks.rank}"
    block = np.random.default_rng(ranks.rank).bytes(min(size, 4 << 20))  # incompressible
    with open(path, "wb", buffering=0) as f:
        began = time.perf_counter()
        for start in range(0, size, len(block)):
            f.write(block[: size - start])
        sync_file(f)
        written = time.perf_counter() - began
        drop_from_cache(f.fileno())  # else it is read from memory
    began = time.perf_counter()
    content = path.read_bytes()
    seconds = time.perf_counter() - began
    path.unlink()
    if len(content) != size or content[: len(block)] != block:
        raise OSError(f"{path} reads back different bytes than were written")
    return size / written / 1e9, size / seconds / 1e9


def free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def room_for_checkpoints(s: PreflightContext, free: int) -> tuple[bool, str]:
    """Whether `free` bytes hold the checkpoints that are still to come, and one that is being written."""
    assert s.config is not None
    save, size = s.args.save, checkpoint_bytes(s.config, s.args.optim)
    written = None if s.max_steps is None else -(-s.max_steps // save.every_steps)
    kept = written
    if save.keep_last:
        kept = save.keep_last
        if written is not None and save.keep_every:
            kept += (s.max_steps or 0) // math.lcm(save.keep_every, save.every_steps)
        kept = kept if written is None else min(kept, written)
    there = len(list_checkpoints(s.folder))
    n = max(0, (kept or 1) + budgets_within(s) - there) + 1
    text = f"{free / 1e9:.3f} GB free; {n} checkpoints of {size / 1e9:.3f} GB to write need {n * size / 1e9:.3f} GB"
    return free >= n * size, text + (" (the length of the run is unknown)" if kept is None else "")


def budgets_within(s: PreflightContext) -> int:
    """Word budgets (--save.at_words) that the run can reach, each a checkpoint more; all if its length is unknown."""
    budgets, train = s.args.save.word_budgets, s.args.train
    if not budgets or s.datasets is None or s.max_steps is None:
        return len(budgets)
    tokens = s.max_steps * train.global_batch_samples * s.datasets.block_size
    words_per_token = max(d.n_words / d.n_tokens for d in s.datasets.train)
    return sum(budget <= tokens * words_per_token for budget in budgets)


def room_for_cache(s: PreflightContext) -> int:
    """Free bytes at data.cache_dir on this rank's node, including those that the cache already occupies."""
    folder = s.args.data.cache_dir
    assert folder is not None
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    with tempfile.TemporaryFile(dir=parent):
        pass
    held = sum(allocated_bytes(p.stat()) for p in folder.rglob("*") if p.is_file()) if folder.exists() else 0
    free, budget = free_bytes(parent) + held, int(s.args.data.cache_gb * 1e9)
    if s.datasets is not None:
        budget = min(budget, sum(d.n_tokens * d.dtype.itemsize for d in s.datasets.train))
    if free < budget:
        raise ValueError(
            f"--data.cache_dir {folder} has room for {free / 1e9:.3f} GB, --data.cache_gb asks for {budget / 1e9:.3f}"
        )
    return free
