"""How documents fill rows: which pieces of which documents lie in a row, and which rows hold a document.

A row of a dataset is called its window, in every packing. In each packing every token is an input exactly once.

- `concat`: windows of stride `block_size` over the stream of all documents. Arithmetic, nothing is stored.
- `best_fit`: a document longer than a row is cut into full rows and a rest; rests and whole documents share rows, and
  none of them is cut (Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
- `pad`: one piece a row. A document longer than a row is cut into full rows and a rest.

The last two follow from the lengths of the documents; a plan (see plans.py) says what each row holds.

Dimensions: `W` windows asked for, `P` pieces.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from lit_data.loading.order import IntArray
from lit_data.loading.row_plans import RowPlan, build_plan, plan_folder
from lit_data.packed.reader import PackedDataset

Packing = Literal["concat", "best_fit", "pad"]


@dataclass(frozen=True)
class Pieces:
    """Pieces of documents in rows, in the order of the rows and in them. A row is filled from its first column on.

    Attributes (length P):
        place: index of the row among the windows asked for.
        document, start, length: tokens [start, start + length) of a document are inputs.
        position: of the first of them in the stream of the dataset.
        ends: whether the piece ends its document.
    """

    place: IntArray
    document: IntArray
    start: IntArray
    length: IntArray
    position: IntArray
    ends: npt.NDArray[np.bool_]


class Rows(Protocol):
    """The rows of a dataset in one packing."""

    dataset: PackedDataset
    packing: Packing
    block_size: int
    n_windows: int

    def pieces(self, windows: IntArray) -> Pieces:
        """The pieces of some windows, int64 (W,)."""
        ...

    def ranges(self, windows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        """The stretches of the stream that some windows need, in order: index of the window, first token, end."""
        ...

    def windows_of_document(self, document: int) -> IntArray:
        """The windows that hold a part of a document, ascending."""
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
        # Documents of each row: the run of numbers from the first to the last one it touches.
        first = self.dataset.document_of(begin)
        last = first.copy()
        beyond = np.flatnonzero(self.dataset.document_start(first + 1) < end)
        last[beyond] = self.dataset.document_of(end[beyond] - 1)
        counts = last - first + 1
        place = np.repeat(np.arange(len(windows), dtype=np.int64), counts)
        document = np.repeat(first, counts) + ramps(counts)
        doc_begin, doc_end = _bounds(self.dataset, document)
        position = np.maximum(doc_begin, begin[place])
        stop = np.minimum(doc_end, end[place])
        return Pieces(place, document, position - doc_begin, stop - position, position, doc_end == stop)

    def ranges(self, windows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        begin = windows * self.block_size
        end = np.minimum(begin + self.block_size + 1, self.dataset.n_tokens)  # and a target
        return np.arange(len(windows), dtype=np.int64), begin, end

    def windows_of_document(self, document: int) -> IntArray:
        start, stop = self.dataset.document_start(np.asarray([document, document + 1], dtype=np.int64)).tolist()
        return np.arange(start // self.block_size, (stop - 1) // self.block_size + 1, dtype=np.int64)


class PlannedRows:
    """Rows as a plan says."""

    def __init__(self, dataset: PackedDataset, packing: Packing, block_size: int, plan: RowPlan) -> None:
        self.dataset, self.packing, self.block_size, self.plan = dataset, packing, block_size, plan
        self.n_windows = plan.n_rows

    def pieces(self, windows: IntArray) -> Pieces:
        first, counts = self.plan.row_pieces(windows)
        place = np.repeat(np.arange(len(windows), dtype=np.int64), counts)
        document, start, length = self.plan.read(np.repeat(first, counts) + ramps(counts))
        doc_begin, doc_end = _bounds(self.dataset, document)
        position = doc_begin + start
        if (position + length > doc_end).any():
            raise ValueError(
                f"{self.plan.folder} is damaged: a piece reaches beyond its document; remove the folder, and it is "
                "built again"
            )
        return Pieces(place, document, start, length, position, position + length == doc_end)

    def ranges(self, windows: IntArray) -> tuple[IntArray, IntArray, IntArray]:
        p = self.pieces(windows)
        return p.place, p.position, p.position + p.length + ~p.ends

    def windows_of_document(self, document: int) -> IntArray:
        return self.plan.rows_of_document(document)


def open_rows(dataset: PackedDataset, packing: Packing, block_size: int, plan_dir: Path | None = None) -> Rows:
    """The rows of a dataset. Builds the plan where there is none yet; one process does that for all.

    Args:
        plan_dir: where plans lie; default: the folder `plans` of the dataset.

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


def _bounds(dataset: PackedDataset, documents: IntArray) -> tuple[IntArray, IntArray]:
    """Stream positions of the first tokens of documents, and of the tokens after their last."""
    both = dataset.document_start(np.concatenate([documents, documents + 1]))
    return both[: len(documents)], both[len(documents) :]
