"""Score of a plan's memory and speed: runs of the trainer beside the plan that each of them recorded as it started.

    python benchmarks/plan_memory.py [--only WORD ...] [--jobs N] [--json FILE]

Each run takes a few steps on synthetic data, with a validation and a checkpoint. Planned is what scripts/plan_run.py
prints; measured is the peak of rank 0. On CUDA, where the models are larger, that is allocated memory. On a CPU it is
resident memory above that of the process with its imports, of a run whose allocator returns freed tensors to the system
at once (glibc with MALLOC_MMAP_THRESHOLD_ of 1 MiB); a second run, whose speed is measured too, has the default
allocator, which keeps and fragments some. Ratios are measured over planned.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.corpus_runs import call, prepare
from benchmarks.provenance import provenance
from lit_eval.run_facts import read_run
from lit_model.registry import get_config

WARMUP_STEPS, STEPS = 1, 2
BOUND = 0.1  # the ratio's distance from 1 that counts as a hit
SIZES = {
    "2M": ("n_layer=4", "n_head=4", "n_embd=192", "intermediate_size=512", "vocab_size=4096"),
    "17M": ("n_layer=6", "n_head=6", "n_embd=384", "intermediate_size=1024", "vocab_size=16000"),
    "41M": ("n_layer=8", "n_head=8", "n_embd=512", "intermediate_size=1536", "vocab_size=16000"),
    "110M": ("n_layer=12", "n_head=12", "n_embd=768", "intermediate_size=2048", "vocab_size=16000"),
}
Trial = tuple[str, int, int, int, dict[str, object]]
"""(size, rows of a micro-batch, tokens of a row, micro-batches, other flags)"""
ON_CPU: dict[str, Trial] = {
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
BF16: dict[str, object] = {"precision": "bf16", "compile": "true"}
RECOMPUTED: dict[str, object] = {"train.activation_checkpointing": "full"}
ON_CUDA: dict[str, Trial] = {  # sizes are models of lit_model/registry.py
    "1B 4x2048": ("LLaMmlein_1B", 4, 2048, 1, BF16),
    "120M 16x2048": ("LLaMmlein_120M", 16, 2048, 1, BF16),
    "120M 16x2048 not compiled": ("LLaMmlein_120M", 16, 2048, 1, {"precision": "bf16"}),
    "120M 16x2048 recomputed": ("LLaMmlein_120M", 16, 2048, 1, BF16 | RECOMPUTED),
    "1B 8x2048 recomputed": ("LLaMmlein_1B", 8, 2048, 1, BF16 | RECOMPUTED),
    "120M 8x2048 accumulated": ("LLaMmlein_120M", 8, 2048, 2, BF16),
    "120M 16x2048 muon": ("LLaMmlein_120M", 16, 2048, 1, BF16 | {"optim.name": "muon"}),
    "120M 1x16384": ("LLaMmlein_120M", 1, 16384, 1, BF16 | {"model.block_size": 16384}),
    "1B 4x2048 fp8": ("LLaMmlein_1B", 4, 2048, 1, BF16 | {"precision": "fp8"}),
    "120M 16x2048 plain loss": ("LLaMmlein_120M", 16, 2048, 1, BF16 | {"train.loss_kernel": "plain"}),
    "120M 4x2048 fp32": ("LLaMmlein_120M", 4, 2048, 1, {"precision": "fp32", "data.document_mask": "false"}),
    "120M 16x2048 fsdp": ("LLaMmlein_120M", 16, 2048, 1, BF16 | {"strategy": "fsdp"}),
    "llama-360M 32x128": ("llama-360M", 32, 128, 1, BF16),
}
CUDA = torch.cuda.is_available()
TRIALS = ON_CUDA if CUDA else ON_CPU


def run_once(name: str, folder: Path, data: Path) -> tuple[dict[str, Any], float, float]:
    """(plan, peak bytes, tokens/s) of one run, whose folder is deleted."""
    size, rows, block_size, accumulate, more = TRIALS[name]
    if size in SIZES:
        model = [f"model.{part}" for part in SIZES[size]]
    else:  # the data's vocabulary is smaller
        model = [f"model.name={size}", f"model.vocab_size={get_config(size).vocab_size}"]
    flags: dict[str, object] = {
        "out_dir": folder,
        "data.train": data / "train",
        "data.val": data / "val",
        "accelerator": "cuda" if CUDA else "cpu",
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
        **more,
    }
    call("pretrain/fabric_train.py", *(f"--{part}" for part in model), *(f"--{k}={v}" for k, v in flags.items()))
    run = read_run(folder)
    plan, m = run.starts[-1]["plan"], run.metrics
    memory = float(m.finite("memory_gib").max()) * 2**30 - (0 if CUDA else plan["resident_bytes"])
    speed = statistics.median(m["tokens_per_s"][m["step"] > WARMUP_STEPS].tolist())
    shutil.rmtree(folder)
    return plan, memory, speed


def measure(name: str, folder: Path, data: Path) -> dict[str, float]:
    """Planned and measured figures of a trial."""
    plan, resident, speed = run_once(name, folder / "default", data)
    memory = resident
    if not CUDA:
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
    parser.add_argument("--jobs", type=int, default=1, help="trials at once, on CUDA alone: their speeds mean nothing")
    parser.add_argument("--json", type=Path, help="write the results here, after each trial")
    args = parser.parse_args()
    if args.jobs > 1 and not CUDA:
        parser.error("--jobs needs CUDA: on a CPU the trials would share its cores and the setting of their allocator")
    device = torch.cuda.get_device_name() if CUDA else None
    result: dict[str, Any] = provenance(shlex.join(["python", *sys.argv]), "torch", processor=device) | {"trials": {}}
    print(f"{'':36}{'planned':>10}{'measured':>10}{'ratio':>8}{'default allocator':>19}   speed, measured over planned")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(args.jobs) as pool:
        call("scripts/make_synthetic.py", "--output", f"{folder}/text", "--tokens", 400_000, "--seed", 1)
        data = prepare(Path(folder, "text", "train.jsonl"), Path(folder), 300, "--val_fraction", 0.1)
        names = [name for name in TRIALS if any(word in name for word in args.only)]
        runs = {pool.submit(measure, name, Path(folder, f"run-{i}"), data): name for i, name in enumerate(names)}
        for done in as_completed(runs):
            if (failure := done.exception()) is not None:
                print(f"{runs[done]:36}{failure}", flush=True)
                continue
            row = result["trials"][runs[done]] = done.result()
            speed = f"{row['speed_ratio']:.2f}{'' if row['speed_in_range'] else ', outside the range'}"
            sizes = f"{row['planned_mib']:6.0f} MiB{row['measured_mib']:6.0f} MiB"
            print(
                f"{runs[done]:36}{sizes}{row['memory_ratio']:8.3f}{row['default_allocator_ratio']:19.3f}   {speed}",
                flush=True,
            )
            if args.json is not None:
                args.json.write_text(json.dumps(result | summary(result["trials"]), indent=1) + "\n", encoding="utf-8")
    found, n = summary(result["trials"]), len(result["trials"])
    print(
        f"memory within {BOUND:.0%}: {found['memory_within_10_percent']} of {n}; "
        f"speed in the planned range: {found['speed_in_range']} of {n}"
    )
    return 0 if n == len(names) else 1


def summary(trials: dict[str, dict[str, float]]) -> dict[str, int]:
    return {
        "memory_within_10_percent": sum(abs(row["memory_ratio"] - 1) <= BOUND for row in trials.values()),
        "speed_in_range": sum(bool(row["speed_in_range"]) for row in trials.values()),
    }


if __name__ == "__main__":
    sys.exit(main())
