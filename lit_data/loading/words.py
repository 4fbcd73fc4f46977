"""Words in the samples of a run, from the order alone: exact, in integers, whatever was counted before.

Words are those that preparation counted (`words` in docs.parquet). A part of a document has words in proportion to its
tokens: of a document of t tokens and w words, the first k tokens have floor(w * k / t), and tokens [a, b) the
difference. So the parts of a document, however it is cut, have its w words together, and an epoch those of the dataset.

Full epochs are a product. In an epoch begun, each row is looked up once: sums over blocks of rows are kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lit_data.loading.mixture import Mixture
from lit_data.loading.order import Order
from lit_data.loading.rows import Rows
from lit_data.packed.index import IntArray
from lit_data.packed.manifest import check_documents_table
from lit_data.packed.reader import PackedDataset
from lit_files.parquet import open_table

MAX_DOCUMENTS = 1 << 24  # of a dataset that is counted exactly; 8 bytes each while it is opened
MAX_WINDOWS = 1 << 22  # likewise; 4 bytes each for the whole run
BLOCK = 1 << 12  # rows whose sum is kept
ROWS_AT_ONCE = 1 << 18


def document_words(dataset: PackedDataset) -> IntArray:
    """Words of each document, int64 (documents,). Raises ValueError if they are not counted or a table is damaged."""
    n_words, columns = dataset.n_words, []
    for shard in dataset.manifest.shards:
        path = dataset.path / f"{shard.name}.docs.parquet"
        with open_table(path) as file:
            check_documents_table(file, shard)
            columns.append(file.read(columns=["words"])["words"].to_numpy().astype(np.int64))
        if columns[-1].sum() != shard.words:
            raise ValueError(f"{path} holds {columns[-1].sum()} words, the manifest says {shard.words}: prepare again")
    words = np.concatenate(columns)
    assert int(words.sum()) == n_words
    return words


def window_words(rows: Rows) -> npt.NDArray[np.int32]:
    """Words of each row of a dataset, int32 (n_windows,); they sum to the dataset's. Raises as `document_words`."""
    dataset = rows.dataset
    words = document_words(dataset)
    start = dataset.document_start(np.arange(dataset.n_documents + 1, dtype=np.int64))
    if rows.packing == "concat":
        # Words before each row's first token: those of whole documents, and of a part of the one it begins in.
        before = np.concatenate([[0], np.cumsum(words)])
        bounds = np.minimum(np.arange(rows.n_windows + 1, dtype=np.int64) * rows.block_size, dataset.n_tokens)
        document = np.minimum(np.searchsorted(start, bounds, side="right") - 1, dataset.n_documents - 1)
        inside, tokens = bounds - start[document], start[document + 1] - start[document]
        per_window: npt.NDArray[np.int32] = np.diff(before[document] + words[document] * inside // tokens).astype(
            np.int32
        )
        return per_window
    found = np.zeros(rows.n_windows, dtype=np.int32)
    for first in range(0, rows.n_windows, ROWS_AT_ONCE):
        windows = np.arange(first, min(first + ROWS_AT_ONCE, rows.n_windows), dtype=np.int64)
        p = rows.pieces(windows)
        w, t = words[p.document], start[p.document + 1] - start[p.document]
        np.add.at(found, first + p.row, (w * (p.start + p.length) // t - w * p.start // t).astype(np.int32))
    return found


class DatasetWords:
    """Words of the rows of a dataset in the order of training.

    Beyond MAX_DOCUMENTS or MAX_WINDOWS each row counts as the dataset's mean, and `exact` is False: so many rows differ
    from their mean by less than 0.1 percent.

    Raises ValueError if the words are not counted or a table of documents is damaged.
    """

    def __init__(self, rows: Rows, order: Order) -> None:
        self.order, self.n_words = order, rows.dataset.n_words
        self.exact = rows.dataset.n_documents <= MAX_DOCUMENTS and rows.n_windows <= MAX_WINDOWS
        self._words = window_words(rows) if self.exact else None
        self._sums: dict[int, list[int]] = {}  # by epoch: words of the first 0, BLOCK, 2 BLOCK, ... rows

    def first(self, n_rows: int) -> int:
        """Words in the first `n_rows` rows of the run from this dataset; repeats count."""
        if not self.exact:
            return n_rows * self.n_words // self.order.n_windows
        epoch, rest = divmod(n_rows, self.order.n_windows)
        return epoch * self.n_words + self._begun(epoch, rest)

    def _begun(self, epoch: int, rest: int) -> int:
        sums = self._sums.setdefault(epoch, [0])
        while len(sums) * BLOCK <= rest:
            first = (len(sums) - 1) * BLOCK
            whole = self._rows(epoch, first, min(first + ROWS_AT_ONCE, rest // BLOCK * BLOCK))
            sums += (sums[-1] + np.cumsum(whole.reshape(-1, BLOCK).sum(1, dtype=np.int64))).tolist()
        done = rest // BLOCK
        return sums[done] + int(self._rows(epoch, done * BLOCK, rest).sum(dtype=np.int64))

    def _rows(self, epoch: int, first: int, stop: int) -> npt.NDArray[np.int32]:
        assert self._words is not None
        _, windows = self.order.locate(epoch * self.order.n_windows + np.arange(first, stop, dtype=np.int64))
        words: npt.NDArray[np.int32] = self._words[windows]
        return words


def words_between(datasets: list[DatasetWords], mixture: Mixture, first: int, stop: int) -> int:
    """Words in samples [first, stop) of a run. `datasets`: those of the mixture, in its order."""
    counts = zip(datasets, mixture.counts(first).tolist(), mixture.counts(stop).tolist(), strict=True)
    return sum(dataset.first(b) - dataset.first(a) for dataset, a, b in counts)
