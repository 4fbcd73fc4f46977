"""Losses of Llama, GPT-J and GPT-2 with about ten million parameters each, on the same tokens in the same order.

    python benchmarks/families.py --input corpus.jsonl.zst [--steps 250] [--seeds 1] [--json FILE]

A BPE tokenizer of 8192 is trained on the text, and each family is trained by `fabric_train.py`, one thread each, with
the same seeds, batches and learning rate. Widths and layers are the same; Llama's gated MLP is narrower, to match the
number of parameters. Losses are on held-out documents.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import corpus_runs
from benchmarks.provenance import provenance
from lit_model.cost import count_parameters
from lit_model.registry import get_config

SIZES = {"n_layer": 6, "n_head": 5, "n_embd": 320, "vocab_size": 8192, "tie_embeddings": True}
# Each family's own initialisation scheme; each MLP has 0.82 million parameters.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("llama-10M", {**SIZES, "intermediate_size": 856, "init": "normal"}),
    "GPT-J": ("gpt-j-97M", {**SIZES, "intermediate_size": 1280}),
    "GPT-2": ("gpt-97M", {**SIZES, "intermediate_size": 1280}),
}
BLOCK_SIZE, ROWS = 128, 32


def train(family: str, data: Path, folder: Path, steps: int, seed: int) -> dict[str, list[float]]:
    """Validation losses, bits per byte and the steps they belong to."""
    name, fields = FAMILIES[family]
    settings = {
        "model.name": name,
        **{f"model.{k}": str(v).lower() if isinstance(v, bool) else v for k, v in fields.items()},
        "train.block_size": BLOCK_SIZE,
        "train.global_batch_samples": ROWS,
        "train.micro_batch_samples": ROWS,
        "train.max_steps": steps,
        "optim.lr": 1e-3,
        "optim.lr_min": 1e-4,
        "optim.warmup_steps": steps // 10,
        "eval.every_steps": max(1, steps // 2),
        "save.every_steps": steps,
        "seed": seed,
    }
    return corpus_runs.train(folder, data, settings)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="text, as scripts/prepare_data.py reads it")
    parser.add_argument("--steps", type=int, default=250, help=f"of {ROWS} rows of {BLOCK_SIZE} tokens (250)")
    parser.add_argument("--seeds", type=int, default=1, help="runs of each family (1)")
    parser.add_argument(
        "--val_fraction", type=float, default=0.003, help="fraction of the documents for the hold-out (0.003)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs, one thread each (1)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = corpus_runs.prepare(args.input.resolve(), work, 8192, "--val_fraction", args.val_fraction)

        def one(job: tuple[str, int]) -> dict[str, list[float]]:
            family, seed = job
            losses = train(family, data, work / f"{family}-{seed}", args.steps, seed)
            print(f"{family}, seed {seed}: {losses['val_bits_per_byte']}", flush=True)
            return losses

        jobs = [(family, seed) for seed in range(1, args.seeds + 1) for family in FAMILIES]
        with ThreadPoolExecutor(args.jobs) as pool:
            runs = dict(zip(jobs, pool.map(one, jobs), strict=True))
        for family, (name, fields) in FAMILIES.items():
            of_family = [losses for (other, _), losses in runs.items() if other == family]
            found[family] = {"parameters": count_parameters(get_config(name, **fields)), "runs": of_family}
    print("\n| family | parameters | validation loss, nats per token | bits per byte |\n|---|---|---|---|")
    for family, facts in found.items():
        losses, bits = ([one[key][-1] for one in facts["runs"]] for key in ("val_loss", "val_bits_per_byte"))
        spread = f" ({min(losses):.4f} to {max(losses):.4f})" if args.seeds > 1 else ""
        mean = statistics.mean
        print(f"| {family} | {facts['parameters']:,} | {mean(losses):.4f}{spread} | {mean(bits):.4f} |")
    if args.json:
        line = f"python benchmarks/families.py --input {args.input.name} --steps {args.steps} --seeds {args.seeds}"
        facts = {**provenance(line, "torch"), "tokens": args.steps * ROWS * BLOCK_SIZE, "families": found}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
