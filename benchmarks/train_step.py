"""One training step: our trainer against other libraries' models, with equal shapes, data and precision.

    python benchmarks/train_step.py --model LLaMmlein_1B --batches 4 8 12 --precision bf16 --compile
    python benchmarks/train_step.py --model llama-10M --only llammlein-documents --batches 16x2048 4x8192 1x32768

A contender is a process: our trainer on whole rows (the work that the peers do) or with documents kept apart (its
default), the same with other flags (--ours), or a peer in the usual loop. A step is forward, backward, clipping to norm
1 and fused AdamW on fp32 weights. Contenders whose estimated memory fits the device together build and compile at the
same time (on a CPU one after another) and are then timed in turns, a round of each (A B C A B C ...), so that changes
in machine speed affect all of them; the others follow. Two calls on one machine compile at the same time and time their
rounds in turns, by a lock. Running out of memory is a result.

Prints, and writes as JSON and Markdown, for each contender and batch: tokens/s (median over the rounds), MFU with
attention counted in full and as causal, the share of the matrix-multiply rate measured in the same call, peak memory,
seconds of the first step (compilation included), CPU time of a step (over all threads; on a machine with other load it
varies less than the rate), and the median ratio of rates to our whole rows of the same shape. Peers are imported in
this Python, or in the one given by --peer NAME=PYTHON; a missing one is reported and skipped.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.peer_step import PEERS, serve
from lit_data.packed.writer import PackedWriter
from lit_model.config import ModelConfig
from lit_model.cost import TrainingSetting, count_parameters, flops_per_token, training_memory
from lit_model.registry import get_config
from pretrain.build import set_up
from pretrain.fabric_train import parse
from pretrain.logs.throughput import PEAK_FLOPS
from pretrain.loop import train_step

EOS_ID = 0
BASE = "llammlein"
OURS = {BASE: "--data.document_mask false", "llammlein-documents": "--data.document_mask true"}


def ours(flags: str, plan: dict[str, Any], rows: int, tokens_a_row: int) -> Any:
    """The trainer's own step: its loader, its loss per span, its clipping and optimizer; only the record is off."""
    left_out = ("name", "family", "block_size", "padded_vocab_size")
    model = {k: v for k, v in plan["config"].items() if k not in left_out and v is not None}
    run = set_up(
        parse(
            [
                f"--out_dir={tempfile.mkdtemp(dir=plan['folder'])}/run",
                f"--data.train={plan['folder']}/data",
                "--data.datapoints=false",
                *(f"--model.{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in model.items()),
                f"--train.block_size={tokens_a_row}",
                f"--train.global_batch_samples={rows}",
                f"--train.micro_batch_samples={rows}",
                "--train.max_steps=1000000",
                "--guard.hang_timeout_s=0",  # the others' rounds take their time too
                f"--precision={plan['precision']}",
                f"--compile={'true' if plan['compile'] else 'false'}",
                "--devices=1",
                *shlex.split(flags),
            ]
        )
    )
    steps = run.loader.steps(0, 1_000_000)

    def step() -> Any:
        result = train_step(run, next(steps))
        return result.loss_sum / result.n_targets

    return step


# --- the call that compares -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Entry:
    """A contender at one shape, and its results."""

    name: str
    flags: str | None
    """Of our trainer; None for a peer."""
    rows: int
    tokens_a_row: int
    seconds: list[float] = dataclasses.field(default_factory=list)
    """Of a step, in each round."""
    cpu_seconds: list[float] = dataclasses.field(default_factory=list)
    """The same, of CPU time over all threads."""
    first_step_s: float = 0.0
    last: dict[str, Any] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    failure: str | None = None

    @property
    def tokens(self) -> int:
        return self.rows * self.tokens_a_row

    def memory(self, config: ModelConfig, args: argparse.Namespace) -> float:
        """Estimated bytes on the device: the trainer's own estimate; a peer also holds all logits, several times."""
        compute_bytes = 4 if args.precision == "fp32" else 2
        on_cpu = not torch.cuda.is_available()
        setting = TrainingSetting(
            self.rows, self.tokens_a_row, compute_bytes=compute_bytes, compiled=args.compile, on_cpu=on_cpu
        )
        logits = 0 if self.flags is not None else 14 * self.tokens * config.padded_vocab_size
        return 1.05 * training_memory(config, setting).total + logits + 2**30


class Worker:
    """The process of an entry."""

    def __init__(self, entry: Entry, folder: Path, python: str, threads: int) -> None:
        self.entry = entry
        self.log = Path(tempfile.mkstemp(dir=folder, suffix=".log")[1])
        shape = [str(entry.rows), str(entry.tokens_a_row)]
        plan = str(folder / "plan.json")
        if entry.flags is None:
            command = [python, str(ROOT / "benchmarks" / "peer_step.py"), entry.name, plan, *shape]
        else:
            command = [python, str(ROOT / "benchmarks" / "train_step.py"), f"--worker={entry.flags}", plan, *shape]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | ({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            )

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()

    def read(self) -> dict[str, Any] | None:
        """The next answer; None, with the entry's `failure`, if the worker has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                self.entry.failure = answer.get("failed")
                return None if self.entry.failure else answer
        self.entry.failure = last_line(self.log, self.entry)
        return None

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=120)


def last_line(log: Path, entry: Entry) -> str:
    """Why a peer ended. Ours has to run: raises SystemExit with the whole of its log."""
    text = log.read_text().strip()
    if entry.flags is not None:
        sys.exit(f"{text}\nerror: {entry.name} ended before its last round; its log is above")
    return (text.splitlines() or ["ended without a message"])[-1]


@contextlib.contextmanager
def turn() -> Iterator[None]:
    """Alone among all calls of this benchmark on this machine."""
    with open(Path(tempfile.gettempdir()) / "llammlein-train-step.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def fit_together(entries: list[Entry], config: ModelConfig, args: argparse.Namespace) -> list[list[Entry]]:
    """The entries in groups whose estimated memory fits the device."""
    if torch.cuda.is_available():
        budget = 0.9 * torch.cuda.get_device_properties(0).total_memory
    else:
        budget = 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    groups: list[list[Entry]] = [[]]
    used = 0.0
    for entry in entries:
        size = entry.memory(config, args)
        if groups[-1] and used + size > budget:
            groups.append([])
            used = 0.0
        groups[-1].append(entry)
        used += size
    return groups


def measure(entries: list[Entry], folder: Path, pythons: dict[str, str], args: argparse.Namespace) -> list[float]:
    """Time a group that fits the device, in turns. Returns the matrix-multiply rates, one a round."""
    workers = []
    for entry in entries:
        say(f"building {label(entry)}")
        workers.append(Worker(entry, folder, pythons.get(entry.name, sys.executable), args.threads))
        if not torch.cuda.is_available():  # compilers of several contenders would share the cores that are measured
            begin(workers[-1:])
    if torch.cuda.is_available():
        begin(workers)
    rates = []
    workers = [w for w in workers if w.entry.failure is None]
    for steps in [args.warmup_steps, *[args.steps] * args.rounds]:
        if workers:
            with turn():
                workers[0].send("matmul")
                rates.append((workers[0].read() or {}).get("flops_per_s", 0.0))
        for worker in [w for w in workers if w.entry.failure is None]:
            with turn():
                worker.send(str(steps))
                answer = worker.read()
            if answer is not None:
                worker.entry.last = answer
                worker.entry.seconds.append(answer["seconds"] / steps)
                worker.entry.cpu_seconds.append(answer["cpu_seconds"] / steps)
    for worker in workers:
        worker.end()
        del worker.entry.seconds[:1], worker.entry.cpu_seconds[:1]  # the first was to warm up
    return rates


def begin(workers: list[Worker]) -> None:
    """Wait until all are built, and run their first step."""
    for worker in workers:
        ready = worker.read()
        if ready is not None:
            worker.entry.versions = ready["versions"]
            worker.send("1")
    for worker in workers:
        answer = worker.read() if worker.entry.failure is None else None
        if answer is not None:
            worker.entry.first_step_s = answer["seconds"]
        elif worker.entry.failure:
            worker.end()
            say(f"{label(worker.entry)}: {worker.entry.failure}")


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


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def label(entry: Entry) -> str:
    return f"{entry.name}, {entry.rows} x {entry.tokens_a_row}"


# --- the table --------------------------------------------------------------------------------------------------------


def table_row(entry: Entry, base: Entry | None, config: ModelConfig, peak: float | None, rate: float) -> dict[str, Any]:
    T = entry.tokens_a_row
    row: dict[str, Any] = {"name": entry.name, "rows": entry.rows, "tokens_a_row": T, "flags": entry.flags}
    if entry.failure is not None or not entry.seconds:
        return row | {"failed": entry.failure}
    tokens_per_s = entry.tokens / statistics.median(entry.seconds)
    full, causal = (tokens_per_s * flops_per_token(config, T, causal=c) for c in (False, True))
    ratios = [] if base is None else [b / s for b, s in zip(base.seconds, entry.seconds, strict=False)]
    return row | {
        "tokens_per_s": tokens_per_s,
        "mfu": full / peak if peak else None,
        "mfu_causal": causal / peak if peak else None,
        "matmul_share": full / rate if rate else None,
        "matmul_share_causal": causal / rate if rate else None,
        "memory_gib": entry.last["memory_gib"],
        "first_step_s": entry.first_step_s,
        "rate_to_ours": statistics.median(ratios) if ratios else None,
        "rate_to_ours_range": [min(ratios), max(ratios)] if ratios else None,
        "loss": entry.last["loss"],
        "cpu_s": statistics.median(entry.cpu_seconds),
        "round_s": entry.seconds,
        "versions": entry.versions,
    }


COLUMNS = (
    "",
    "batch",
    "tokens/s",
    "MFU",
    "causal",
    "of matmul",
    "causal",
    "memory",
    "first step",
    "CPU time",
    "/ ours (range)",
)


def cells(row: dict[str, Any]) -> list[str]:
    shape = [row["name"], f"{row['rows']} x {row['tokens_a_row']}"]
    if "failed" in row:
        return [*shape, str(row["failed"]), *[""] * (len(COLUMNS) - 3)]
    shares = (row[key] for key in ("mfu", "mfu_causal", "matmul_share", "matmul_share_causal"))
    low, high = row["rate_to_ours_range"] or (0, 0)
    return [
        *shape,
        f"{row['tokens_per_s']:,.0f}",
        *("-" if share is None else f"{share:.1%}" for share in shares),
        f"{row['memory_gib']:.2f} GiB",
        f"{row['first_step_s']:.1f} s",
        f"{row['cpu_s']:.2f} s",
        f"{row['rate_to_ours']:.3f} ({low:.3f} .. {high:.3f})" if row["rate_to_ours"] else "-",
    ]


def best_batches(rows: list[dict[str, Any]]) -> list[str]:
    """One line for each contender measured at several batches: its best."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "tokens_per_s" in row:
            kept = best.setdefault(row["name"], row)
            best[row["name"]] = max(kept, row, key=lambda r: r["tokens_per_s"])
    ours = best.get(BASE)
    lines = []
    for name, row in best.items():
        ratio = f", {row['tokens_per_s'] / ours['tokens_per_s']:.3f} of {BASE}'s best" if ours else ""
        lines.append(
            f"best of {name}: {row['rows']} x {row['tokens_a_row']}, {row['tokens_per_s']:,.0f} tokens/s{ratio}"
        )
    return lines if len({(row["rows"], row["tokens_a_row"]) for row in rows}) > 1 else []


def markdown(result: dict[str, Any], lines: list[str]) -> str:
    table = [list(COLUMNS), ["---"] * len(COLUMNS), *map(cells, result["rows"])]
    parts = [
        f"# {result['title']}",
        f"{result['date']}, `{result['command']}`",
        "\n".join(f"| {' | '.join(row)} |" for row in table),
        "\n".join(f"- {line}" for line in lines),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def shape_of(text: str) -> tuple[int, int | None]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is neither ROWS nor ROWSxTOKENS")
    return int(match[1]), int(match[2]) if match[2] else None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llama-10M", help="name in lit_model/registry.py")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=N", help="change a field of the model")
    parser.add_argument("--layers", type=int, help="blocks of the model, to cut a large one to what fits")
    parser.add_argument(
        "--batches", nargs="+", type=shape_of, default=[(8, None)], help="ROWS in a step, or ROWSxTOKENS; several"
    )
    parser.add_argument("--block_size", type=int, help="tokens in a row (default: the model's)")
    parser.add_argument("--document_tokens", type=int, default=400, help="mean length of a document")
    parser.add_argument(
        "--precision", default="fp32", choices=["fp32", "bf16", "fp8"], help="with fp8 the peers compute in bf16"
    )
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=5, help="steps a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup_steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="threads of a contender (default: torch's choice)")
    parser.add_argument("--only", nargs="*", default=[*OURS, *PEERS], choices=[*OURS, *PEERS])
    parser.add_argument("--ours", action="append", default=[], metavar="FLAGS", help="our trainer with more flags")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--json", type=Path, help="default: benchmarks/results/DATE-train-step-...; Markdown beside it")
    return parser.parse_args()


def model_of(args: argparse.Namespace) -> ModelConfig:
    changes = {key: json.loads(value) for key, value in (change.split("=", 1) for change in args.set)}
    if args.layers is not None:
        changes["n_layer"] = args.layers
    return get_config(args.model, **changes)


def main() -> int:
    args = parse_arguments()
    config = model_of(args)
    shapes = [(rows, T or args.block_size or config.block_size) for rows, T in args.batches]
    contenders = {name: OURS.get(name) for name in args.only}
    contenders |= {f"ours {flags}": f"{OURS['llammlein-documents']} {flags}" for flags in args.ours}
    entries = [Entry(name, flags, *shape) for shape in shapes for name, flags in contenders.items()]
    cuda = torch.cuda.is_available()
    device = torch.cuda.get_device_name() if cuda else f"CPU, {args.threads or len(os.sched_getaffinity(0))} threads"
    peak = next((p for n, p in PEAK_FLOPS.items() if cuda and n in device), None)
    rates = []
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        write_data(folder, config.vocab_size, max(200_000, *(40 * e.tokens for e in entries)), args.document_tokens)
        plan = {"folder": name, "config": config.to_dict(), "precision": args.precision, "compile": args.compile}
        (folder / "plan.json").write_text(json.dumps(plan))
        pythons = dict(p.split("=", 1) for p in args.peer)
        for group in fit_together(entries, config, args):
            rates += measure(group, folder, pythons, args)
            for entry in group if len(group) > 1 else []:
                if entry.failure == "out of memory":
                    entry.failure = None
                    entry.seconds.clear()
                    entry.cpu_seconds.clear()
                    rates += measure([entry], folder, pythons, args)

    rate = statistics.median(rates) if rates else 0.0
    bases = {(e.rows, e.tokens_a_row): e for e in entries if e.name == BASE and e.failure is None}
    rows = [table_row(e, bases.get((e.rows, e.tokens_a_row)), config, peak, rate) for e in entries]
    flops = {T: [flops_per_token(config, T), flops_per_token(config, T, causal=True)] for _, T in shapes}
    size = "8192^3, bf16" if cuda else "2048^3, fp32"
    title = (
        f"{args.model} with {config.n_layer} layers ({count_parameters(config):,} parameters), {args.precision}, "
        f"compile {args.compile}, {device}"
    )
    lines = [
        f"{args.rounds} rounds of {args.steps} steps; documents of about {args.document_tokens} tokens",
        *(f"training FLOPs per token in rows of {T}: {f:.4g}, causal {c:.4g}" for T, (f, c) in flops.items()),
        f"matrix multiply ({size}): {rate / 1e12:.3f} TFLOP/s",
        *best_batches(rows),
    ]
    result = {
        "date": time.strftime("%Y-%m-%d"),
        "title": title,
        "device": device,
        "command": " ".join(["python", "benchmarks/train_step.py", *map(shlex.quote, sys.argv[1:])]),
        "matmul_flops_per_s": rates,
        "flops_per_token": flops,
        "rows": rows,
        "skipped": {row["name"]: row["failed"] for row in rows if "failed" in row},
    }
    print(title)
    table = [COLUMNS, *map(cells, rows)]
    widths = [max(len(row[i]) for row in table if i or row[0]) for i in range(len(COLUMNS))]
    for row in table:
        print("  ".join(cell.ljust(widths[i]) if i < 2 else cell.rjust(widths[i]) for i, cell in enumerate(row)))
    print("\n".join(lines))
    kind = re.sub(r"[^A-Za-z0-9]+", "-", device.split(",")[0] if not cuda else device)
    stem = f"{result['date']}-train-step-{args.model}-{args.precision}{'-compiled' if args.compile else ''}-{kind}"
    path: Path = args.json or ROOT / "benchmarks" / "results" / f"{stem}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(".md").write_text(markdown(result, lines))
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1].startswith("--worker="):
        flags, plan_file, *shape = sys.argv[1].partition("=")[2], *sys.argv[2:]
        serve(flags, lambda: ours(flags, json.loads(Path(plan_file).read_text()), *map(int, shape)))
        sys.exit(0)
    sys.exit(main())
