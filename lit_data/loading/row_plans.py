"""Row plans: the document pieces in each row, for packings that depend on document lengths.

A plan is a folder of flat arrays, memory-mapped when read, and plan.json. Documents are processed in groups of
GROUP_DOCUMENTS, so that building holds one group in memory and a group's rows and pieces are contiguous:

    rows.bin       int64 (rows + 1)    number of each row's first piece
    pieces.bin     PIECE (pieces)      document, first token in it, tokens; by row, in a row by document
    groups.bin     int64 (groups + 1)  number of each group's first row

The folder's name is a hash of everything that decides its content. It is published by one rename, after syncing.

Dimensions: `N` items (complete documents and remainders) of a group, `K` rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.packed.index import IntArray
from lit_data.packed.reader import PackedDataset
from lit_files.mapping import map_array
from lit_files.publish import build_folder, write_json
from lit_files.reading import read_dataclass, regular

VERSION = 1
GROUP_DOCUMENTS = 1 << 18
PIECE = np.dtype([("document", "<i8"), ("start", "<i4"), ("length", "<i4")])  # documents have fewer than 2^31 tokens


def plan_folder(dataset: PackedDataset, packing: str, block_size: int, plan_dir: Path | None) -> Path:
    """The folder of a dataset's plan, whether or not it exists."""
    facts = f"{VERSION}:{dataset.fingerprint}:{packing}:{block_size}:{GROUP_DOCUMENTS}"
    name = f"{packing}-{block_size}-{hashlib.sha256(facts.encode()).hexdigest()[:16]}"
    return (plan_dir if plan_dir is not None else dataset.path / "plans") / name


