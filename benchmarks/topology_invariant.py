"""What --train.topology_invariant costs: training with and without it, beside --train.deterministic, in turns.

    python benchmarks/topology_invariant.py [--devices 2] [--steps 6] [--rounds 3] [--model llama-10M] [--json FILE]

Each contender is a run of the trainer on synthetic data, on the CPU with one thread a rank (or on CUDA, where there is
one); the rounds go through all contenders. Printed for each strategy: tokens/s over the steps after the first two
(median over the rounds), the ratio to the same strategy without exact sums (median of the rounds' ratios), and the peak
memory of rank 0 with the imports.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.corpus_runs import call
from benchmarks.provenance import provenance

STRATEGIES: dict[str, dict[str, object]] = {
    "ddp": {"strategy": "ddp"},
    "fsdp": {"strategy": "fsdp"},
}
WARMUP_STEPS = 2


def measure(args: argparse.Namespace, folder: Path, data: Path, settings: dict[str, object]) -> tuple[float, float]:
    """(tokens/s, GiB) of one run."""
    flags: dict[str, object] = {
        "out_dir": folder,
        "data.train": data,
        "data.datapoints": "false",
        "model.name": args.model,
        "accelerator": "cuda" if torch.cuda.is_available() else "cpu",
        "devices": args.devices,
        "precision": args.precision,
        "train.block_size": args.block_size,
        "train.micro_batch_samples": args.rows,
        "train.global_batch_samples": args.rows * args.accumulate * args.devices,
        "train.max_steps": WARMUP_STEPS + args.steps,
        "optim.warmup_steps": 1,
        "log.every_steps": 1,
        "log.report": "false",
        "eval.every_steps": 10**6,
        "save.every_steps": 10**6,
        **settings,
    }
    call("pretrain/fabric_train.py", *(f"--{key}={value}" for key, value in flags.items()))
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if int(row["step"]) > WARMUP_STEPS]
    rate = statistics.median(float(row["tokens_per_s"]) for row in rows)
    return rate, max(float(row["memory_gib"]) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-10M", help="name in lit_model/registry.py (llama-10M)")
    parser.add_argument("--devices", type=int, default=2, help="ranks (2)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rows", type=int, default=2, help="of a micro-batch (2)")
    parser.add_argument("--accumulate", type=int, default=2, help="micro-batches of a step on each rank (2)")
    parser.add_argument("--block_size", type=int, default=512, help="tokens in a row (512)")
    parser.add_argument("--steps", type=int, default=6, help="measured steps of a run (6)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    modes: dict[str, dict[str, object]] = {
        "deterministic": {"train.deterministic": "true"},
        "topology_invariant": {"train.topology_invariant": "true"},
    }
    found: dict[str, list[tuple[float, float]]] = {f"{s}, {m}": [] for s in STRATEGIES for m in modes}
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        call("scripts/make_synthetic.py", "--output", work / "text", "--tokens", 400_000, "--seed", 1)
        text = work / "text" / "train.jsonl"
        call("scripts/train_tokenizer.py", "--input", text, "--output", work / "tok", "--vocab_size", 300)
        call("scripts/prepare_data.py", "--input", text, "--tokenizer", work / "tok", "--output", work / "data")
        for i in range(args.rounds):
            for strategy, flags in STRATEGIES.items():
                for mode, more in modes.items():
                    run = work / f"{strategy}-{mode}-{i}"
                    found[f"{strategy}, {mode}"].append(measure(args, run, work / "data" / "train", flags | more))
    result: dict[str, Any] = provenance(" ".join(["python", *sys.argv]), "torch") | {"contenders": {}}
    for name, values in found.items():
        base = found[f"{name.partition(',')[0]}, deterministic"]
        ratios = [mine[0] / other[0] for mine, other in zip(values, base, strict=True)]
        result["contenders"][name] = {
            "tokens_per_s": statistics.median(rate for rate, _ in values),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
            "memory_gib": max(memory for _, memory in values),
        }
    print(f"{args.model}, {args.precision}, {args.devices} ranks, steps of {args.accumulate} x {args.rows} rows a rank")
    for name, row in result["contenders"].items():
        print(f"{name:28}{row['tokens_per_s']:9.0f} tokens/s{row['ratio']:7.3f}{row['memory_gib']:8.2f} GiB")
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
