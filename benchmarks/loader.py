"""The loader compared with a plain gather and with other projects' loaders (peers), in the same call.

    python benchmarks/loader.py --corpus FILE.jsonl.zst --tokenizer DIR --json FILE --peer data=PYTHON

The corpus is prepared once; all read the same tokens, in rows of 2048, 8 rows per batch, each in a separate process
with one torch thread; the rounds alternate. `gather` copies rows from random positions of the memory map into a new
int64 tensor: inputs only, no documents; `gather-targets` also copies the targets into a second one. Ours delivers
inputs, targets, document boundaries and the record's spans, all shuffled. It is measured reading in the caller's
thread, in a background thread (which a training step hides), and with the record's hashes, which the record's thread
computes. Ratios are medians over the rounds.

Peers are imported in the Python given by --peer NAME=PYTHON: NAME is one of them, or anything for all; a missing one
is a skipped row. Also: milliseconds from an opened dataset to its first batch, and to a batch in the middle of a run,
for the corpus and for a dataset of 10^12 tokens (a sparse file), and the memory used by opening and reading.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np
import torch

from benchmarks.peer_loader import LOADERS, serve
from benchmarks.provenance import provenance
from lit_data.loading.loader import Loader, RankLayout
from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order, Segment
from lit_data.loading.rows import Packing, open_rows
from lit_data.packed.index import HEADER, MAGIC
from lit_data.packed.manifest import FORMAT_VERSION, Manifest, Shard
from lit_data.packed.reader import PackedDataset
from lit_data.prepare.run import prepare
from lit_data.prepare.settings import Execution, Settings
from lit_data.record.span_hash import hash_spans
from lit_files.publish import write_json

OURS = ("llammlein", "llammlein-thread", "llammlein-hashes", "llammlein-best_fit")
BATCH, BLOCK = 8, 2048
ENDLESS = 1 << 40


def loader_of(dataset: PackedDataset, packing: Packing = "concat", prefetch_steps: int = 0) -> Loader:
    rows = open_rows(dataset, packing, BLOCK)
    return Loader(
        [rows],
        Mixture.single(Order(rows.n_windows, 1)),
        RankLayout(BLOCK, BATCH),
        [Segment(0, 0, BATCH)],
        prefetch_steps=prefetch_steps,
    )


def ours(name: str, plan: dict[str, Any]) -> Iterator[Any]:
    """Batches of our loader."""
    dataset = PackedDataset(plan["packed"])
    packing: Packing = "best_fit" if name.endswith("best_fit") else "concat"
    loader = loader_of(dataset, packing, prefetch_steps=8 if name.endswith("thread") else 0)
    for step in loader.steps(0, ENDLESS):
        batch = step.micro_batches[0]
        if name.endswith("hashes"):
            hash_spans(batch.tokens.numpy().reshape(-1), batch.spans.length)
        yield batch


class Contender:
    """A worker process that reads batches on request."""

    def __init__(self, name: str, python: str, plan_file: Path, log: Path) -> None:
        self.name, self.log = name, log
        script = "loader.py" if name in OURS else "peer_loader.py"
        command = [python, str(ROOT / "benchmarks" / script), *(["--worker"] if name in OURS else []), name]
        self._errors = open(log, "w")  # noqa: SIM115 - closed by end
        self.process = subprocess.Popen(
            [*command, str(plan_file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        self.microseconds: list[float] = []
        self.failure = "" if self._answer() is not None else self._reason()

    def _answer(self) -> dict[str, Any] | None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                answer: dict[str, Any] = json.loads(line)
                return answer
        return None

    def _reason(self) -> str:
        self.process.wait()
        return (self.log.read_text().strip().splitlines() or ["it printed nothing"])[-1][:200]

    def round(self, seconds: float) -> None:
        """Read for about this many seconds."""
        assert self.process.stdin is not None
        n = 20 if not self.microseconds else max(20, int(seconds * 1e6 / self.microseconds[-1]))
        self.process.stdin.write(f"{n}\n")
        self.process.stdin.flush()
        answer = self._answer()
        if answer is None:
            self.failure = self._reason()
            return
        self.microseconds.append(answer["seconds"] / n * 1e6)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)
        self._errors.close()


def huge_dataset(folder: Path) -> Path:
    """10^12 tokens in 2^20 documents: a real index, sparse tokens. Opening it checks sizes, not checksums."""
    folder.mkdir()
    shards = []
    for number in range(16):
        name = f"data-{number:05d}"
        lengths = np.full(1 << 16, 10**12 // (1 << 20), dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        with open(folder / f"{name}.bin", "wb") as f:
            f.truncate(2 * int(ends[-1]))
        with open(folder / f"{name}.idx", "wb") as f:
            f.write(HEADER.pack(MAGIC, 1, 8, len(lengths), len(lengths) + 1))
            for array in (lengths, (ends - lengths) * 2, np.arange(len(lengths) + 1, dtype=np.int64)):
                f.write(array.tobytes())
        (folder / f"{name}.docs.parquet").write_bytes(b"")
        kinds = ("bin", "idx", "docs.parquet")
        sizes = {kind: (folder / f"{name}.{kind}").stat().st_size for kind in kinds}
        shards.append(Shard(name, len(lengths), int(ends[-1]), 0, sizes, dict.fromkeys(kinds, "")))
    tokens = sum(s.tokens for s in shards)
    facts = {"fingerprint": "made", "folder": None}
    manifest = Manifest(FORMAT_VERSION, facts, 32000, 2, "uint16", 1 << 20, tokens, 0, shards)
    write_json(folder / "manifest.json", asdict(manifest))
    return folder


def measure_start(folder: str) -> dict[str, float]:
    """Milliseconds to open, to the first batch and to an arbitrary batch; MB of memory used."""
    before = _resident()
    began = time.perf_counter()
    dataset = PackedDataset(folder)
    opened = time.perf_counter()
    step = next(loader_of(dataset).steps(0, ENDLESS))
    first = time.perf_counter()
    steps = np.random.default_rng(0).integers(0, 4 * dataset.n_tokens // (BATCH * BLOCK), 50).tolist()
    resumed = []
    for number in steps:
        start = time.perf_counter()
        next(loader_of(dataset).steps(number, ENDLESS))
        resumed.append(time.perf_counter() - start)
    assert step.micro_batches[0].tokens.shape == (BATCH, BLOCK)
    return {
        "tokens": dataset.n_tokens,
        "open_ms": (opened - began) * 1e3,
        "first_batch_ms": (first - opened) * 1e3,
        "resume_ms_median": statistics.median(resumed) * 1e3,
        "resume_ms_max": max(resumed) * 1e3,
        "resident_mb": (_resident() - before) / 1e6,
    }


def _resident() -> float:
    """Bytes of anonymous memory, excluding the shared page cache."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return float(line.split()[1]) * 1024
    return 0.0


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", required=True)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=PYTHON")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round (default 0.5)")
    args = parser.parse_args()
    pythons = dict(p.split("=", 1) for p in args.peer)
    default = next((python for name, python in pythons.items() if name not in LOADERS), sys.executable)
    with tempfile.TemporaryDirectory(prefix="llammlein-bench-") as name:
        folder = Path(name)
        prepare(Settings((args.corpus,), args.tokenizer), Execution(folder / "data"))
        dataset = PackedDataset(folder / "data" / "train")
        assert len(dataset.manifest.shards) == 1 and dataset.dtype == np.uint16, "a small corpus, a small vocabulary"
        prefix = dataset.path / dataset.manifest.shards[0].name
        plan = {
            "tokens": f"{prefix}.bin", "megatron": str(prefix), "packed": str(dataset.path), "block_size": BLOCK,
            "batch": BATCH, "vocab_size": dataset.vocab_size, "eos_id": dataset.eos_id, "out": name, "seed": 0,
        }  # fmt: skip
        plan_file = folder / "plan.json"
        plan_file.write_text(json.dumps(plan))
        contenders = []
        for row in (*OURS, *LOADERS):
            own = sys.executable if row in OURS or row.startswith("gather") or row == "tinyllama" else None
            try:
                contenders.append(Contender(row, own or pythons.get(row, default), plan_file, folder / f"{row}.log"))
            except OSError as error:
                print(f"{row}: skipped: {error}")
        for _ in range(args.rounds + 2):  # the first two only find out how many batches make a round
            for contender in contenders:
                if not contender.failure:
                    contender.round(args.seconds)
        result = report(args, contenders)
        for contender in contenders:
            contender.end()
        result["start"] = {"corpus": measure_start(str(dataset.path))}
        result["start"]["10^12 tokens"] = measure_start(str(huge_dataset(folder / "huge")))
        print()
        for what, start in result["start"].items():
            print(f"{what}: " + ", ".join(f"{k} {v:,.2f}" for k, v in start.items()))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {args.json}")