@dataclass(frozen=True)
class _Facts:
    """Schema of plan.json."""

    version: int
    dataset: str
    packing: str
    block_size: int
    documents: int
    group_documents: int
    rows: int
    pieces: int
    fill: float

    def __post_init__(self) -> None:
        if self.version != VERSION:
            raise ValueError(f"its version is {self.version}, this is {VERSION}")
        for name in ("block_size", "documents", "group_documents", "rows", "pieces"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


class RowPlan:
    """A plan opened for reading. Raises ValueError, here and while reading, if it is damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            facts = read_dataclass(_Facts, folder / "plan.json")
            self.n_rows, self.n_pieces, self.n_documents = facts.rows, facts.pieces, facts.documents
            self.fill = facts.fill
            self.group_documents, self.block_size = facts.group_documents, facts.block_size
            groups = -(-self.n_documents // self.group_documents)
            self._rows = _open(folder / "rows.bin", np.dtype("<i8"), self.n_rows + 1)
            self._pieces = _open(folder / "pieces.bin", PIECE, self.n_pieces)
            self._groups = _open(folder / "groups.bin", np.dtype("<i8"), groups + 1)
            for name, array, end in (("rows", self._rows, self.n_pieces), ("groups", self._groups, self.n_rows)):
                if array[0] != 0 or array[-1] != end:
                    raise ValueError(f"{name}.bin runs from {array[0]} to {array[-1]}; {name} run from 0 to {end}")
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} is damaged ({error}): delete it to have it rebuilt") from error

    def first_row(self, group: int) -> int:
        """The first row of a group of documents; one past the last group gives the number of rows."""
        return int(self._groups[group])

    def row_pieces(self, rows: IntArray) -> tuple[IntArray, IntArray]:
        """The first piece of each row, and its number of pieces."""
        first = self._rows[rows]
        count = self._rows[rows + 1] - first
        if len(rows) and (first.min() < 0 or count.min() < 1 or int((first + count).max()) > self.n_pieces):
            raise ValueError(f"{self.folder / 'rows.bin'} is damaged: delete the folder to have it rebuilt")
        return first, count

    def read(self, pieces: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """Read pieces by number: document, start, length; int64 each."""
        found = self._pieces[pieces]
        document, start, length = found["document"], found["start"].astype(np.int64), found["length"].astype(np.int64)
        if len(pieces):
            outside = document.min() < 0 or document.max() >= self.n_documents
            if outside or start.min() < 0 or length.min() < 1 or length.max() > self.block_size:
                raise ValueError(f"{self.folder / 'pieces.bin'} is damaged: delete the folder to have it rebuilt")
        return document, start, length

    def pieces_of_row(self, row: int) -> list[tuple[int, int, int]]:
        """(document, start, length) of the pieces of a row, in file order."""
        found: list[tuple[int, int, int]] = self._pieces[int(self._rows[row]) : int(self._rows[row + 1])].tolist()
        return found

    def rows_of_document(self, document: int) -> IntArray:
        """The rows with a part of a document, ascending. Reads the pieces of its group."""
        group = document // self.group_documents
        rows = self._rows[int(self._groups[group]) : int(self._groups[group + 1]) + 1]
        pieces = int(rows[0]) + np.flatnonzero(self._pieces["document"][int(rows[0]) : int(rows[-1])] == document)
        return int(self._groups[group]) + np.unique(np.searchsorted(rows, pieces, side="right") - 1)


def _open(path: Path, dtype: np.dtype[Any], count: int) -> npt.NDArray[Any]:
    size = regular(path).stat().st_size
    if size != count * dtype.itemsize:
        raise ValueError(f"{path.name} has {size} bytes instead of {count * dtype.itemsize}")
    return map_array(path, dtype, (count,))


def build_plan(dataset: PackedDataset, packing: str, block_size: int, folder: Path) -> None:
    """Build the plan of a dataset and publish it as `folder`, unless another process did so meanwhile.

    Raises ValueError if it cannot be written.
    """
    try:
        with build_folder(folder) as temporary:
            _write(dataset, packing, block_size, temporary)
    except OSError as error:
        if folder.exists():
            return
        raise ValueError(
            f"the plan of --data.packing {packing} cannot be written to {folder.parent} ({error}): give a folder by "
            "--data.plan_dir"
        ) from error


def _write(dataset: PackedDataset, packing: str, block_size: int, folder: Path) -> None:
    n_rows = n_pieces = 0
    groups = [0]
    with open(folder / "rows.bin", "wb") as rows_file, open(folder / "pieces.bin", "wb") as pieces_file:
        for first, lengths in _lengths(dataset):
            pieces, row = pack(lengths, block_size, share=packing == "best_fit")
            pieces["document"] += first
            counts = np.bincount(row)  # rows are numbered without gaps
            (n_pieces + np.cumsum(counts) - counts).astype("<i8").tofile(rows_file)
            pieces.tofile(pieces_file)
            n_rows, n_pieces = n_rows + len(counts), n_pieces + len(pieces)
            groups.append(n_rows)
        np.asarray([n_pieces], dtype="<i8").tofile(rows_file)
    np.asarray(groups, dtype="<i8").tofile(folder / "groups.bin")
    fill = dataset.n_tokens / (n_rows * block_size)
    facts = _Facts(
        VERSION, dataset.fingerprint, packing, block_size, dataset.n_documents, GROUP_DOCUMENTS, n_rows, n_pieces, fill
    )
    write_json(folder / "plan.json", asdict(facts))


def _lengths(dataset: PackedDataset) -> Iterator[tuple[int, IntArray]]:
    """Iterate over groups: (first document, document lengths)."""
    for first in range(0, dataset.n_documents, GROUP_DOCUMENTS):
        end = min(first + GROUP_DOCUMENTS, dataset.n_documents)
        yield first, np.diff(dataset.document_start(np.arange(first, end + 1, dtype=np.int64)))


def check_plan(plan: RowPlan, dataset: PackedDataset, block_size: int) -> list[str]:
    """Check that a plan has each token of a dataset once, in rows of at most `block_size`; returns a list of faults."""
    faults = []
    for group, (first, lengths) in enumerate(_lengths(dataset)):
        rows = np.arange(plan.first_row(group), plan.first_row(group + 1) + 1, dtype=np.int64)
        of_row, counts = plan.row_pieces(rows[:-1])
        document, start, length = plan.read(np.arange(of_row[0], of_row[-1] + counts[-1], dtype=np.int64))
        too_long = np.flatnonzero(np.add.reduceat(length, of_row - of_row[0]) > block_size)
        faults += [f"{plan.folder}: row {rows[r]} holds more than {block_size} tokens" for r in too_long.tolist()]
        order = np.lexsort((start, document))
        document, start, length = document[order], start[order], length[order]
        # Pieces must be contiguous from each document's first token to its last.
        begins = np.append(True, document[1:] != document[:-1])
        expected = np.where(begins, 0, np.append(0, (start + length)[:-1]))
        wrong = set(document[(start != expected) | (length < 1)].tolist())
        heads = np.flatnonzero(begins)
        tails = np.append(heads[1:], len(document)) - 1
        ends = np.zeros(len(lengths), dtype=np.int64)
        inside = (document[tails] >= first) & (document[tails] < first + len(lengths))
        wrong |= set(document[tails][~inside].tolist())
        ends[document[tails][inside] - first] = (start + length)[tails][inside]
        wrong |= set((first + np.flatnonzero(ends != lengths)).tolist())
        faults += [f"{plan.folder}: document {d} is not covered exactly once" for d in sorted(wrong)]
    return faults


def pack(lengths: IntArray, capacity: int, share: bool) -> tuple[npt.NDArray[Any], IntArray]:
    """Split the documents of a group into pieces and pack them into rows.

    Args:
        lengths: int64, tokens of each document, at least 1.
        capacity: tokens of a row.
        share: whether remainders and documents that fit in a row share rows; full rows never do.

    Returns:
        the pieces (PIECE), by row and in a row by document, and the row of each, int64 from 0 without a gap. Rows are
        in the order of their first documents.
    """
    counts = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths), dtype=np.int64), counts)
    nth = np.arange(len(document), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    pieces = np.empty(len(document), dtype=PIECE)
    pieces["document"] = document
    pieces["start"] = nth * capacity
    pieces["length"] = np.minimum(lengths[document] - nth * capacity, capacity)
    row = np.arange(len(pieces), dtype=np.int64)
    if not share:
        return pieces, row
    items = np.flatnonzero(pieces["length"] < capacity)
    bins = best_fit_decreasing(pieces["length"][items].astype(np.int64), capacity)
    # A shared row is ordered by its first piece: pieces are already in document order.
    first = np.full(int(bins.max(initial=-1)) + 1, len(pieces), dtype=np.int64)
    np.minimum.at(first, bins, items)
    row[items] = first[bins]
    order = np.argsort(row, kind="stable")
    return pieces[order], np.unique(row[order], return_inverse=True)[1]


def best_fit_decreasing(lengths: IntArray, capacity: int) -> IntArray:
    """Pack items into bins of a capacity: longest first, each into the bin with the least room left after it.

    Items of equal length are handled together, as are bins with equal room. A bin with the smallest sufficient room r
    for length l takes r // l such items, until less than l is left. This needs a few numpy calls per length and room,
    independent of the number of items.

    Args:
        lengths: int64 (N,), 1 <= length <= capacity.

    Returns:
        the bin of each item, int64 (N,), from 0.
    """
    bin_of = np.empty(len(lengths), dtype=np.int64)
    by_length = np.argsort(-lengths, kind="stable")
    values, counts = np.unique(-lengths, return_counts=True)
    room: dict[int, list[IntArray]] = {}  # bins by remaining room
    rooms = 0  # bit r is set if room[r] is not empty
    n_bins = at = 0
    for length, count in zip((-values).tolist(), counts.tolist(), strict=True):
        items, at = by_length[at : at + count], at + count
        while len(items):
            fitting = rooms >> length
            if fitting:
                r = length + (fitting & -fitting).bit_length() - 1
                stack = room[r]
                bins = stack.pop()
                if not stack:
                    rooms &= ~(1 << r)
            else:
                r = capacity
                new = -(-len(items) // (capacity // length))
                bins = np.arange(n_bins, n_bins + new, dtype=np.int64)
                n_bins += new
            each = r // length
            full, rest = divmod(len(items), each)
            used = min(full, len(bins))
            bin_of[items[: used * each]] = np.repeat(bins[:used], each)
            items = items[used * each :]
            left = [(r - each * length, bins[:used])]
            bins = bins[used:]
            if len(bins):  # fewer items left than fit in one bin: they share one
                if len(items):
                    bin_of[items] = bins[0]
                    left.append((r - rest * length, bins[:1]))
                    bins, items = bins[1:], items[:0]
                left.append((r, bins))
            for r, some in left:
                if len(some) and r:
                    room.setdefault(r, []).append(some)
                    rooms |= 1 << r
    return bin_of
