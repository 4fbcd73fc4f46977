"""Cost of a save to training: synchronous, in the background, and none; compared with torch's own asynchronous save.

    python benchmarks/checkpoint.py --json FILE [--model LLaMmlein_120M] [--steps 12] [--rounds 3]

Each row is a separate process that trains the same model for the same steps on synthetic text, and saves once, after a
quarter of them; the rounds alternate. `none` saves nothing. `blocked` is how long the loop waited for the save, `copy`
the part of it spent copying to host memory; `steps` the time of all steps relative to `none`, without the final wait
for the disk; `memory` the peak above the resident memory before the save. `dcp.async_save` is torch's own call on the
same tensors, without checksums or publication. The goal: blocked - copy under 5 % of the synchronous save's time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch
from torch.distributed.checkpoint import FileSystemWriter, async_save

from benchmarks.provenance import provenance
from pretrain.build import set_up
from pretrain.fabric_train import parse
from pretrain.logs.throughput import Throughput
from pretrain.loop import save, train_step
from pretrain.run import Run

ROWS = ("none", "full, sync", "full, async", "sharded, sync", "sharded, async", "dcp.async_save")


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def worker(row: str, flags: list[str], steps: int) -> dict[str, float]:
    """Train, save once, measure."""
    run = set_up(parse(flags))
    throughput = Throughput(run.config, run.data.block_size, run.device, run.world_size)
    at, seconds, before, blocked = max(1, steps // 4), 0.0, 0, 0.0
    pending: Any = None
    for data in run.loader.steps(0, steps):
        began = time.perf_counter()
        train_step(run, data)
        run.step += 1
        if run.device.type == "cuda":
            torch.cuda.synchronize()
        if run.step == at and row != "none":
            before = resident("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
            saving = time.perf_counter()
            if row == "dcp.async_save":
                pending = async_save(
                    run.tensors(),
                    storage_writer=FileSystemWriter(run.folder / "dcp", sync_files=True),
                    no_dist=True,
                )
            else:
                save(run, throughput)
            blocked = time.perf_counter() - saving
        if run.step > 1:  # the first one warms up
            seconds += time.perf_counter() - began
    if pending is not None:
        pending.result()
    run.saver.wait()
    peak = resident("VmHWM")
    size = sum(p.stat().st_size for p in run.folder.rglob("*") if p.suffix in (".pth", ".distcp"))
    return {
        "steps_s": seconds,
        "blocked_s": blocked,
        "copy_s": run.saver.times.copy_s,
        "total_s": run.saver.times.total_s,
        "memory_bytes": max(0, peak - before) if before else 0,
        "state_bytes": state_bytes(run),
        "file_bytes": size,
    }


def state_bytes(run: Run) -> int:
    return sum(t.numel() * t.element_size() for t in run.tensors().values())


def measure(row: str, args: argparse.Namespace, folder: Path) -> dict[str, float]:
    kind, _, how = row.partition(", ")
    flags = [
        f"--model.name={args.model}", "--model.vocab_size=32000", "--data.synthetic.tokens=100000",
        f"--train.max_steps={args.steps}", "--train.global_batch_samples=4", "--train.micro_batch_samples=4",
        "--train.block_size=128", "--eval.every_steps=100000", f"--out_dir={folder / 'run'}", "--data.datapoints=false",
        f"--save.state_dict_type={kind if kind in ('full', 'sharded') else 'full'}",
        f"--save.asynchronous={str(how == 'async').lower()}", "--devices=1",
    ]  # fmt: skip
    command = [sys.executable, __file__, "--worker", row, str(args.steps), *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    subprocess.run(["rm", "-r", str(folder / "run")], check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--model", default="LLaMmlein_120M")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {row: [] for row in ROWS}
    with tempfile.TemporaryDirectory(prefix="llammlein-bench-") as name:
        for _ in range(args.rounds):
            for row in ROWS:
                found[row].append(measure(row, args, Path(name)))
    rows: dict[str, dict[str, Any]] = {}
    none = [m["steps_s"] for m in found["none"]]
    print(f"{'':16} {'blocked s':>10} {'copy s':>8} {'total s':>8} {'steps / none':>13} {'memory / state':>15}")
    for row, measured in found.items():
        median = {key: statistics.median(m[key] for m in measured) for key in measured[0]}
        ratio = statistics.median(m["steps_s"] / n for m, n in zip(measured, none, strict=True))
        rows[row] = {"median": median, "steps_ratio": ratio, "rounds": measured}
        memory = median["memory_bytes"] / median["state_bytes"]
        print(
            f"{row:16} {median['blocked_s']:10.3f} {median['copy_s']:8.3f} {median['total_s']:8.3f} {ratio:13.3f} "
            f"{memory:15.2f}"
        )
    for kind in ("full", "sharded"):
        shares = [
            (a["blocked_s"] - a["copy_s"]) / s["blocked_s"]
            for a, s in zip(found[f"{kind}, async"], found[f"{kind}, sync"], strict=True)
        ]
        rows[f"{kind}, async"]["blocked_beyond_copy_of_sync"] = statistics.median(shares)
        print(f"{kind}: blocked beyond the copy is {statistics.median(shares):.2%} of the synchronous save")
    result = {
        **provenance(
            f"python benchmarks/checkpoint.py --model {args.model} --steps {args.steps} --rounds {args.rounds}",
            "torch",
            "lightning-fabric",
        ),
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(sys.argv[2], sys.argv[4:], int(sys.argv[3]))))
    else:
        main()