def report(args: argparse.Namespace, contenders: list[Contender]) -> dict[str, Any]:
    mine = next(c for c in contenders if c.name == OURS[0]).microseconds[2:]
    print(f"{'':20} {'us a batch':>11} {'Mtok/s':>9} {'its time / ours':>16}")
    rows: dict[str, Any] = {}
    for contender in contenders:
        if contender.failure:
            print(f"{contender.name:20} skipped: {contender.failure}")
            rows[contender.name] = {"skipped": contender.failure}
            continue
        times = contender.microseconds[2:]
        ratio = statistics.median(t / m for t, m in zip(times, mine, strict=True))
        median = statistics.median(times)
        rows[contender.name] = {"microseconds": times, "ratio": ratio}
        print(f"{contender.name:20} {median:11.1f} {BATCH * BLOCK / median:9.0f} {ratio:16.2f}")
    return {
        **provenance(
            f"python benchmarks/loader.py --corpus {Path(args.corpus).name} --tokenizer "
            f"{Path(args.tokenizer).name} --rounds {args.rounds} --seconds {args.seconds}",
            "torch",
            "numpy",
        ),
        "rows": rows,
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        torch.set_num_threads(1)
        serve(ours(sys.argv[2], json.loads(Path(sys.argv[3]).read_text())))
    else:
        main()
