"""The index of a shard's tokens: Megatron's MMIDIDX version 1 (`.idx`), one document a sequence.

A header, then for each document its length in tokens (int32) and byte offset in the .bin (int64), then the document
boundaries (int64, documents + 1).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.packed.import_settings import MAX_DOCUMENT_TOKENS as MAX_DOCUMENT_TOKENS

IntArray = npt.NDArray[np.int64]

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, document boundaries
DTYPE_CODES = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
UINT16_LIMIT = 65500  # Megatron's limit: smaller vocabularies are stored as uint16


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    """The dtype Megatron uses for a vocabulary size."""
    return np.dtype(np.uint16 if vocab_size < UINT16_LIMIT else np.int32)


def write_index(path: Path, lengths: npt.NDArray[np.int32], dtype: np.dtype[Any]) -> None:
    """Write the .idx of documents with these lengths, int32 [n], contiguous in the .bin."""
    code = next(c for c, d in DTYPE_CODES.items() if np.dtype(d) == dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    with open(path, "wb") as f:
        f.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
        f.write(lengths.tobytes())
        f.write(((ends - lengths) * dtype.itemsize).tobytes())
        f.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
