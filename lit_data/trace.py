"""Questions to a run's datapoint record: what a step saw, who saw a document, and whether it is all true."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from lit_data.datapoints import SCHEMA, committed_parts, newest_checkpoint_step, rows_of
from lit_data.loader import count_windows
from lit_data.order import Order, Segment, first_sample_of_step, steps_of_sample
from lit_data.packed import PackedDataset

MAX_FAULTS = 20  # of a kind, in a report


@dataclass
class TracedRun:
    """A run folder opened for questions.

    `layouts` are (from_step, world_size, micro_batch_samples); `steps` are those of the newest checkpoint.
    """

    folder: Path
    dataset: PackedDataset
    order: Order
    segments: list[Segment]
    block_size: int
    document_mask: bool
    layouts: list[tuple[int, int, int]]
    steps: int
    end_sample: int | None


def open_run(folder: str | Path, data: str | Path | None = None) -> TracedRun:
    """Open a run folder. `data` is where the packed dataset lies now, if it was moved since.

    Raises FileNotFoundError or ValueError that say what is missing.
    """
    folder = Path(folder)
    config_file = folder / "config.yaml"
    if not config_file.is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.yaml")
    if not (folder / "datapoints").is_dir():
        raise FileNotFoundError(f"{folder} has no datapoint record (it ran with --data.datapoints false)")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    steps = newest_checkpoint_step(folder)
    if steps == 0:
        raise ValueError(f"{folder} has no checkpoint yet: nothing of its record is committed")
    facts_file = folder / "datapoints" / "order.json"
    if not facts_file.is_file():
        raise FileNotFoundError(f"{facts_file} is missing: the order of the data cannot be known without it")
    facts = json.loads(facts_file.read_text())
    dataset = PackedDataset(data or config["data"]["train"])
    if dataset.fingerprint != facts["fingerprint"]:
        raise ValueError(
            f"{dataset.path} is not the data that {folder} was trained on (fingerprint {dataset.fingerprint[:12]} "
            f"instead of {facts['fingerprint'][:12]}); give the right folder with --data"
        )
    block_size = int(facts["block_size"])
    return TracedRun(
        folder,
        dataset,
        Order(count_windows(dataset.n_tokens, block_size), int(facts["seed"])),
        [Segment(**s) for s in facts["segments"]],
        block_size,
        bool(facts["document_mask"]),
        [(int(a), int(b), int(c)) for a, b, c in facts["layouts"]],
        steps,
        facts["end_sample"],
    )


def write_order(folder: Path, facts: dict[str, Any], layout: tuple[int, int, int]) -> None:
    """Write what the order of a run follows from beside its record (RUN/datapoints/order.json). Atomic.

    Args:
        facts: fingerprint, seed, block_size, document_mask, end_sample and segments, as `open_run` reads them.
        layout: (from_step, world_size, micro_batch_samples) from now on; earlier ones are kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, temporary = folder / "order.json", folder / ".order.json.tmp"
    earlier = json.loads(path.read_text())["layouts"] if path.exists() else []
    layouts = [entry for entry in earlier if entry[0] < layout[0]] + [list(layout)]
    temporary.write_text(json.dumps({**facts, "layouts": layouts}, indent=1))
    temporary.replace(path)


def spans_of_step(run: TracedRun, step: int) -> pa.Table:
    """The record's rows of one step, in the order of the rows. Reads only the parts that hold the step."""
    if not 0 <= step < run.steps:
        raise ValueError(f"step {step} is not in the record, which holds steps 0 to {run.steps - 1}")
    return _read(run, {step})


