"""The loss alone, forward and backward: our plain and fused cross-entropy beside torch's and Liger's chunked ones.

    python benchmarks/loss.py [--tokens 65536 --n_embd 768 --vocab_size 32064] [--json FILE]

The shapes are those of one micro-batch; the defaults are LLaMmlein_120M's at 32 rows of 2048 (1B: --tokens 16384
--n_embd 2048). The contenders alternate in every round. Prints medians, ratios to the plain path, peak memory beyond
the inputs (CUDA), and the error of each gradient against float64 on the first 512 tokens.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.provenance import provenance
from lit_model.kernels.cross_entropy import obstacle
from lit_model.loss import chunked_cross_entropy

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor, kernel: str) -> Tensor:
    return chunked_cross_entropy(hidden, weight, targets, weight.shape[0], kernel=kernel).loss_sum


def torchs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight, targets, reduction="sum", options=options)


def full(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(
        F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)), targets, reduction="sum"
    )


def contenders(device: torch.device, dtype: torch.dtype) -> tuple[dict[str, Loss], dict[str, str]]:
    """Those that run here by name, and why the others do not."""
    found: dict[str, Loss] = {"plain": functools.partial(ours, kernel="plain"), "full logits": full}
    skipped = {}
    reason = obstacle(device, dtype)
    if reason is None:
        found["fused"] = functools.partial(ours, kernel="fused")
    else:
        skipped["fused"] = reason
    if hasattr(F, "linear_cross_entropy"):
        found["torch"] = torchs
    else:
        skipped["torch"] = "it needs torch 2.13"
    if device.type == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

            loss = LigerFusedLinearCrossEntropyLoss(reduction="sum", accum_dtype=torch.float32)
            found["liger"] = lambda hidden, weight, targets: loss(weight, hidden, targets)
        except ImportError as error:
            skipped["liger"] = str(error)
    else:
        skipped["liger"] = "it needs CUDA"
    return found, skipped


def gradients(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    hidden, weight = (x.detach().requires_grad_() for x in (hidden, weight))
    loss(hidden, weight, targets).backward()
    assert hidden.grad is not None and weight.grad is not None
    return hidden.grad, weight.grad


def errors(loss: Loss, hidden: Tensor, weight: Tensor, targets: Tensor) -> list[float]:
    """The relative error, in the 2-norm, of the gradients of hidden states and head against full logits in float64."""
    exact = gradients(full, hidden.double(), weight.double(), targets)
    found = gradients(loss, hidden, weight, targets)
    return [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, exact, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--n_embd", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=32064)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if args.precision == "bf16" else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(args.tokens, args.n_embd, device=device, dtype=dtype)
    weight = (torch.randn(args.vocab_size, args.n_embd, device=device) / args.n_embd**0.5).to(dtype)
    targets = torch.randint(args.vocab_size, (args.tokens,), device=device)
    losses, skipped = contenders(device, dtype)
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    rows: dict[str, dict[str, Any]] = {name: {} for name in losses}
    for turn in range(args.rounds + 1):  # the first compiles and fills caches
        for name, loss in list(losses.items()):
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
            begin = time.perf_counter()
            try:
                gradients(loss, hidden, weight, targets)
            except torch.OutOfMemoryError:
                skipped[name] = "out of memory"
                del losses[name], rows[name]
                continue
            if device.type == "cuda":
                torch.cuda.synchronize()
                rows[name]["peak_gib"] = (torch.cuda.max_memory_allocated() - before) / 2**30
            if turn:
                seconds[name].append(time.perf_counter() - begin)
    few = min(args.tokens, 512)
    for name, row in rows.items():
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
        row["ms"] = 1000 * statistics.median(seconds[name])
        row["speed_to_plain"] = statistics.median(ratios)
        row["error_hidden"], row["error_head"] = errors(losses[name], hidden[:few], weight, targets[:few])
    shapes = f"{args.tokens} tokens x {args.n_embd} x {args.vocab_size}"
    print(f"{shapes}, {args.precision}, {device.type}, {args.rounds} rounds")
    print(
        f"{'':14s} {'ms':>9s} {'speed / plain':>14s} {'peak GiB':>9s}   relative error of the gradients: hidden, head"
    )
    for name, row in rows.items():
        peak = f"{row['peak_gib']:9.2f}" if "peak_gib" in row else f"{'-':>9s}"
        print(
            f"{name:14s} {row['ms']:9.2f} {row['speed_to_plain']:14.2f} {peak}   "
            f"{row['error_hidden']:.1e} {row['error_head']:.1e}"
        )
    for name, why in skipped.items():
        print(f"{name:14s} skipped: {why}")
    if args.json:
        processor = torch.cuda.get_device_name() if device.type == "cuda" else None
        facts = provenance(" ".join(["python", *sys.argv]), "torch", processor=processor)
        args.json.write_text(json.dumps(facts | {"rows": rows, "skipped": skipped}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
