"""Maps rows to the document pieces in them, and documents to their rows.

A row of a dataset is called a window, in every packing. Every token is an input exactly once.

- `concat`: windows of stride `block_size` over the stream of all documents. Pure arithmetic, nothing is stored.
- `best_fit`: a document longer than a row is split into full rows and a remainder; remainders and complete documents
  share rows without being split (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
- `pad`: one piece per row. A document longer than a row is split into full rows and a remainder.

The last two depend on document lengths; a plan (row_plans.py) stores the content of each row.

Dimensions: `W` requested windows, `P` pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from lit_data.loading.row_plans import RowPlan, build_plan, plan_folder
from lit_data.packed.index import IntArray
from lit_data.packed.reader import PackedDataset

Packing = Literal["concat", "best_fit", "pad"]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in rows, by row and column. A row is filled from its first column.

    Attributes (length P):
        row: index of the row among the requested windows.
        document, start, length: tokens [start, start + length) of a document are inputs.
        position: of the first of these in the dataset's stream.
        ends: whether the piece ends its document.
    """

    row: IntArray
    document: IntArray
    start: IntArray
    length: IntArray
    position: IntArray
    ends: npt.NDArray[np.bool_]


class RowPieces(Protocol):
    """The pieces of a dataset's rows, by window."""

    dataset: PackedDataset
    packing: Packing
    block_size: int

    def pieces(self, windows: IntArray) -> Pieces:
        """The pieces of some windows, int64 (W,)."""
        ...


class Rows(RowPieces, Protocol):
    """The rows of a dataset in one packing."""

    n_windows: int

    def ranges(self, windows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The ranges of the stream that some windows need, in order: index of the window, first token, end."""
        ...

    def windows_of_document(self, document: int) -> IntArray:
        """The windows with a part of a document, ascending."""
        ...


def count_windows(n_tokens: int, block_size: int) -> int:
    """Windows of stride `block_size` over a stream: each token is an input exactly once; the tail is padded."""
    return -(-n_tokens // block_size)


class ConcatRows:
    """Windows over the stream of all documents."""

    packing: Packing = "concat"

    def __init__(self, dataset: PackedDataset, block_size: int) -> None:
        self.dataset, self.block_size = dataset, block_size
        self.n_windows = count_windows(dataset.n_tokens, block_size)

    def pieces(self, windows: IntArray) -> Pieces:
        begin = windows * self.block_size
        end = np.minimum(begin + self.block_size, self.dataset.n_tokens)
        # Documents of each row: all numbers from the first to the last one in it.
        first = self.dataset.document_of(begin)
        last = first.copy()
        beyond = np.flatnonzero(self.dataset.document_start(first + 1) < end)
        last[beyond] = self.dataset.document_of(end[beyond] - 1)
        counts = last - first + 1
        row = np.repeat(np.arange(len(windows), dtype=np.int64), counts)
        document = np.repeat(first, counts) + ramps(counts)
        doc_begin, doc_end = document_bounds(self.dataset, document)
        position = np.maximum(doc_begin, begin[row])
        stop = np.minimum(doc_end, end[row])
        return Pieces(row, document, position - doc_begin, stop - position, position, doc_end == stop)

    def ranges(self, windows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        begin = windows * self.block_size
        end = np.minimum(begin + self.block_size + 1, self.dataset.n_tokens)  # plus a target
        return np.arange(len(windows), dtype=np.int64), begin, end

    def windows_of_document(self, document: int) -> IntArray:
        start, stop = self.dataset.document_start(np.asarray([document, document + 1], dtype=np.int64)).tolist()
        return np.arange(start // self.block_size, (stop - 1) // self.block_size + 1, dtype=np.int64)


class PlannedRows:
    """Rows given by a plan."""

    def __init__(self, dataset: PackedDataset, packing: Packing, block_size: int, plan: RowPlan) -> None:
        self.dataset, self.packing, self.block_size, self.plan = dataset, packing, block_size, plan
        self.n_windows = plan.n_rows

    def pieces(self, windows: IntArray) -> Pieces:
        first, counts = self.plan.row_pieces(windows)
        row = np.repeat(np.arange(len(windows), dtype=np.int64), counts)
        document, start, length = self.plan.read(np.repeat(first, counts) + ramps(counts))
        doc_begin, doc_end = document_bounds(self.dataset, document)
        position = doc_begin + start
        if (position + length > doc_end).any():
            raise ValueError(
                f"{self.plan.folder} is damaged: a piece reaches beyond its document; delete the folder to have it "
                "rebuilt"
            )
        return Pieces(row, document, start, length, position, position + length == doc_end)

    def ranges(self, windows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        p = self.pieces(windows)
        return p.row, p.position, p.position + p.length + ~p.ends

    def windows_of_document(self, document: int) -> IntArray:
        return self.plan.rows_of_document(document)


def open_rows(dataset: PackedDataset, packing: Packing, block_size: int, plan_dir: Path | None = None) -> Rows:
    """Open the rows of a dataset. Builds the plan if there is none; one process does this for all.

    Args:
        plan_dir: folder of plans; default: `plans` in the dataset.

    Raises:
        ValueError: the plan cannot be written there.
    """
    if packing == "concat":
        return ConcatRows(dataset, block_size)
    folder = plan_folder(dataset, packing, block_size, plan_dir)
    if not folder.exists():
        build_plan(dataset, packing, block_size, folder)
    return PlannedRows(dataset, packing, block_size, RowPlan(folder))


def ramps(counts: IntArray) -> IntArray:
    """[2, 3] -> [0, 1, 0, 1, 2]."""
    total = int(counts.sum())
    return np.arange(total, dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)


def document_bounds(dataset: PackedDataset, documents: IntArray) -> tuple[IntArray, IntArray]:
    """Stream positions of the first tokens of documents, and of the tokens after their last."""
    both = dataset.document_start(np.concatenate([documents, documents + 1]))
    return both[: len(documents)], both[len(documents) :]
