"""One training step: our trainer against litgpt's model and transformers' Llama, with equal shapes, data and precision.

Every contender runs in a separate process; the rounds alternate between them (A B C A B C ...), so that changes in
machine speed affect all of them. A round is `--steps` optimizer steps: forward, backward, clipping to norm 1, fused
AdamW on fp32 weights. Prints medians over the rounds and, per round, the ratio to ours.

    python benchmarks/train_step.py --model llama-10M --peer litgpt=PYTHON --json FILE

Peers are imported in this Python, or in the one given by --peer NAME=PYTHON; a missing one is reported and skipped.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.peer_step import serve
from lit_data.packed.writer import PackedWriter
from lit_model.cost import count_parameters, flops_per_token
from lit_model.registry import get_config
from pretrain.build import set_up
from pretrain.fabric_train import parse
from pretrain.logs.throughput import PEAK_FLOPS
from pretrain.loop import train_step

EOS_ID = 0
CONTENDERS = ("llammlein", "llammlein-documents", "transformers", "litgpt")


def ours(name: str, plan: dict[str, Any]) -> Any:
    """The trainer's own step: its loader, its loss per span, its clipping and optimizer; only the record is off."""
    documents = name.endswith("documents")
    run = set_up(
        parse(
            [
                f"--out_dir={plan['folder']}/{name}",
                f"--data.train={plan['folder']}/data",
                f"--data.document_mask={'true' if documents else 'false'}",
                "--data.datapoints=false",
                f"--model.name={plan['model']}",
                f"--model.vocab_size={plan['config']['vocab_size']}",
                f"--train.block_size={plan['block_size']}",
                f"--train.global_batch_samples={plan['batch']}",
                f"--train.micro_batch_samples={plan['batch']}",
                "--train.max_steps=1000000",
                f"--precision={plan['precision']}",
                f"--compile={'true' if plan['compile'] else 'false'}",
                "--devices=1",
            ]
        )
    )
    steps = run.loader.steps(0, 1_000_000)

    def step() -> Any:
        result = train_step(run, next(steps))
        return result.loss_sum / result.n_targets

    return step


# ---------------------------------------------------------------- the call that compares