def steps_of_document(run: TracedRun, document: int) -> list[tuple[int, int]]:
    """All (step, row) that saw a part of a document, by inverting the order: no scan of the record."""
    start, stop = run.dataset.document_start(np.asarray([document, document + 1], dtype=np.int64)).tolist()
    windows = np.arange(start // run.block_size, (stop - 1) // run.block_size + 1, dtype=np.int64)
    first, count = first_sample_of_step(run.segments, run.steps - 1)
    last_sample = first + count if run.end_sample is None else min(first + count, run.end_sample)
    found = []
    for epoch in range(-(-last_sample // run.order.n_windows)):
        for sample in run.order.sample(np.full_like(windows, epoch), windows).tolist():
            if sample < last_sample:
                found.extend(steps_of_sample(run.segments, sample, run.steps))
    return sorted(found)


def spans_of_document(run: TracedRun, document: int) -> pa.Table:
    """The record's rows of one document (its number in the dataset): every step that saw it, and its loss there."""
    if not 0 <= document < run.dataset.n_documents:
        raise ValueError(f"document {document} is not in {run.dataset.path}, which has {run.dataset.n_documents}")
    table = _read(run, {step for step, _ in steps_of_document(run, document)})
    return table.filter(pc.equal(table["document"], document))


def _read(run: TracedRun, steps: set[int]) -> pa.Table:
    tables = [SCHEMA.empty_table()]
    for part in committed_parts(run.folder):
        inside = [s for s in steps if part.first_step <= s < part.end_step]
        if inside:
            tables.append(pq.read_table(part.path, schema=SCHEMA, filters=[("step", "in", inside)]))
    keys = ["step", "row", "document", "start"]
    return pa.concat_tables(tables).sort_by([(k, "ascending") for k in keys])


def verify(run: TracedRun) -> list[str]:
    """Re-read every span naively from the shards and compare; a list of faults, empty if there is none.

    Checked: each step is covered by its rows, once, on the rank and micro-batch of the rule; each row holds the
    window that the order gives; its spans are the documents of that window without gap or overlap; the tokens' hashes;
    the numbers of targets; and that no window is seen twice in an epoch. The code shares only the order's formula and
    the shards' reader with what wrote the record.
    """
    faults = _Faults()
    if not committed_parts(run.folder):
        return [f"{run.folder} has checkpoints but no committed part of a record"]
    _check_parts(run, faults)
    seen_windows: set[tuple[int, int]] = set()
    for step, rows in _by_step(run):
        _check_step(run, step, rows, seen_windows, faults)
    return faults.report()


class _Faults:
    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, text: str) -> None:
        self.found.setdefault(kind, []).append(text)

    def report(self) -> list[str]:
        out: list[str] = []
        for kind, texts in self.found.items():
            out.extend(f"{kind}: {t}" for t in texts[:MAX_FAULTS])
            if len(texts) > MAX_FAULTS:
                out.append(f"{kind}: and {len(texts) - MAX_FAULTS} more")
        return out


def _check_parts(run: TracedRun, faults: _Faults) -> None:
    """Each rank's parts follow each other without gap; a checkpoint stands at their ends."""
    ends: dict[tuple[int, int], int] = {}
    for part in committed_parts(run.folder):
        ends[part.first_step, part.end_step] = ends.get((part.first_step, part.end_step), 0) + 1
    expected = 0
    for first, end in sorted(ends):
        if first != expected:
            faults.add("missing part", f"no part begins at step {expected}; the next begins at {first}")
        expected = end
    if expected != run.steps:
        faults.add("missing part", f"the parts end at step {expected}, the newest checkpoint is at {run.steps}")


def _by_step(run: TracedRun) -> Iterator[tuple[int, list[dict[str, Any]]]]:
    """The record step by step; holds one group of parts in memory at a time."""
    parts = committed_parts(run.folder)
    for first, end in sorted({(p.first_step, p.end_step) for p in parts}):
        tables = [pq.read_table(p.path, schema=SCHEMA) for p in parts if (p.first_step, p.end_step) == (first, end)]
        table = pa.concat_tables(tables).sort_by([(k, "ascending") for k in ("step", "row", "document", "start")])
        by_step: dict[int, list[dict[str, Any]]] = {step: [] for step in range(first, end)}
        for row in rows_of(table):
            by_step.setdefault(row["step"], []).append(row)
        yield from sorted(by_step.items())


def _check_step(
    run: TracedRun, step: int, spans: list[dict[str, Any]], seen: set[tuple[int, int]], faults: _Faults
) -> None:
    first_sample, n_rows = first_sample_of_step(run.segments, step)
    rows: dict[int, list[dict[str, Any]]] = {}
    for span in spans:
        rows.setdefault(span["row"], []).append(span)
    n_real = n_rows if run.end_sample is None else max(0, min(n_rows, run.end_sample - first_sample))
    for row in sorted(set(rows) - set(range(n_real))):
        faults.add("unknown row", f"step {step} row {row}: the step has {n_real} rows")
    _, world_size, micro_batch_samples = max(layout for layout in run.layouts if layout[0] <= step)
    for row in range(n_real):
        where = f"step {step} row {row}"
        if row not in rows:
            faults.add("missing row", where)
            continue
        sample = first_sample + row
        epochs, windows = run.order.place(np.asarray([sample], dtype=np.int64))
        epoch, window = int(epochs[0]), int(windows[0])
        mine = rows[row]
        if any(s["sample"] != sample for s in mine):
            faults.add("wrong sample", f"{where}: {sorted({s['sample'] for s in mine})} instead of {sample}")
        group = row // micro_batch_samples
        place = {(s["rank"], s["micro_batch"]) for s in mine}
        if place != {(group % world_size, group // world_size)}:
            expected = (group % world_size, group // world_size)
            faults.add("wrong rank", f"{where}: (rank, micro-batch) {sorted(place)} instead of {expected}")
        if (epoch, window) in seen:
            faults.add("seen twice", f"{where}: window {window} of epoch {epoch}")
        seen.add((epoch, window))
        _check_row(run, where, window, mine, faults)


def _check_row(run: TracedRun, where: str, window: int, spans: list[dict[str, Any]], faults: _Faults) -> None:
    """The spans of a row are exactly the documents of its window, with the tokens that lie there."""
    position = window * run.block_size
    end = min(position + run.block_size, run.dataset.n_tokens)
    keys = [(s["document"], s["start"]) for s in spans]
    for key in sorted({k for k in keys if keys.count(k) > 1}):
        faults.add("duplicate span", f"{where}: document {key[0]} from token {key[1]}, {keys.count(key)} times")
    for span in spans:
        number = span["document"]
        if not 0 <= number < run.dataset.n_documents:
            faults.add("unknown document", f"{where}: {number}")
            return
        begin, after = run.dataset.document_start(np.asarray([number, number + 1], dtype=np.int64)).tolist()
        what = f"{where}: document {number} tokens {span['start']}..{span['start'] + span['length']}"
        if begin + span["start"] != position or span["length"] < 1:
            faults.add("wrong place", f"{what} begins at {begin + span['start']} of the stream instead of {position}")
        position = begin + span["start"] + span["length"]
        if position > min(after, end):
            faults.add("wrong length", f"{what} reaches beyond its document or window")
            continue
        tokens = run.dataset.tokens(begin + span["start"], position)
        if naive_hash(tokens.tolist()) != span["hash"]:
            faults.add("wrong tokens", f"{what}: what went into the model is not what the shard holds")
        ends = position == after if run.document_mask else position == run.dataset.n_tokens
        if span["targets"] != span["length"] - int(ends):
            faults.add("wrong targets", f"{what}: {span['targets']} instead of {span['length'] - int(ends)}")
    if position != end:
        faults.add("gap", f"{where}: its spans end at {position} of the stream instead of {end}")


def naive_hash(tokens: list[int]) -> int:
    """The hash of a span, token by token; see `hash_spans` for the formula."""
    total = 0
    for place, token in enumerate(tokens):
        x = (token + place * 0x9E3779B97F4A7C15 + 1) % 2**64
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) % 2**64
        total += x ^ (x >> 31)
    return total % 2**64
