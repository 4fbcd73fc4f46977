"""Counts what a run has seen so far, by document and by source, within a time limit."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lit_data.packed.documents import Documents
from lit_data.record.parts import Part, committed_parts
from lit_data.record.schema import SCHEMA
from lit_data.record.trace import TracedRun
from lit_files.parquet import open_table, read_footer

MOST_DOCUMENTS = 20_000_000  # counted one by one: 160 MB; of more, every n-th
ROWS = 1 << 18  # of the record in memory at a time
MAX_TIMES = 8  # documents seen this often or more: one class


@dataclass
class SeenDataset:
    """What a run has seen of one dataset.

    Attributes:
        documents: in the dataset; those of them seen at least in part.
        tokens: in the dataset; inputs seen, repeats counted.
        by_source: source -> (documents seen, tokens seen), by tokens, largest first.
        times: class -> documents; class 0: never seen, 0.5: less than half once in tokens, then the tokens seen over
            the document's length, rounded, at most MAX_TIMES.
        sampled: of how many documents one was counted in `documents_seen`, `by_source` and `times`; these are
            multiplied by it.
    """

    path: Path
    documents: int
    tokens: int
    documents_seen: int = 0
    tokens_seen: int = 0
    by_source: dict[str, tuple[int, int]] = field(default_factory=dict)
    times: dict[float, int] = field(default_factory=dict)
    sampled: int = 1


@dataclass
class Seen:
    """What a run has seen.

    Attributes:
        steps: steps of the record that were counted, from the first; fewer than `of` if the time was up.
        of: steps in the record.
        complete: whether there was time for every dataset's documents; else their `by_source` and `times` are empty.
    """

    datasets: list[SeenDataset]
    steps: int
    of: int
    complete: bool = True


def count_seen(run: TracedRun, deadline_s: float = float("inf"), most_documents: int = MOST_DOCUMENTS) -> Seen:
    """Count the record's committed rows; reads three of its columns.

    Args:
        deadline_s: on `time.monotonic`; what was counted by then is returned. The record gets 60 % of the time.
        most_documents: counted one by one; of a run with more, every n-th document is.
    """
    while True:
        try:
            return _count_seen(run, deadline_s, most_documents)
        except FileNotFoundError:  # parts were merged in the meantime: the run continues
            if time.monotonic() > deadline_s or not run.folder.exists():
                raise


def _count_seen(run: TracedRun, deadline_s: float, most_documents: int) -> Seen:
    every = max(1, -(-sum(dataset.n_documents for dataset in run.datasets) // most_documents))
    tokens = [np.zeros(-(-dataset.n_documents // every), dtype=np.int64) for dataset in run.datasets]
    seen = [SeenDataset(d.path, d.n_documents, d.n_tokens, sampled=every) for d in run.datasets]
    steps, now = 0, time.monotonic()
    for batch, end in _columns(committed_parts(run.folder), now + 0.6 * (deadline_s - now)):
        steps = end
        dataset, document, length = (batch[name].to_numpy() for name in ("dataset", "document", "length"))
        for number, facts in enumerate(seen):
            mine = dataset == number if len(seen) > 1 else slice(None)
            facts.tokens_seen += int(length[mine].sum())
            numbers, lengths = document[mine], length[mine]
            if every > 1:
                counted = numbers % every == 0
                numbers, lengths = numbers[counted] // every, lengths[counted]
            if len(numbers):
                np.add.at(tokens[number], numbers, lengths)
    complete = True
    for facts, mine, dataset in zip(seen, tokens, run.datasets, strict=True):
        facts.documents_seen = int(np.count_nonzero(mine)) * every
        complete &= _count_documents(facts, mine, Documents(dataset), deadline_s)
    return Seen(seen, min(steps, run.steps), run.steps, complete)


def _columns(parts: Sequence[Part], deadline_s: float) -> Iterator[tuple[pa.RecordBatch, int]]:
    """Rows of the record in the order of its parts, with the steps that are counted whole after them."""
    columns = ["step", "dataset", "document", "length"]
    end = 0
    for part in parts:
        with open_table(part.path, read_footer(part.path, SCHEMA)) as file:
            for batch in file.iter_batches(ROWS, columns=columns, use_threads=False):
                step = batch["step"].to_numpy()
                inside = (step >= part.first_step) & (step < part.end_step)
                if inside.any():
                    end = max(end, int(step[inside].max()) + 1)
                    yield batch if inside.all() else batch.filter(pa.array(inside)), end
                if time.monotonic() > deadline_s:
                    return


def _count_documents(
    facts: SeenDataset, tokens: npt.NDArray[np.int64], documents: Documents, deadline_s: float
) -> bool:
    """Fill `by_source` and `times` from the tokens seen of each (sampled) document. False, leaving both empty, if the
    time was up before."""
    sources: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    times = np.zeros(MAX_TIMES + 1, dtype=np.int64)
    partly = 0
    for table in documents.batches():
        number, length = table["document"].to_numpy(), table["tokens"].to_numpy()
        source = table["source"].combine_chunks().dictionary_encode()
        codes = source.indices.to_numpy(zero_copy_only=False)
        if facts.sampled > 1:
            counted = number % facts.sampled == 0
            number, length, codes = number[counted] // facts.sampled, length[counted], codes[counted]
        mine = tokens[number]
        share = np.where(length > 0, mine / np.maximum(length, 1), 0)
        rounded = np.minimum(np.rint(share), MAX_TIMES).astype(np.int64)
        below = (mine > 0) & (share < 0.5)
        partly += int(below.sum())
        times += np.bincount(rounded[~below & ((rounded > 0) | (mine == 0))], minlength=MAX_TIMES + 1)
        names = source.dictionary.to_pylist()
        for code, (n, t) in enumerate(
            zip(
                np.bincount(codes, weights=mine > 0, minlength=len(names)).tolist(),
                np.bincount(codes, weights=mine, minlength=len(names)).tolist(),
                strict=True,
            )
        ):
            entry = sources[str(names[code])]
            entry[0] += round(n)
            entry[1] += round(t)
        if time.monotonic() > deadline_s:
            return False
    every = facts.sampled
    by_tokens = sorted(sources.items(), key=lambda item: (-item[1][1], item[0]))
    facts.by_source = {name: (n * every, t * every) for name, (n, t) in by_tokens}
    facts.times = {float(n): int(count) * every for n, count in enumerate(times) if count}
    if partly:
        facts.times = dict(sorted((facts.times | {0.5: partly * every}).items()))
    return True
