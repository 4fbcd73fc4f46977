"""Peak memory and time of the chunked distillation loss, compared with BabyLlama's implementation.

    python benchmarks/distill.py --json FILE [--rounds 3] [--device cpu|cuda] [--threads N]

Two teachers (width 1024 and 1536), a student (512), a vocabulary of 32000, 16 rows of 128 tokens; from the last hidden
states of all three to the gradients of the student's hidden states and head. `naive` holds the full logits of the three
in float32: F.cross_entropy, and F.kl_div of log_softmax and softmax with `batchmean`. Ours has the same weighting, and
the losses and gradients of both must agree. Each measurement runs in a separate process; the rounds alternate.

Memory is the peak above the inputs, of the first pass: of the resident set on a CPU (the libraries were warmed on tiny
tensors), of torch's allocator on CUDA. Seconds are the median of further passes. Float32 on a CPU; on CUDA the matrix
products are bfloat16. Ratios are medians over the rounds. The goal: a quarter of the memory, 1.1 times the time.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.provenance import provenance
from lit_model.distillation import Distillation, Teacher, chunked_distillation

WIDTH, TEACHER_WIDTHS, VOCAB = 512, (1024, 1536), 32000
ROWS, LENGTH = 16, 128
SETTING = Distillation("forward_kl", 2.0, "logits")
ALPHA = 0.5
AGREE = {"cpu": 1e-4, "cuda": 2e-2}  # float32, and products in bfloat16


class Batch:
    """Hidden states and heads, drawn so that logits spread by about 1."""

    def __init__(self, device: str, rows: int, length: int, vocab: int) -> None:
        g = torch.Generator().manual_seed(0)
        low = torch.bfloat16 if device == "cuda" else torch.float32

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=g).mul_(scale).to(device)

        self.vocab = vocab
        self.hidden = draw(rows, length, WIDTH).to(low).requires_grad_()  # (B, T, C)
        self.weight = draw(vocab, WIDTH, scale=WIDTH**-0.5).requires_grad_()  # (V, C)
        self.targets = torch.randint(0, vocab, (rows, length), generator=g).to(device)
        self.teachers = [
            Teacher(draw(rows, length, c).to(low), draw(vocab, c, scale=c**-0.5).to(low), None, None, 0.5)
            for c in TEACHER_WIDTHS
        ]


def naive(batch: Batch) -> Tensor:
    """alpha CE + (1 - alpha) tau^2 KL, the sum of the KL divided by the number of rows alone."""
    tau = SETTING.temperature
    student = F.linear(batch.hidden, batch.weight).float()  # (B, T, V)
    loss = F.cross_entropy(student.flatten(0, 1), batch.targets.flatten())
    with torch.no_grad():
        teachers = [F.linear(t.hidden, t.weight).float() for t in batch.teachers]
        mean = torch.stack(teachers).mean(0)
    softened = F.log_softmax(student / tau, dim=-1)
    divergence = F.kl_div(softened, F.softmax(mean / tau, dim=-1), reduction="batchmean")
    return ALPHA * loss + (1 - ALPHA) * tau**2 * divergence


def ours(batch: Batch) -> Tensor:
    length, tokens = batch.targets.shape[1], batch.targets.numel()
    out = chunked_distillation(
        *(batch.hidden, batch.weight, batch.targets, batch.vocab, batch.teachers, SETTING),
        alpha=ALPHA,
        divergence_scale=float(length),
    )
    return out.loss_sum / tokens


LOSSES: dict[str, Callable[[Batch], Tensor]] = {"naive": naive, "ours": ours}


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process, bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"{field} is not in /proc/self/status")


def worker(name: str, device: str, threads: int, passes: int) -> dict[str, float]:
    """One pass for the memory and `passes` for the time."""
    torch.set_num_threads(threads)
    cuda = device == "cuda"

    def forward_and_backward(batch: Batch) -> float:
        batch.hidden.grad = batch.weight.grad = None
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            loss = LOSSES[name](batch)
        loss.backward()
        value = loss.item()
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        return value

    seconds: list[float] = []
    forward_and_backward(Batch(device, 2, 8, 512))
    batch = Batch(device, ROWS, LENGTH, VOCAB)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = resident("VmRSS")
    loss = forward_and_backward(batch)
    peak = torch.cuda.max_memory_allocated() if cuda else resident("VmHWM")
    norms = {}
    for key, tensor in (("hidden_grad_norm", batch.hidden), ("head_grad_norm", batch.weight)):
        assert tensor.grad is not None
        norms[key] = tensor.grad.float().norm().item()
    seconds.clear()
    for _ in range(passes):
        forward_and_backward(batch)
    return {"memory_bytes": peak - before, "seconds": statistics.median(seconds), "loss": loss, **norms}


def measure(name: str, args: argparse.Namespace) -> dict[str, float]:
    command = [sys.executable, __file__, "--worker", name, args.device, str(args.threads), str(args.passes)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help="timed passes per round (default %(default)s)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    loads = [os.getloadavg()[0]]
    for number in range(args.rounds):
        for name in sorted(LOSSES, reverse=bool(number % 2)):
            found[name].append(measure(name, args))
        loads.append(os.getloadavg()[0])
    pairs = list(zip(found["naive"], found["ours"], strict=True))
    for key in ("loss", "hidden_grad_norm", "head_grad_norm"):
        for theirs, own in ((a[key], b[key]) for a, b in pairs):
            assert math.isclose(theirs, own, rel_tol=AGREE[args.device]), f"{key}: {theirs} and {own}"
    rows = {
        name: {"median": {key: statistics.median(m[key] for m in measured) for key in measured[0]}, "rounds": measured}
        for name, measured in found.items()
    }
    memory = statistics.median(a["memory_bytes"] / b["memory_bytes"] for a, b in pairs)
    seconds = statistics.median(b["seconds"] / a["seconds"] for a, b in pairs)
    for name in LOSSES:
        median = rows[name]["median"]
        assert isinstance(median, dict)
        print(f"{name:6} {median['memory_bytes'] / 1e6:8.1f} MB {median['seconds']:9.4f} s")
    print(f"ours holds 1/{memory:.2f} of naive's memory and takes {seconds:.3f} of its time")
    machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    result: dict[str, Any] = {
        **provenance(
            f"python benchmarks/distill.py --rounds {args.rounds} --passes {args.passes} --device {args.device} "
            f"--threads {args.threads}",
            "torch",
            processor=machine,
        ),
        "load_average": loads,
        "naive_memory_by_ours": memory,
        "our_time_by_naive": seconds,
        "rows": rows,
    }
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))))
    else:
        main()
