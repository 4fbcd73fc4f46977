"""Queries on a datapoint record of 10^9 rows: time and memory of complete commands.

    python benchmarks/record.py --rows 1000000000 --dir DIR --json FILE

creates a run folder in DIR and queries it with scripts/trace_data.py. The record is consistent: its spans follow from
the real order over a packed dataset whose token file is sparse (all zeros). Hashes and losses are random, so they
compress as badly as real ones. Before each command the files are dropped from the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from benchmarks.provenance import provenance
from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order, Segment
from lit_data.loading.rows import ConcatRows
from lit_data.packed.index import HEADER, MAGIC, IntArray
from lit_data.packed.manifest import FORMAT_VERSION, MANIFEST, Manifest, Shard
from lit_data.packed.reader import PackedDataset
from lit_data.packed.writer import DOCUMENTS_PER_GROUP
from lit_data.record.merge import MAX_ROWS, MergedFile
from lit_data.record.order_file import describe_order, write_order
from lit_data.record.schema import SCHEMA, open_writer
from lit_files.run_files import DATAPOINTS

BLOCK_SIZE = 2048
GLOBAL_BATCH, WORLD_SIZE, MICRO_BATCH = 1024, 64, 4
EPOCHS = 4
PATTERN = 1 << 14  # documents after which the lengths repeat
MEAN_LENGTH = 1365  # tokens of a document: 2.5 spans a row
SPANS_PER_ROW = 1 + BLOCK_SIZE / MEAN_LENGTH
SHARD_TOKENS = 1 << 35
DOCUMENTS_PER_FILE = 50_000  # in the invented names of the source files
STEPS_AT_A_TIME = 128
UNMERGED_STEPS = 256  # the newest checkpoint's, in a part of each rank
ROW_BYTES, DOCUMENT_BYTES = 25, 26  # measured; for the estimate
TIMER = """
import os, resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


class Corpus:
    """Lengths and places of documents in closed form: PATTERN lengths, repeated."""

    def __init__(self, n_documents: int) -> None:
        lengths = np.random.default_rng(0).integers(64, 2 * MEAN_LENGTH - 63, size=PATTERN)
        self.cumulated = np.concatenate([[0], np.cumsum(lengths)])
        self.period = int(self.cumulated[-1])
        self.n_documents = -(-n_documents // PATTERN) * PATTERN
        self.n_tokens = self.n_documents // PATTERN * self.period

    def start(self, documents: IntArray) -> IntArray:
        turns, rest = np.divmod(documents, PATTERN)
        return np.asarray(turns * self.period + self.cumulated[rest], dtype=np.int64)

    def document_of(self, positions: IntArray) -> IntArray:
        turns, rest = np.divmod(positions, self.period)
        return turns * PATTERN + np.searchsorted(self.cumulated, rest, side="right") - 1


def make_dataset(folder: Path, corpus: Corpus) -> Manifest:
    """A packed dataset: sparse tokens, a real index and real docs.parquet."""
    folder.mkdir(parents=True)
    per_shard = max(1, SHARD_TOKENS // corpus.period) * PATTERN
    shards = []
    for number, first in enumerate(range(0, corpus.n_documents, per_shard)):
        documents = np.arange(first, min(first + per_shard, corpus.n_documents) + 1)
        starts = corpus.start(documents)
        starts -= starts[0]
        name = f"data-{number:05d}"
        with open(folder / f"{name}.bin", "wb") as f:
            f.truncate(2 * int(starts[-1]))
        n = len(documents) - 1
        with open(folder / f"{name}.idx", "wb") as f:
            f.write(HEADER.pack(MAGIC, 1, 8, n, n + 1))
            for array in (np.diff(starts).astype(np.int32), 2 * starts[:-1], np.arange(n + 1)):
                array.tofile(f)
        schema = pa.schema([("id", pa.string()), ("source", pa.string()), ("place", pa.int64()), ("bytes", pa.int64())])
        with pq.ParquetWriter(folder / f"{name}.docs.parquet", schema, compression="zstd") as writer:
            for at in range(first, first + n, 1 << 20):
                numbers = np.arange(at, min(at + (1 << 20), first + n))
                source = pc.binary_join_element_wise(
                    "crawl-", pa.array(numbers // DOCUMENTS_PER_FILE).cast(pa.string()), ""
                )
                place = pa.array(numbers % DOCUMENTS_PER_FILE)
                ids = pc.binary_join_element_wise(source, place.cast(pa.string()), ".jsonl:")
                size = pa.array(corpus.start(numbers + 1) - corpus.start(numbers)).cast(pa.int64())
                table = pa.Table.from_arrays([ids, source, place, size], schema=schema)
                writer.write_table(table, row_group_size=DOCUMENTS_PER_GROUP)
        kinds = ("bin", "idx", "docs.parquet")
        sizes = {kind: (folder / f"{name}.{kind}").stat().st_size for kind in kinds}
        tokens = int(starts[-1])
        shards.append(Shard(name, n, tokens, tokens, sizes, dict.fromkeys(kinds, f"none-{number}")))
    facts = {
        "kind": "none",
        "fingerprint": "synthetic",
        "vocab_size": 50000,
        "eos_id": 1,
        "bos_id": None,
        "folder": None,
    }
    manifest = Manifest(
        FORMAT_VERSION, facts, 50000, 1, "uint16", corpus.n_documents, corpus.n_tokens, corpus.n_tokens, shards
    )
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest)))
    return manifest


