"""Time to loss of Muon and AdamW at small size, on the same tokens in the same order, on one CPU thread.

    python benchmarks/optimizers.py --input corpus.jsonl.zst [--steps 120] [--seeds 3] [--json FILE]

A BPE tokenizer of 2048 is trained on the text, and a Llama of 1.4 million parameters by the trainer itself, with the
same seeds, rows, warmup and cosine schedule. The learning rate of each optimizer is the best of `--lr` by the
validation loss of the first seed; other settings are the defaults of both. The target is AdamW's last validation loss
of the same seed; a loss between two validations is interpolated. Seconds are CPU time of the steps (forward, backward
and update), so that other work on the machine does not count. The learning rate is still high where an optimizer
reaches the other's last loss, so a run planned for that length would reach it earlier.
"""

from __future__ import annotations

import argparse
import csv
import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

import pretrain.loop
from benchmarks import corpus_runs
from benchmarks.provenance import provenance
from lit_data.loading.batches import StepData
from pretrain.build import set_up
from pretrain.cli.run_parser import parse
from pretrain.logs.layer_norms import LayerNorms
from pretrain.loop import StepResult, train_step
from pretrain.run import Run

MODEL = {"n_layer": 4, "n_head": 4, "n_embd": 128, "intermediate_size": 352}
OPTIMIZERS = ("adamw", "muon")
BLOCK_SIZE, ROWS, VALIDATION_ROWS = 128, 8, 48


def train(data: Path, folder: Path, optimizer: str, lr: float, steps: int, seed: int) -> dict[str, Any]:
    """Validation losses, the steps they belong to, and the median CPU seconds of a step."""
    settings = {
        "data.train": data / "train",
        "data.val": data / "val",
        "out_dir": folder,
        "accelerator": "cpu",
        "devices": 1,
        **{f"model.{name}": value for name, value in MODEL.items()},
        "train.block_size": BLOCK_SIZE,
        "train.global_batch_samples": ROWS,
        "train.micro_batch_samples": ROWS,
        "train.max_steps": steps,
        "optim.name": optimizer,
        "optim.lr": lr,
        "optim.lr_min": lr / 10,
        "optim.warmup_steps": steps // 10,
        "eval.every_steps": max(1, steps // 12),
        "eval.max_samples": VALIDATION_ROWS,
        "save.every_steps": steps,
        "log.report": "false",
        "seed": seed,
    }
    seconds = []

    def timed_step(run: Run, data: StepData, norms: LayerNorms | None = None) -> StepResult:
        start = time.process_time()
        result = train_step(run, data, norms)
        seconds.append(time.process_time() - start)
        return result

    pretrain.loop.train_step = timed_step
    run = set_up(parse([f"--{key}={value}" for key, value in settings.items()]))
    pretrain.loop.fit(run)
    run.close()
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["val_loss"]]
    print(f"{optimizer}, lr {lr:g}, seed {seed}: {rows[-1]['val_loss']}", flush=True)
    return {
        "step": [int(row["step"]) for row in rows],
        "val_loss": [float(row["val_loss"]) for row in rows],
        "step_cpu_s": statistics.median(seconds),
    }


def summarize(runs: dict[str, list[dict[str, Any]]]) -> dict[str, dict[str, float | None]]:
    """Medians over the seeds, by optimizer: last loss, and steps and seconds to AdamW's last loss of the same seed."""
    found = {}
    for optimizer, of_optimizer in runs.items():
        second = statistics.median(run["step_cpu_s"] for run in of_optimizer)
        curves = [dict(zip(run["step"], run["val_loss"], strict=True)) for run in of_optimizer]
        steps = [
            corpus_runs.steps_to(one["val_loss"][-1], curve) for one, curve in zip(runs["adamw"], curves, strict=True)
        ]
        reached = [step for step in steps if step is not None]
        median = statistics.median(reached) if len(reached) == len(steps) else None
        found[optimizer] = {
            "val_loss": statistics.median(run["val_loss"][-1] for run in of_optimizer),
            "step_cpu_s": second,
            "steps_to_adamw": median,
            "cpu_s_to_adamw": None if median is None else median * second,
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="text, as scripts/prepare_data.py reads it")
    parser.add_argument("--steps", type=int, default=120, help=f"of {ROWS} rows of {BLOCK_SIZE} tokens (120)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each optimizer (3)")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 4e-3, 8e-3], help="learning rates to try")
    parser.add_argument("--val_fraction", type=float, default=0.02, help="fraction of the documents held out (0.02)")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent runs, one thread each (1)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tried: dict[str, dict[str, Any]] = {optimizer: {} for optimizer in OPTIMIZERS}
    runs: dict[str, list[dict[str, Any]]] = {optimizer: [] for optimizer in OPTIMIZERS}
    best: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        data = corpus_runs.prepare(args.input.resolve(), work, 2048, "--val_fraction", args.val_fraction)

        def start(pool: ProcessPoolExecutor, optimizer: str, lr: float, seed: int) -> Future[dict[str, Any]]:
            return pool.submit(train, data, work / f"{optimizer}-{lr}-{seed}", optimizer, lr, args.steps, seed)

        # Forked, since importing everything again would take longer than many of the runs.
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("fork")) as pool:
            first = {(o, lr): start(pool, o, lr, 1) for lr in args.lr for o in OPTIMIZERS}
            for (optimizer, lr), run in first.items():
                tried[optimizer][f"{lr:g}"] = run.result()
            for optimizer in OPTIMIZERS:
                best[optimizer] = min((run["val_loss"][-1], float(lr)) for lr, run in tried[optimizer].items())[1]
            seeds = range(2, args.seeds + 1)
            others = {(o, seed): start(pool, o, best[o], seed) for seed in seeds for o in OPTIMIZERS}
            for optimizer in OPTIMIZERS:
                runs[optimizer] = [
                    tried[optimizer][f"{best[optimizer]:g}"],
                    *(others[optimizer, seed].result() for seed in seeds),
                ]
    summary = summarize(runs)
    print("\n| | lr | last loss | CPU s a step | steps to AdamW's last loss | CPU s to it |\n|---|---|---|---|---|---|")
    for optimizer, row in summary.items():
        steps, seconds = (row[name] for name in ("steps_to_adamw", "cpu_s_to_adamw"))
        to = "never | never" if steps is None or seconds is None else f"{steps:.0f} | {seconds:.1f}"
        print(f"| {optimizer} | {best[optimizer]:g} | {row['val_loss']:.4f} | {row['step_cpu_s']:.3f} | {to} |")
    if args.json:
        options = f"--steps {args.steps} --seeds {args.seeds} --lr {' '.join(f'{lr:g}' for lr in args.lr)}"
        facts = {
            **provenance(f"python benchmarks/optimizers.py --input {args.input.name} {options}", "torch"),
            "tokens_per_step": ROWS * BLOCK_SIZE,
            "lr": best,
            "summary": summary,
            "tried": tried,
            "runs": runs,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
