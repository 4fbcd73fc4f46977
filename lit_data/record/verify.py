"""Verifies a run's record: compares every span with the data order and the tokens in the shards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from lit_data.loading.order import first_sample_of_step
from lit_data.loading.row_plans import check_plan
from lit_data.loading.rows import PlannedRows
from lit_data.packed.documents import Documents
from lit_data.packed.index import IntArray
from lit_data.record.parts import committed_parts, group_by_steps
from lit_data.record.reader import steps_in, stream_record
from lit_data.record.schema import SCHEMA, sort_rows
from lit_data.record.trace import TracedRun
from lit_files.progress import track

MAX_FAULTS = 20  # faults of one kind in a report
TOKENS_AT_A_TIME = 1 << 20

Span = tuple[int, int, int]  # document, start, length


def verify(run: TracedRun) -> list[str]:
    """Compare a run's record with the order and the shards; returns a list of faults.

    Checks that the files are contiguous, with every rank's part; each step has each of its rows once, on the rank and
    micro-batch given by the rule; each row has the window given by the order, split into its documents without gap or
    overlap; target counts and token hashes match; and no window is seen twice in an epoch. A plan must have each token
    once. The code shares only the order's formula, the plan's file and the document index with the writer.

    Memory: some row groups of the record, and one bit per window of the current epochs.
    """
    if not committed_parts(run.folder):
        return [f"{run.folder} has checkpoints but no committed part of a record"]
    checks = _Checks(run)
    checks.parts()
    for rows in run.rows:
        if isinstance(rows, PlannedRows):
            for fault in check_plan(rows.plan, rows.dataset, rows.block_size):
                checks.faults.add("wrong plan", fault)
    expected = 0
    for table in track(stream_record(run.folder, 0, run.steps), "verifying", "steps", run.steps, size=steps_in):
        end = int(table["step"].to_numpy().max()) + 1
        checks.steps(table, expected, end)
        expected = max(expected, end)
    checks.steps(SCHEMA.empty_table(), expected, run.steps)
    return checks.faults.report()


class _Faults:
    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}
        self.counts: Counter[str] = Counter()

    def add(self, kind: str, text: str) -> None:
        self.counts[kind] += 1
        if self.counts[kind] <= MAX_FAULTS:
            self.found.setdefault(kind, []).append(text)

    def report(self) -> list[str]:
        out: list[str] = []
        for kind, texts in self.found.items():
            out.extend(f"{kind}: {t}" for t in texts)
            if self.counts[kind] > MAX_FAULTS:
                out.append(f"{kind}: and {self.counts[kind] - MAX_FAULTS} more")
        return out


class _Seen:
    """Tracks which windows of each (dataset, epoch) were seen: one bit per window. Past epochs are dropped."""

    def __init__(self) -> None:
        self._bits: dict[tuple[int, int], npt.NDArray[np.uint8]] = {}

    def again(self, dataset: int, epoch: int, n_windows: int, windows: IntArray) -> IntArray:
        """Mark windows of one epoch; returns those marked before or repeated here."""
        for key in [k for k in self._bits if k[0] == dataset and k[1] < epoch - 1]:
            del self._bits[key]
        bits = self._bits.setdefault((dataset, epoch), np.zeros(n_windows // 8 + 1, dtype=np.uint8))
        once, counts = np.unique(windows, return_counts=True)
        masks = (1 << (once % 8)).astype(np.uint8)
        before = (bits[once // 8] & masks) != 0
        np.bitwise_or.at(bits, once // 8, masks)
        again: IntArray = once[before | (counts > 1)]
        return again


class _Checks:
    def __init__(self, run: TracedRun) -> None:
        self.run, self.faults, self.seen = run, _Faults(), _Seen()
        self.documents = [Documents(dataset) for dataset in run.datasets]

    def parts(self) -> None:
        """Check that the files are contiguous up to the newest checkpoint, with every rank's part."""
        expected = 0
        for parts in group_by_steps(committed_parts(self.run.folder)):
            first, end = parts[0].first_step, parts[0].end_step
            if first != expected:
                self.faults.add("missing part", f"no part begins at step {expected}; the next begins at {first}")
            expected = end
            world_size, _ = self._layout(first)
            ranks = {p.rank for p in parts if p.rank is not None}
            if ranks and ranks != set(range(world_size)):
                found = f"of {world_size} ranks only {sorted(ranks)} have a part"
                self.faults.add("missing part", f"steps {first} to {end - 1}: {found}")
        if expected != self.run.steps:
            text = f"the parts end at step {expected}, the newest checkpoint is at {self.run.steps}"
            self.faults.add("missing part", text)

    def steps(self, table: pa.Table, first: int, end: int) -> None:
        """Compare rows of the record with the expected content of steps `first` to `end - 1`.

        Compares entire arrays; only differing rows are examined individually, to explain the fault.
        """
        table = sort_rows(table)
        c: dict[str, npt.NDArray[Any]] = {k: table[k].to_numpy() for k in SCHEMA.names}
        wanted = self._wanted(first, end)
        base = np.cumsum([0, *(len(w) for w in wanted)])
        samples = np.concatenate([*wanted, np.zeros(0, dtype=np.int64)])

        # One entry per recorded (step, row); `index` is its position among the expected ones.
        step, row = c["step"].astype(np.int64), c["row"].astype(np.int64)
        begins = np.flatnonzero(np.append(True, (step[1:] != step[:-1]) | (row[1:] != row[:-1]))[: len(step)])
        counts = np.diff(begins, append=len(step))
        nth = step[begins] - first
        known = nth >= 0
        nth = np.where(known, nth, 0)
        known &= (row[begins] >= 0) & (row[begins] < np.diff(base)[nth]) if len(nth) else known
        for at in begins[~known].tolist():
            n = len(wanted[step[at] - first]) if step[at] >= first else 0
            self.faults.add("unknown row", f"step {step[at]} row {row[at]}: the step has {n} rows")
        index = (base[nth] + row[begins])[known]
        begins, counts = begins[known], counts[known]
        missing = np.ones(len(samples), dtype=bool)
        missing[index] = False
        for i in np.flatnonzero(missing).tolist():
            s = int(np.searchsorted(base, i, side="right")) - 1
            self.faults.add("missing row", f"step {first + s} row {i - base[s]}")
        if len(index):
            self._rows(c, begins, counts, samples[index])

    def _rows(self, c: dict[str, npt.NDArray[Any]], begins: IntArray, counts: IntArray, samples: IntArray) -> None:
        """Compare rows, given by their first spans and span counts, with their expected samples."""
        spans = np.repeat(begins - np.cumsum(counts) + counts, counts) + np.arange(counts.sum())
        of_row = np.repeat(np.arange(len(begins)), counts)
        datasets, epochs, windows = self.run.mixture.locate(samples)
        where = [f"step {c['step'][b]} row {c['row'][b]}" for b in begins.tolist()]

        def differs(kind: str, column: str, expected: IntArray) -> None:
            wrong = c[column][spans] != expected[of_row]
            for i in np.unique(of_row[wrong]).tolist():
                found = sorted(set(c[column][spans][(of_row == i) & wrong].tolist()))
                self.faults.add(kind, f"{where[i]}: {column} {found} instead of {expected[i]}")

        layouts = {int(s): self._layout(int(s)) for s in np.unique(c["step"][begins])}
        world_size, micro = np.asarray([layouts[int(s)] for s in c["step"][begins]], dtype=np.int64).T
        group = c["row"][begins].astype(np.int64) // micro
        differs("wrong sample", "sample", samples)
        differs("wrong rank", "rank", group % world_size)
        differs("wrong rank", "micro_batch", group // world_size)
        differs("wrong dataset", "dataset", datasets)

        for number, dataset in enumerate(self.run.datasets):
            rows = np.flatnonzero(datasets == number)
            for epoch in np.unique(epochs[rows]).tolist():
                here = rows[epochs[rows] == epoch]
                twice = self.seen.again(number, epoch, self.run.rows[number].n_windows, windows[here])
                for i in here[np.isin(windows[here], twice)].tolist():
                    self.faults.add("seen twice", f"{where[i]}: window {windows[i]} of epoch {epoch} of {dataset.path}")
            if len(rows):
                mine = spans[np.isin(of_row, rows)]
                self._pieces(
                    number,
                    c,
                    mine,
                    np.searchsorted(rows, of_row[np.isin(of_row, rows)]),
                    windows[rows],
                    [where[i] for i in rows.tolist()],
                )

    def _pieces(
        self,
        number: int,
        c: dict[str, npt.NDArray[Any]],
        spans: IntArray,
        of_row: IntArray,
        windows: IntArray,
        where: list[str],
    ) -> None:
        """Check that the spans of rows of one dataset match the pieces of their windows and the tokens there."""
        keys = ("document", "start", "length")
        document, start, length = (c[k][spans].astype(np.int64) for k in keys)
        expected = self._expected(number, windows)
        mine = np.stack([of_row, document, start, length])
        if mine.shape == expected.shape and (mine == expected).all():
            same = np.ones(len(windows), dtype=bool)
        else:
            same = self._explain(mine, expected, where, self.run.datasets[number].n_documents)
        sound = same[of_row]
        spans, of_row, document, start, length = (a[sound] for a in (spans, of_row, document, start, length))
        dataset = self.run.datasets[number]
        begin = dataset.document_start(document) + start
        targets = length - self._silent(number, of_row, document, begin + length)
        names = [f"document {d} tokens {s}..{s + n}" for d, s, n in zip(document, start, length, strict=True)]
        for i in np.flatnonzero(c["targets"][spans] != targets).tolist():
            self.faults.add(
                "wrong targets", f"{where[of_row[i]]}: {names[i]}: {c['targets'][spans[i]]} instead of {targets[i]}"
            )
        for i in self._wrong_hashes(self.documents[number], begin, length, c["hash"][spans]):
            fault = "the model received other tokens than the shard holds"
            self.faults.add("wrong tokens", f"{where[of_row[i]]}: {names[i]}: {fault}")

    def _silent(self, number: int, of_row: IntArray, document: IntArray, end: IntArray) -> npt.NDArray[np.bool_]:
        """Find the spans, of complete rows, without a target at their last token."""
        dataset = self.run.datasets[number]
        ends: npt.NDArray[np.bool_] = end == dataset.document_start(document + 1)
        if self.run.document_mask:
            return ends
        if isinstance(self.run.rows[number], PlannedRows):
            ends &= np.append(of_row[1:] != of_row[:-1], True)
        else:
            ends = end == dataset.n_tokens
        return ends

    def _explain(self, mine: IntArray, expected: IntArray, where: list[str], n_documents: int) -> npt.NDArray[np.bool_]:
        """Report how spans differ from expected pieces (int64 [4, P]: row and Span); returns which rows match."""
        recorded: list[list[Span]] = [[] for _ in where]
        due: list[list[Span]] = [[] for _ in where]
        for lists, array in ((recorded, mine), (due, expected)):
            for i, document, start, length in array.T.tolist():
                lists[i].append((document, start, length))
        for i, (have, want) in enumerate(zip(recorded, due, strict=True)):
            if have == want:
                continue
            for (document, start, _), n in Counter(have).items():
                if n > 1:
                    self.faults.add("duplicate span", f"{where[i]}: document {document} from token {start}, {n} times")
            extra, lacking = sorted(set(have) - set(want)), sorted(set(want) - set(have))
            for document, start, length in extra:
                span = f"{where[i]}: document {document} tokens {start}..{start + length}"
                near = [s for s in lacking if s[0] == document]
                if not 0 <= document < n_documents:
                    self.faults.add("unknown document", span)
                elif near and near[0][1] == start:
                    self.faults.add("wrong length", f"{span} instead of {near[0][1]}..{near[0][1] + near[0][2]}")
                else:
                    self.faults.add("wrong place", f"{span}, which are elsewhere in its window")
            for document, start, length in lacking:
                self.faults.add("gap", f"{where[i]}: document {document} tokens {start}..{start + length} are missing")
        return np.asarray([have == want for have, want in zip(recorded, due, strict=True)], dtype=bool)

    def _wrong_hashes(
        self, documents: Documents, begin: IntArray, length: IntArray, hashes: npt.NDArray[Any]
    ) -> Iterator[int]:
        """Find spans whose hash does not match the shards' tokens; the first of each read is also hashed token by
        token.
        """
        cuts = np.searchsorted(
            np.cumsum(length) // TOKENS_AT_A_TIME, np.arange(1 + int(length.sum()) // TOKENS_AT_A_TIME)
        )
        for low, high in pairwise([*cuts.tolist(), len(length)]):
            pieces = [
                documents.tokens(b, b + n)
                for b, n in zip(begin[low:high].tolist(), length[low:high].tolist(), strict=True)
            ]
            if not pieces:
                continue
            again = hash_pieces(np.concatenate(pieces), length[low:high])
            assert naive_hash(pieces[0].tolist()) == int(again[0]), "two ways to hash tokens disagree"
            yield from (low + np.flatnonzero(again != hashes[low:high])).tolist()

    def _wanted(self, first: int, end: int) -> list[IntArray]:
        """The samples of steps `first` to `end - 1`, within the run."""
        wanted = []
        for step in range(first, end):
            begin, n_rows = first_sample_of_step(self.run.segments, step)
            stop = begin + n_rows if self.run.end_sample is None else min(begin + n_rows, self.run.end_sample)
            wanted.append(np.arange(begin, max(begin, stop), dtype=np.int64))
        return wanted

    def _layout(self, step: int) -> tuple[int, int]:
        """(world size, samples per micro-batch) at a step."""
        _, world_size, micro_batch_samples = max(layout for layout in self.run.layouts if layout[0] <= step)
        return world_size, micro_batch_samples

    def _expected(self, number: int, windows: IntArray) -> IntArray:
        """The expected pieces of windows, int64 [4, P]: row in `windows`, document, start, length; sorted."""
        dataset, size, rows = self.run.datasets[number], self.run.block_size, self.run.rows[number]
        if isinstance(rows, PlannedRows):
            return np.asarray(
                [(i, *piece) for i, w in enumerate(windows.tolist()) for piece in sorted(rows.plan.pieces_of_row(w))],
                dtype=np.int64,
            ).T
        begin = windows * size
        end = np.minimum(begin + size, dataset.n_tokens)
        first = dataset.document_of(begin)
        counts = dataset.document_of(end - 1) - first + 1
        row = np.repeat(np.arange(len(windows)), counts)
        document = np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)
        doc_begin, doc_end = dataset.document_start(document), dataset.document_start(document + 1)
        low, high = np.maximum(doc_begin, begin[row]), np.minimum(doc_end, end[row])
        return np.stack([row, document, low - doc_begin, high - low])


def hash_pieces(tokens: npt.NDArray[Any], lengths: IntArray) -> npt.NDArray[np.uint64]:
    """`naive_hash` of consecutive pieces of an array: differences of running sums modulo 2^64, which are exact."""
    ends = np.cumsum(lengths)
    x = np.arange(1, len(tokens) + 1, dtype=np.uint64) - np.repeat(ends - lengths, lengths).astype(np.uint64)
    x *= np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x = (x ^ (x >> np.uint64(31))) | np.uint64(1)
    sums = np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * x, dtype=np.uint64)
    return np.diff(sums[ends - 1], prepend=np.uint64(0))


def naive_hash(tokens: list[int]) -> int:
    """The hash of a span, token by token; see lit_data/record/span_hash.py for the formula."""
    total = 0
    for i, token in enumerate(tokens):
        key = (i + 1) * 0x9E3779B97F4A7C15 % 2**64
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) % 2**64
        total += (token + 1) * ((key ^ (key >> 31)) | 1)
    return total % 2**64
