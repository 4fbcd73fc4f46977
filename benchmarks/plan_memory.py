"""Score of a plan's memory and speed: runs of the trainer beside the plan that each of them recorded as it started.

    python benchmarks/plan_memory.py [--only WORD ...] [--json FILE]

Each run takes a few steps on synthetic data, with a validation and a checkpoint. Planned is what scripts/plan_run.py
prints; measured is the peak of rank 0. On CUDA that is allocated memory. On a CPU it is resident memory above that of
the process with its imports, of a run whose allocator returns freed tensors to the system at once (glibc with
MALLOC_MMAP_THRESHOLD_ of 1 MiB); a second run, whose speed is measured too, has the default allocator, which keeps and
fragments some. Ratios are measured over planned.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.corpus_runs import call, prepare
from benchmarks.provenance import provenance
from lit_eval.run_facts import read_run

WARMUP_STEPS, STEPS = 1, 2
BOUND = 0.1  # the ratio's distance from 1 that counts as a hit
SIZES = {
    "2M": ("n_layer=4", "n_head=4", "n_embd=192", "intermediate_size=512", "vocab_size=4096"),
    "17M": ("n_layer=6", "n_head=6", "n_embd=384", "intermediate_size=1024", "vocab_size=16000"),
    "41M": ("n_layer=8", "n_head=8", "n_embd=512", "intermediate_size=1536", "vocab_size=16000"),
    "110M": ("n_layer=12", "n_head=12", "n_embd=768", "intermediate_size=2048", "vocab_size=16000"),
}
TRIALS: dict[str, tuple[str, int, int, int, dict[str, object]]] = {
    # name: (size, rows of a micro-batch, tokens of a row, micro-batches, other flags)
    "2M 8x256": ("2M", 8, 256, 1, {}),
    "2M 32x256": ("2M", 32, 256, 1, {}),
    "17M 4x256": ("17M", 4, 256, 1, {}),
    "17M 8x512 accumulated": ("17M", 8, 512, 2, {}),
    "17M 8x512 recomputed": ("17M", 8, 512, 1, {"train.activation_checkpointing": "full"}),
    "17M 8x512 bf16": ("17M", 8, 512, 1, {"precision": "bf16"}),
    "17M 8x512 muon": ("17M", 8, 512, 1, {"optim.name": "muon"}),
    "17M 1x4096": ("17M", 1, 4096, 1, {}),
    "17M 4x512 saved in the background": ("17M", 4, 512, 2, {"save.asynchronous": "true", "save.every_steps": 2}),
    "41M 4x512": ("41M", 4, 512, 1, {}),
    "41M 4x1024 recomputed": ("41M", 4, 1024, 1, {"train.activation_checkpointing": "full"}),
    "110M 2x256": ("110M", 2, 256, 1, {}),
    "17M 4x512 ddp 2": ("17M", 4, 512, 1, {"devices": 2}),
    "17M 4x512 fsdp 2": ("17M", 4, 512, 1, {"devices": 2, "strategy": "fsdp", "save.state_dict_type": "sharded"}),
}


def run_once(name: str, folder: Path, data: Path) -> tuple[dict[str, Any], float, float]:
    """(plan, peak bytes, tokens/s) of one run."""
    size, rows, block_size, accumulate, more = TRIALS[name]
    flags: dict[str, object] = {
        "out_dir": folder,
        "data.train": data / "train",
        "data.val": data / "val",
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "train.block_size": block_size,
        "train.micro_batch_samples": rows,
        "train.global_batch_samples": rows * accumulate * int(str(more.get("devices", 1))),
        "train.max_steps": WARMUP_STEPS + STEPS,
        "optim.warmup_steps": 1,
        "log.every_steps": 1,
        "log.report": "false",
        "eval.every_steps": 2,
        "eval.max_samples": rows,
        "save.keep_last": 1,
        **{f"model.{part.split('=')[0]}": part.split("=")[1] for part in SIZES[size]},
        **more,
    }
    call("pretrain/fabric_train.py", *(f"--{key}={value}" for key, value in flags.items()))
    run = read_run(folder)
    plan, m = run.starts[-1]["plan"], run.metrics
    cuda = bool(run.starts[-1]["gpus"])
    memory = float(m.finite("memory_gib").max()) * 2**30 - (0 if cuda else plan["resident_bytes"])
    speed = statistics.median(m["tokens_per_s"][m["step"] > WARMUP_STEPS].tolist())
    return plan, memory, speed


def measure(name: str, folder: Path, data: Path) -> dict[str, float]:
    """Planned and measured figures of a trial."""
    plan, resident, speed = run_once(name, folder / "default", data)
    memory = resident
    if not torch.cuda.is_available():
        os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
        _, memory, _ = run_once(name, folder / "returning", data)
        del os.environ["MALLOC_MMAP_THRESHOLD_"]
    low, likely, high = plan["tokens_per_s"] or [float("nan")] * 3
    return {
        "planned_mib": plan["memory_bytes"] / 2**20,
        "measured_mib": memory / 2**20,
        "memory_ratio": memory / plan["memory_bytes"],
        "default_allocator_ratio": resident / plan["memory_bytes"],
        "planned_tokens_per_s": likely,
        "measured_tokens_per_s": speed,
        "speed_ratio": speed / likely,
        "speed_in_range": low <= speed <= high,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[""], help="trials whose name contains one of these words")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    result: dict[str, Any] = provenance(" ".join(["python", *sys.argv]), "torch") | {"trials": {}}
    print(f"{'':36}{'planned':>10}{'measured':>10}{'ratio':>8}{'default allocator':>19}   speed, measured over planned")
    with tempfile.TemporaryDirectory() as folder:
        call("scripts/make_synthetic.py", "--output", f"{folder}/text", "--tokens", 400_000, "--seed", 1)
        data = prepare(Path(folder, "text", "train.jsonl"), Path(folder), 300, "--val_fraction", 0.1)
        for i, name in enumerate(n for n in TRIALS if any(word in n for word in args.only)):
            row = result["trials"][name] = measure(name, Path(folder, f"run-{i}"), data)
            speed = f"{row['speed_ratio']:.2f}{'' if row['speed_in_range'] else ', outside the range'}"
            sizes = f"{row['planned_mib']:6.0f} MiB{row['measured_mib']:6.0f} MiB"
            print(
                f"{name:36}{sizes}{row['memory_ratio']:8.3f}{row['default_allocator_ratio']:19.3f}   {speed}",
                flush=True,
            )
    ratios = [row["memory_ratio"] for row in result["trials"].values()]
    result["memory_within_10_percent"] = sum(abs(ratio - 1) <= BOUND for ratio in ratios)
    result["speed_in_range"] = sum(row["speed_in_range"] for row in result["trials"].values())
    print(
        f"memory within {BOUND:.0%}: {result['memory_within_10_percent']} of {len(ratios)}; "
        f"speed in the planned range: {result['speed_in_range']} of {len(ratios)}"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