def spans_of_steps(corpus: Corpus, order: Order, first: int, end: int, rng: np.random.Generator) -> pa.Table:
    """The record of some steps, sorted."""
    samples = np.arange(first * GLOBAL_BATCH, end * GLOBAL_BATCH)
    _, windows = order.locate(samples)
    begin = windows * BLOCK_SIZE
    stop = np.minimum(begin + BLOCK_SIZE, corpus.n_tokens)
    low = corpus.document_of(begin)
    counts = corpus.document_of(stop - 1) - low + 1
    offsets = np.cumsum(counts) - counts
    document = np.arange(counts.sum()) - np.repeat(offsets - low, counts)
    document_start = corpus.start(document)
    document_end = corpus.start(document + 1)
    span_begin = np.maximum(document_start, np.repeat(begin, counts))
    span_end = np.minimum(document_end, np.repeat(stop, counts))
    length = (span_end - span_begin).astype(np.int32)
    steps, rows = np.divmod(samples, GLOBAL_BATCH)
    group = rows // MICRO_BATCH
    n = len(document)
    columns = {
        "step": np.repeat(steps, counts),
        "rank": np.repeat((group % WORLD_SIZE).astype(np.int32), counts),
        "micro_batch": np.repeat((group // WORLD_SIZE).astype(np.int32), counts),
        "row": np.repeat(rows, counts),
        "sample": np.repeat(samples, counts),
        "dataset": np.zeros(n, dtype=np.int32),
        "document": document,
        "start": span_begin - document_start,
        "length": length,
        "targets": length - (span_end == document_end),
        "hash": rng.integers(0, 2**64, size=n, dtype=np.uint64),
        "loss": (2 + rng.random(n)) * length,
        "applied": np.ones(n, dtype=bool),
    }
    return pa.table(columns, schema=SCHEMA)


def make_run(folder: Path, rows: int) -> dict[str, Any]:
    """A run folder with its data and record; returns what was made. The folder appears when it is whole."""
    began = time.perf_counter()
    work = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(work, ignore_errors=True)
    corpus = Corpus(int(rows / EPOCHS / SPANS_PER_ROW * BLOCK_SIZE / MEAN_LENGTH))
    make_dataset(work / "data", corpus)
    data_s = time.perf_counter() - began
    n_windows = -(-corpus.n_tokens // BLOCK_SIZE)
    order = Order(n_windows, 1)
    record = work / DATAPOINTS
    record.mkdir()
    steps = max(2 * UNMERGED_STEPS, int(rows / SPANS_PER_ROW / GLOBAL_BATCH))
    began = time.perf_counter()
    rng = np.random.default_rng(1)
    out, made = MergedFile(record, 0), 0
    merged_steps = steps - UNMERGED_STEPS
    for first in range(0, merged_steps, STEPS_AT_A_TIME):
        end = min(first + STEPS_AT_A_TIME, merged_steps)
        table = spans_of_steps(corpus, order, first, end, rng)
        if out.rows + table.num_rows > MAX_ROWS:
            out.publish(first)
            out = MergedFile(record, first)
        out.add(table)
        made += table.num_rows
    out.publish(merged_steps)
    table = spans_of_steps(corpus, order, merged_steps, steps, rng)
    for rank in range(WORLD_SIZE):
        part = record / f"part-{merged_steps:08d}-{steps:08d}-rank{rank:05d}.parquet"
        with open(part, "wb") as f, open_writer(f) as writer:
            writer.write_table(table.filter(pc.equal(table["rank"], rank)))
    made += table.num_rows
    rows_of = ConcatRows(PackedDataset(work / "data"), BLOCK_SIZE)
    segments = [Segment(0, 0, GLOBAL_BATCH)]
    facts = describe_order([rows_of], Mixture.single(order), segments)
    facts["datasets"][0]["path"] = str(folder / "data")
    write_order(record, facts, (0, WORLD_SIZE, MICRO_BATCH))
    for step in (merged_steps, steps):
        (work / f"iter-{step:08d}-ckpt.pth").touch()
    (work / "config.yaml").write_text(yaml.safe_dump({"data": {"train": str(folder / "data")}}))
    os.rename(work, folder)
    record_s = time.perf_counter() - began
    return {
        "rows": made,
        "steps": steps,
        "documents": corpus.n_documents,
        "tokens": corpus.n_tokens,
        "windows": n_windows,
        "data_s": data_s,
        "record_s": record_s,
        "rows_per_s": made / record_s,
        "record_bytes": sum(p.stat().st_size for p in (folder / DATAPOINTS).iterdir()),
        "files": sum(1 for _ in (folder / DATAPOINTS).iterdir()),
    }


def drop_from_cache(folder: Path) -> None:
    """Ask the system to forget the pages of all files, so that a command reads them from the disk."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def ask(folder: Path, *question: str) -> dict[str, Any]:
    """Run one command of scripts/trace_data.py; its seconds, peak memory in bytes and lines of output."""
    drop_from_cache(folder)
    command = [sys.executable, str(ROOT / "scripts" / "trace_data.py"), question[0], str(folder), *question[1:]]
    answer = folder.with_name("answer.txt")
    with open(answer, "wb") as out:
        began = time.perf_counter()
        # From a small process: what starts another counts its own memory in the other's peak.
        timed = subprocess.run(
            [sys.executable, "-S", "-c", TIMER, *command], stdout=out, stderr=subprocess.PIPE, text=True
        )
        seconds = time.perf_counter() - began
    if timed.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {timed.returncode}: {timed.stderr}")
    with open(answer, "rb") as lines:
        n_lines = sum(1 for _ in lines)
    answer.unlink()
    unit = 1 if sys.platform == "darwin" else 1024
    return {
        "question": " ".join(question),
        "seconds": seconds,
        "peak_bytes": int(timed.stderr.split()[-1]) * unit,
        "lines": n_lines,
    }


def questions(folder: Path, steps: int, documents: int) -> list[tuple[str, ...]]:
    middle = steps // 2
    number = documents // 3
    id = f"crawl-{number // DOCUMENTS_PER_FILE}.jsonl:{number % DOCUMENTS_PER_FILE}"
    return [
        ("step", "0"),
        ("step", str(middle)),
        ("step", str(steps - 1)),
        ("document", "#0"),
        ("document", id),
        ("document", f"#{documents - 1}"),
        ("diff", str(middle), str(middle + 20)),
        ("diff", str(steps - 20), str(steps)),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the record (default 10^7)")
    parser.add_argument(
        "--dir", type=Path, required=True, help="where the run folder is made, and kept for another call"
    )
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    folder: Path = args.dir / f"record-{args.rows}"
    facts: dict[str, Any] = {}
    if not folder.exists():
        args.dir.mkdir(parents=True, exist_ok=True)
        n_documents = args.rows / EPOCHS / SPANS_PER_ROW * BLOCK_SIZE / MEAN_LENGTH
        needed = int(args.rows * ROW_BYTES + n_documents * DOCUMENT_BYTES)
        free = shutil.disk_usage(args.dir).free
        print(f"needs about {needed / 1e9:.1f} GB in {args.dir}, {free / 1e9:.1f} GB are free", flush=True)
        if needed * 1.1 > free:
            print(f"error: --dir {args.dir} lacks the space; choose another or fewer --rows", file=sys.stderr)
            return 2
        facts = make_run(folder, args.rows)
        (folder / "facts.json").write_text(json.dumps(facts))
    facts = json.loads((folder / "facts.json").read_text())
    print(
        f"{facts['rows']} rows of {facts['steps']} steps, {facts['documents']} documents, {facts['tokens']} tokens; "
        f"record {facts['record_bytes'] / 1e9:.2f} GB in {facts['files']} files, "
        f"made at {facts['rows_per_s'] / 1e6:.2f} M rows/s",
        flush=True,
    )
    answers = []
    for question in questions(folder, facts["steps"], facts["documents"]):
        answers.append(ask(folder, *question))
        a = answers[-1]
        print(
            f"{a['question']:40s} {a['seconds']:6.2f} s  {a['peak_bytes'] / 1e6:6.0f} MB  {a['lines']} lines",
            flush=True,
        )
    if args.json is not None:
        about = {
            **provenance(
                f"python benchmarks/record.py --rows {args.rows} --dir DIR",
                "pyarrow",
                "duckdb",
                "numpy",
            ),
        }
        args.json.write_text(json.dumps({**about, "made": facts, "answers": answers}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
