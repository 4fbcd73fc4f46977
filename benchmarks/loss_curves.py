"""Loss curves of the fast path and of float8 beside a plain bf16 and a plain float32 run, on the same tokens.

    python benchmarks/loss_curves.py --input corpus.jsonl.zst --json benchmarks/results/DATE-loss-curves.json

The same model, seed and order of the data in each arm: `float32` and `bf16` run the plain path (no compilation, no
fused kernel), `fast` runs bf16 compiled with every kernel that the trainer chooses by itself, `fp8` the same with
--precision fp8 (on a CPU, where only its numbers matter, without compilation). Low precision changes a curve by
chance as well, so the bound is the reference's own error: the mean distance of `fast` from `float32`, step by step,
is compared with that of `bf16`.

On CUDA also tokens/s (median over the second half), and the gain at equal loss: an arm's tokens/s times the part of
the run that it needs to reach the last validation loss of `fast` (of `bf16` without it). Without --input the text is
generated from a grammar. A Markdown table is written beside the JSON.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch

from benchmarks import corpus_runs
from benchmarks.provenance import provenance
from lit_files.publish import write_json, write_text

SMALL = {"n_layer": 3, "n_head": 4, "n_query_groups": 2, "n_embd": 96, "intermediate_size": 256}
PLAIN = {"train.attention": "loop", "train.loss_kernel": "plain"}
ARMS: dict[str, dict[str, object]] = {
    "float32": {"precision": "fp32", **PLAIN},
    "bf16": {"precision": "bf16", **PLAIN},
    "fast": {"precision": "bf16", "compile": "true"},
    "fp8": {"precision": "fp8", "compile": "true"},
}


def run_arm(name: str, data: Path, folder: Path, args: argparse.Namespace) -> dict[str, list[float]]:
    """Train; returns the columns step, train_loss, val_loss and tokens_per_s, nan where not measured."""
    if args.model is None:
        model = {f"model.{key}": value for key, value in SMALL.items()}
    else:
        model = {"model.name": args.model}
    settings: dict[str, object] = {
        **model,
        "out_dir": folder,
        "data.train": data / "train",
        "data.val": data / "val",
        "accelerator": args.device,
        "devices": 1,
        "train.max_steps": args.steps,
        "train.block_size": args.block_size,
        "train.global_batch_samples": args.rows,
        "train.micro_batch_samples": args.rows,
        "optim.lr": args.lr,
        "optim.lr_min": args.lr / 10,
        "optim.warmup_steps": args.steps // 10,
        "eval.every_steps": max(1, args.steps // 12),
        "eval.max_samples": 48,
        "log.every_steps": 1,
        "log.report": "false",
        "save.every_steps": args.steps,
        "seed": args.seed,
        **ARMS[name],
    }
    if name == "fp8" and args.device == "cpu":
        settings["compile"] = "false"
    command = [sys.executable, "pretrain/fabric_train.py", *(f"--{key}={value}" for key, value in settings.items())]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stdout[-3000:]}")
    with open(folder / "metrics.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    columns = ("step", "train_loss", "val_loss", "tokens_per_s")
    return {column: [float(row[column] or "nan") for row in rows] for column in columns}


def measured(columns: dict[str, list[float]], column: str) -> dict[int, float]:
    """{step: value} where there is one."""
    pairs = zip(columns["step"], columns[column], strict=True)
    return {int(step): value for step, value in pairs if value == value}


def compare(curves: dict[str, dict[str, list[float]]], cuda: bool) -> dict[str, dict[str, float | None]]:
    """Distances from float32, the last validation loss, and on CUDA speed and the gain at equal loss, by arm."""
    found: dict[str, dict[str, float | None]] = {}
    exact = measured(curves["float32"], "train_loss")
    for name, columns in curves.items():
        loss, val = measured(columns, "train_loss"), measured(columns, "val_loss")
        distance = [abs(loss[step] - exact[step]) for step in exact]
        found[name] = {
            "distance": statistics.mean(distance),
            "distance_last_third": statistics.mean(distance[-max(1, len(distance) // 3) :]),
            "train_loss": statistics.mean(list(loss.values())[-max(1, len(loss) // 10) :]),
            "val_loss": list(val.values())[-1],
        }
        if cuda:
            speeds = list(measured(columns, "tokens_per_s").values())
            found[name]["tokens_per_s"] = statistics.median(speeds[len(speeds) // 2 :])
    fast = "fast" if "fast" in found else "bf16"  # compiled like `fp8`, so that the gain is that of float8 alone
    reference = found[fast]
    for name, row in found.items():
        row["distance_over_bf16"] = (row["distance"] or 0.0) / max(found["bf16"]["distance"] or 0.0, 1e-12)
        if cuda:
            steps = max(measured(curves[fast], "step"))
            needed = corpus_runs.steps_to(reference["val_loss"] or 0.0, measured(curves[name], "val_loss"))
            speed = (row["tokens_per_s"] or 0.0) / (reference["tokens_per_s"] or 1.0)
            row["gain_at_equal_loss"] = None if needed is None else speed * steps / needed
    return found


def table(found: dict[str, dict[str, float | None]]) -> list[str]:
    """Markdown."""
    columns = list(dict.fromkeys(key for row in found.values() for key in row))
    lines = [f"| | {' | '.join(column.replace('_', ' ') for column in columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in found.items():
        cells = (
            "-" if row.get(c) is None else f"{row[c]:,.0f}" if c == "tokens_per_s" else f"{row[c]:.4f}" for c in columns
        )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="text, as scripts/prepare_data.py reads it (default: generated)")
    parser.add_argument("--data", type=Path, help="packed datasets DIR/train and DIR/val instead of --input")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if cuda else "cpu")
    parser.add_argument("--model", help="name in lit_model/registry.py (default: 0.7 million parameters)")
    parser.add_argument("--arms", nargs="+", choices=[*ARMS], default=[*ARMS], help="float32 and bf16 always run")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="rows of a step (default %(default)s)")
    parser.add_argument("--block_size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=1, help="arms at the same time, where only their losses matter")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    curves: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        work, data, text = Path(name), args.data, args.input
        if data is None and text is None:
            corpus_runs.call("scripts/make_synthetic.py", "--output", work / "text", "--tokens", 500_000, "--seed", 1)
            text = work / "text" / "train.jsonl"
        if data is None:
            data = corpus_runs.prepare(text.resolve(), work, 2048, "--val_fraction", 0.02)
        arms = list(dict.fromkeys(["float32", "bf16", *args.arms]))
        with ThreadPoolExecutor(args.jobs) as pool:
            for arm, found_curve in zip(
                arms, pool.map(lambda arm: run_arm(arm, data, work / arm, args), arms), strict=True
            ):
                curves[arm] = found_curve
                print(
                    f"{arm}: last validation loss {list(measured(found_curve, 'val_loss').values())[-1]:.4f}",
                    flush=True,
                )
    found = compare(curves, args.device == "cuda")
    lines = table(found)
    print("\n".join(lines))
    if args.json is not None:
        device = torch.cuda.get_device_name() if args.device == "cuda" else None
        facts = provenance(f"benchmarks/loss_curves.py {' '.join(sys.argv[1:])}", "torch", processor=device)
        kept = {
            arm: {c: [None if x != x else x for x in columns[c]] for c in ("step", "train_loss", "val_loss")}
            for arm, columns in curves.items()
        }
        write_json(args.json, facts | {"summary": found, "curves": kept})
        size = args.model or "0.7 million parameters"
        head = f"# Loss curves: {size}, {args.steps} steps of {args.rows} x {args.block_size} tokens"
        write_text(
            args.json.with_suffix(".md"),
            "\n".join([head, "", f"{facts['date']}, {facts['machine']}, `{facts['command']}`", "", *lines, ""]),
        )


if __name__ == "__main__":
    main()
