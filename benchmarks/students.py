"""Losses of a student of two teachers, the same student trained from scratch on the same tokens, and the teachers.

    python benchmarks/students.py --input corpus.jsonl.zst [--documents 6] [--seeds 3] [--json FILE]

BabyLlama's question at small scale: the models of configs/distillation_small/ are trained on the first documents of a
text, with separate teachers per seed; the next `--val_documents` are the hold-out. The student is trained once with the
live teachers, and once with their cache from `scripts/cache_teacher.py` (`--k`). All see the same rows in the same
order. Losses are cross-entropies on the held-out documents: after the last step, and the lowest during training.

Then, with the first seed's models on held-out rows, the loss from caching only k tokens: the share of probability, of
the divergence, and of its gradient (with respect to the student's last hidden states), each against the teachers' full
distributions.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard
from torch import Tensor

sys.path[0] = str(Path(__file__).resolve().parent.parent)

from benchmarks import corpus_runs
from benchmarks.provenance import provenance
from lit_data.loading.batches import read_rows
from lit_data.loading.rows import ConcatRows
from lit_data.packed.reader import PackedDataset
from lit_model.distillation import Distillation, Teacher, TeacherHead, TopK, chunked_distillation, ensemble_top_k
from lit_model.load import load_model
from lit_model.loss import IGNORE_INDEX

CONFIGS = "configs/distillation_small"
TEACHERS = ("teacher_llama", "teacher_gpt2")
VOCAB_SIZE, BLOCK_SIZE = 2048, 256
KEPT = (1, 4, 8, 16, 32, 64, 128, 256, 1024, 2048)  # tokens of a cache
ROWS = 64


def cut(source: Path, folder: Path, documents: int, val_documents: int) -> tuple[Path, Path]:
    """The first lines of a .jsonl or .jsonl.zst: files to train on and to hold out. SystemExit if it has fewer."""
    with open(source, "rb") as file:
        plain = zstandard.ZstdDecompressor().stream_reader(file) if source.suffix == ".zst" else file
        lines = list(itertools.islice(io.BufferedReader(plain), documents + val_documents))
    if len(lines) < documents + val_documents:
        raise SystemExit(f"{source} has {len(lines)} documents, fewer than {documents} + {val_documents}")
    parts = folder / "train.jsonl", folder / "val.jsonl"
    parts[0].write_bytes(b"".join(lines[:documents]))
    parts[1].write_bytes(b"".join(lines[documents:]))
    return parts


def of_seed(
    work: Path, seed: int, settings: dict[str, object], temperature: float, k: int
) -> dict[str, dict[str, float]]:
    """Bits per byte of the teachers and the students of one seed: after the last step, and the lowest on the way."""
    found: dict[str, dict[str, float]] = {}

    def train(name: str, config: str, **more: object) -> None:
        given = {"config": f"{CONFIGS}/{config}.yaml", "seed": seed, **settings}
        given |= {key.replace("__", "."): value for key, value in more.items()}
        losses = corpus_runs.train(work / f"{name}-{seed}", work / "data", given)
        bits = losses["val_bits_per_byte"]
        found[name] = {"last": bits[-1], "lowest": min(bits)}
        print(f"seed {seed}, {name}: {bits[-1]:.4f} bits per byte, {min(bits):.4f} the lowest", flush=True)

    for teacher in TEACHERS:
        train(teacher, teacher)
    folders = [work / f"{teacher}-{seed}" for teacher in TEACHERS]
    train("from scratch", "student", objective="cross_entropy", distillation__teachers="[]")
    live = "[" + ", ".join(f"{{path: {folder}}}" for folder in folders) + "]"
    softened = {"distillation__temperature": temperature}
    train("distilled", "student", distillation__teachers=live, **softened)
    if k:
        cache = work / f"cache-{seed}"
        made_of = ("--teachers", *folders, "--data", work / "data" / "train", "--output", cache)
        corpus_runs.call(
            "scripts/cache_teacher.py", *made_of, "--block_size", BLOCK_SIZE, "--k", k, "--temperature", temperature
        )
        cached = {"distillation__teachers": "[]", "distillation__cache": cache, "distillation__divergence": "topk_kl"}
        train(f"distilled, cache of {k}", "student", **cached, **softened)
    return found


def leave_out(work: Path, seed: int, temperature: float) -> list[dict[str, float]]:
    """For each k: bytes per token, mean probability of the other tokens, and relative errors."""
    dataset = PackedDataset(work / "data" / "val")
    rows, vocab_size = (
        ConcatRows(dataset, BLOCK_SIZE),
        dataset.vocab_size,
    )  # a small text may yield fewer ids than VOCAB_SIZE
    windows = np.arange(min(rows.n_windows, ROWS))
    batch = read_rows(rows, windows, windows, document_mask=True)

    def said(name: str, share: float) -> Teacher:
        model, _ = load_model(work / f"{name}-{seed}")
        with torch.no_grad():
            teacher = model(batch.tokens, cu_seqlens=batch.cu_seqlens, head=TeacherHead(share))
        assert isinstance(teacher, Teacher)
        return teacher

    student = said("distilled", 1.0)
    teachers = [said(name, 1 / len(TEACHERS)) for name in TEACHERS]

    def measure(setting: Distillation, teacher: list[Teacher] | TopK) -> tuple[Tensor, Tensor]:
        hidden = student.hidden.clone().requires_grad_()
        out = chunked_distillation(
            hidden, student.weight, batch.targets, vocab_size, teacher, setting, alpha=0.0, bias=student.bias
        )
        out.loss_sum.backward()
        assert hidden.grad is not None and out.divergence_sum is not None
        return out.divergence_sum, hidden.grad

    divergence, gradient = measure(Distillation("forward_kl", temperature), teachers)
    table = []
    for k in (k for k in KEPT if k <= vocab_size):
        setting = Distillation("topk_kl", temperature, top_k=k)
        kept = ensemble_top_k(teachers, setting, vocab_size, k)
        rounded = TopK(kept.ids, kept.log_probs.half().float())  # as stored in the cache
        less, other = measure(setting, rounded)
        rest = 1 - kept.log_probs.exp().sum(-1)
        table.append(
            {
                "k": k,
                "bytes": 4 * k,
                "rest": float(rest[batch.targets != IGNORE_INDEX].mean()),
                "divergence": float(abs(less - divergence) / divergence),
                "gradient": float((other - gradient).norm() / gradient.norm()),
            }
        )
    return table


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, required=True, help="a .jsonl or .jsonl.zst with a text in each line")
    parser.add_argument("--documents", type=int, default=6, help="to train on (6)")
    parser.add_argument("--val_documents", type=int, default=4, help="to hold out (4)")
    parser.add_argument("--seeds", type=int, default=3, help="(3)")
    parser.add_argument("--epochs", type=float, help="in place of the configs', with warm-up over the first tenth")
    parser.add_argument("--k", type=int, default=32, help="tokens in the cache; 0: no student of a cache (32)")
    parser.add_argument("--temperature", type=float, default=2.0, help="of the distillation (2)")
    parser.add_argument("--jobs", type=int, default=1, help="concurrent seeds, one thread each (1)")
    parser.add_argument("--json", type=Path, help="write the results here")
    args = parser.parse_args()
    settings: dict[str, object] = {}
    if args.epochs is not None:
        settings = {"train.max_epochs": args.epochs, "optim.warmup_fraction": 0.1}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        text, held_out = cut(args.input, work, args.documents, args.val_documents)
        data = corpus_runs.prepare(text, work, VOCAB_SIZE, "--val_input", held_out)
        tokens = {part: PackedDataset(data / part).n_tokens for part in ("train", "val")}
        print(f"{tokens['train']:,} tokens to train on, {tokens['val']:,} in the hold-out", flush=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            seeds = range(1, args.seeds + 1)
            runs = list(pool.map(lambda seed: of_seed(work, seed, settings, args.temperature, args.k), seeds))
        small = leave_out(work, 1, args.temperature)
    print("\n| bits per byte | " + " | ".join(f"seed {seed}" for seed in seeds) + " | mean | mean of the lowest |")
    print("|---|" + "---|" * (args.seeds + 2))
    for name in runs[0]:
        last, lowest = ([run[name][key] for run in runs] for key in ("last", "lowest"))
        cells = [*last, statistics.mean(last), statistics.mean(lowest)]
        print(f"| {name} | " + " | ".join(f"{value:.4f}" for value in cells) + " |")
    print("\n| k | bytes per token | probability of the others | error of the divergence | of its gradient |")
    print("|---|---|---|---|---|")
    for row in small:
        print("| {k} | {bytes} | {rest:.2%} | {divergence:.2%} | {gradient:.2%} |".format(**row))
    if args.json:
        line = f"python benchmarks/students.py --input {args.input.name} --documents {args.documents}"
        line += f" --val_documents {args.val_documents} --seeds {args.seeds} --k {args.k}"
        line += f" --temperature {args.temperature:g}"
        line += f" --epochs {args.epochs:g}" if args.epochs is not None else ""
        facts: dict[str, Any] = {
            **provenance(line, "torch"),
            "tokens": tokens,
            "bits_per_byte": runs,
            "left_out": small,
        }
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
