"""A packed dataset as a sequence of documents, for notebooks and scripts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.packed.documents import Documents
from lit_data.packed.reader import PackedDataset
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer

AT_A_TIME = 256  # documents whose facts are read together


@dataclass(frozen=True)
class PackedDocument:
    """One document.

    Attributes:
        tokens: int64 (T,), with EOS at the end, and BOS in front if the dataset has it.
        id, source: as in the input.
        facts: all columns of the document's row, metadata included.
    """

    tokens: npt.NDArray[np.int64]
    id: str
    source: str
    facts: dict[str, Any]
    _tokenizer: Tokenizer | None = field(repr=False, default=None)

    @property
    def text(self) -> str:
        """The decoded tokens, without BOS and EOS. Raises ValueError if the dataset holds no tokenizer."""
        if self._tokenizer is None:
            raise ValueError("the dataset holds no tokenizer: its tokens cannot be decoded")
        ids = self.tokens.tolist()
        begin = 1 if self._tokenizer.bos_id is not None and ids[:1] == [self._tokenizer.bos_id] else 0
        return self._tokenizer.decode(ids[begin : len(ids) - (ids[-1:] == [self._tokenizer.eos_id])])


class PackedDocuments:
    """The documents of a packed dataset: `len`, indices (also negative) and iteration; memory stays bounded."""

    def __init__(self, dataset: PackedDataset) -> None:
        self.dataset = dataset
        self._documents = Documents(dataset)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The dataset's tokenizer; None if it holds none."""
        folder = self.dataset.tokenizer_folder
        return open_tokenizer(folder) if folder is not None else None

    def __len__(self) -> int:
        return self.dataset.n_documents

    def __getitem__(self, number: int) -> PackedDocument:
        """Raises IndexError beyond the last document."""
        n = len(self)
        if not -n <= number < n:
            raise IndexError(f"document {number} of a dataset of {n}")
        return self._read([number % n])[0]

    def __iter__(self) -> Iterator[PackedDocument]:
        for first in range(0, len(self), AT_A_TIME):
            yield from self._read(list(range(first, min(first + AT_A_TIME, len(self)))))

    def _read(self, numbers: list[int]) -> list[PackedDocument]:
        facts = self._documents.facts(numbers)
        found = []
        for number in numbers:
            start, stop = self.dataset.document_start(np.asarray([number, number + 1])).tolist()
            tokens = self.dataset.tokens(start, stop).astype(np.int64)
            row = facts[number]
            found.append(PackedDocument(tokens, str(row["id"]), str(row["source"]), row, self.tokenizer))
        return found


def open_dataset(path: str | Path) -> PackedDocuments:
    """Open a packed dataset: a folder with a manifest, such as DATA/train.

    Raises FileNotFoundError if there is none, ValueError if a file is missing, truncated or not that of the manifest.
    """
    return PackedDocuments(PackedDataset(path))