class Contender:
    """A worker process."""

    def __init__(self, name: str, python: str, plan_file: Path, log: Path) -> None:
        self.name = name
        if name.startswith("llammlein"):
            command = [python, str(ROOT / "benchmarks" / "train_step.py"), "--worker", name, "--plan", str(plan_file)]
        else:
            command = [python, str(ROOT / "benchmarks" / "peer_step.py"), name, str(plan_file)]
        self.log = open(log, "w", encoding="utf-8")  # noqa: SIM115 - closed by end
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )
        self.seconds: list[float] = []
        self.last: dict[str, Any] = {}

    def read(self) -> dict[str, Any] | None:
        """The next JSON line; None if the worker has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        return None

    def round(self, steps: int) -> bool:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(f"{steps}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return False
        answer = self.read()
        if answer is None:
            return False
        self.last = answer
        self.seconds.append(answer["seconds"])
        return True

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self.log.close()


def write_data(folder: Path, vocab_size: int, n_tokens: int, document_tokens: int) -> None:
    """The same random tokens as a packed dataset and as a flat file; documents of about `document_tokens`."""
    rng = np.random.default_rng(0)
    # A skewed distribution, as words have; uniform ids would make the embedding's gradient denser than text does.
    ids = np.minimum(rng.zipf(1.2, size=n_tokens), vocab_size - 1).astype(np.int32)
    ends, end = [], 0
    while end < n_tokens:
        end = min(end + int(rng.integers(document_tokens // 2, document_tokens * 3 // 2)), n_tokens)
        ends.append(end)
    ids[np.asarray(ends) - 1] = EOS_ID
    np.save(folder / "tokens.npy", ids)
    facts = {"kind": "none", "fingerprint": "benchmark", "folder": None}
    with PackedWriter(folder / "data", tokenizer=facts, vocab_size=vocab_size, eos_id=EOS_ID) as writer:
        for number, (start, stop) in enumerate(pairwise([0, *ends])):
            writer.add(ids[start:stop], id=str(number))


def last_line(folder: Path, name: str) -> str:
    """Why a contender ended. Ours has to run: it raises SystemExit with the whole of its log."""
    log = (folder / f"{name}.log").read_text().strip()
    if name.startswith("llammlein"):
        sys.exit(f"{log}\nerror: {name} ended before its first round; its log is above")
    return (log.splitlines() or ["ended without a message"])[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-10M", help="name in lit_model/registry.py")
    parser.add_argument("--batch", type=int, default=8, help="rows in a step")
    parser.add_argument("--block_size", type=int, help="tokens in a row (default: the model's)")
    parser.add_argument("--document_tokens", type=int, default=400, help="mean length of a document")
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup_steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="threads a contender (default: torch's choice)")
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--plan", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        plan = json.loads(args.plan.read_text())
        if plan["threads"]:
            torch.set_num_threads(plan["threads"])
        serve(args.worker, ours(args.worker, plan))
        return 0

    config = get_config(args.model)
    T = args.block_size or config.block_size
    pythons = dict(p.split("=", 1) for p in args.peer)
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {len(os.sched_getaffinity(0))} cores"
    peak = next((p for n, p in PEAK_FLOPS.items() if cuda and n in device), None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, config.vocab_size, max(200_000, 40 * args.batch * T), args.document_tokens)
        plan = {
            "folder": str(folder),
            "model": args.model,
            "config": config.to_dict(),
            "batch": args.batch,
            "block_size": T,
            "precision": args.precision,
            "compile": args.compile,
            "threads": args.threads,
        }
        (folder / "plan.json").write_text(json.dumps(plan))
        contenders, skipped, found = [], {}, {}
        for contender_name in args.only:
            python = pythons.get(contender_name, sys.executable)
            c = Contender(contender_name, python, folder / "plan.json", folder / f"{contender_name}.log")
            ready = c.read()
            if ready is None:
                c.end()
                skipped[contender_name] = last_line(folder, contender_name)
                continue
            found[contender_name] = ready["versions"]
            contenders.append(c)
        for c in contenders:
            if not c.round(args.warmup_steps):
                skipped[c.name] = last_line(folder, c.name)
        contenders = [c for c in contenders if c.name not in skipped]
        for c in contenders:
            c.seconds.clear()
        for _ in range(args.rounds):
            for c in contenders:
                assert c.round(args.steps), f"{c.name} ended in a round"
        for c in contenders:
            c.end()

    tokens = args.steps * args.batch * T
    flops = flops_per_token(config, T)
    rows = []
    base = next((c for c in contenders if c.name == "llammlein"), contenders[0])
    for c in contenders:
        rate = tokens / statistics.median(c.seconds)
        ratios = [b / s for b, s in zip(base.seconds, c.seconds, strict=True)]
        rows.append(
            {
                "name": c.name,
                "tokens_per_s": rate,
                "mfu": rate * flops / peak if peak else None,
                "memory_gib": c.last["memory_gib"],
                "rate_to_ours": statistics.median(ratios),
                "rate_to_ours_min": min(ratios),
                "rate_to_ours_max": max(ratios),
                "loss": c.last["loss"],
                "versions": found[c.name],
            }
        )
    print(
        f"{args.model} ({count_parameters(config):,} parameters), {args.batch} x {T} tokens, {args.precision}, "
        f"compile {args.compile}, {device}; {args.rounds} rounds of {args.steps} steps"
    )
    print(f"{'':22s} {'tokens/s':>10s} {'MFU':>7s} {'memory':>9s}   rate / ours (min .. max)")
    for r in rows:
        mfu = f"{r['mfu']:.1%}" if r["mfu"] else "-"
        print(
            f"{r['name']:22s} {r['tokens_per_s']:10,.0f} {mfu:>7s} {r['memory_gib']:6.2f} GiB   "
            f"{r['rate_to_ours']:.3f} ({r['rate_to_ours_min']:.3f} .. {r['rate_to_ours_max']:.3f})"
        )
    for skipped_name, why in skipped.items():
        print(f"{skipped_name:22s} skipped: {why}")
    if args.json:
        facts = {k: v for k, v in vars(args).items() if k not in ("json", "worker", "plan", "peer")}
        result = {"date": time.strftime("%Y-%m-%d"), "device": device, "args": facts, "rows": rows, "skipped": skipped}
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
