"""Recognises token files by their first bytes, so that headers and archives are never packed as tokens."""

from __future__ import annotations

import re
import struct
from pathlib import Path
from typing import Any

import numpy as np

HEAD_BYTES = 64

# llm.c and modded-nanogpt: 256 int32, the first three a magic number, the version, and the number of tokens.
LLMC_HEADER_BYTES = 1024
LLMC_TOKENS: dict[int, np.dtype[Any]] = {20240520: np.dtype("<u2"), 20240801: np.dtype("<u4")}  # GPT-2's ids; Llama 3's
LLMC_OTHERS = {
    20240326: "a model of llm.c",
    20240327: "the state of an optimizer of llm.c",
    20240328: "a tokenizer of llm.c",
    20240522: "multiple-choice questions of llm.c",
    20240527: "the state of a run of llm.c",
}

_KINDS = (
    (rb"\x1f\x8b\x08", "a gzip file: decompress it"),
    (rb"\x28\xb5\x2f\xfd", "a zstd file: decompress it"),
    (rb"BZh[1-9]1AY&SY", "a bzip2 file: decompress it"),
    (rb"\xfd7zXZ\x00", "an xz file: decompress it"),
    (rb"PK\x03\x04", "a zip archive (.npz, or torch.save): save the ids as a flat .npy"),
    (rb"\x93NUMPY", "a NumPy array: name it .npy"),
    (rb"PAR1", "a Parquet file: text in it is read by scripts/prepare_data.py; save ids as a flat .npy"),
    (rb"ARROW1", "an Arrow file: save the ids as a flat .npy"),
    (rb"\x89HDF\r\n\x1a\n", "an HDF5 file: save the ids as a flat .npy"),
    (rb"MMIDIDX", "an index of Megatron: name it .idx, beside its .bin"),
    (rb"TNTIDX", "an index of fairseq or an old Megatron: convert it with their tools to an mmap dataset"),
    (rb"GGUF", "a model in GGUF"),
    (rb"SQLite format 3\x00", "a database"),
)


def describe_other(path: Path, head: bytes) -> str | None:
    """Describe a file that is not plain tokens, and the remedy; None if it may be plain tokens.

    `head` is the file's first HEAD_BYTES.
    """
    for pattern, kind in _KINDS:
        if re.match(pattern, head, re.DOTALL):
            return f"{path} is {kind}"
    if (other := LLMC_OTHERS.get(_int32(head))) is not None:
        return f"{path} is {other}, which holds no stream of tokens"
    if _is_litdata_chunk(path, head):
        return (
            f"{path} is a chunk of litdata: read the folder with litdata's StreamingDataset (for blocks of tokens with "
            "item_loader=TokensLoader(block_size=...)) and save the ids with numpy.save, or prepare the text again"
        )
    return None


def llmc_tokens(path: Path, head: bytes) -> tuple[np.dtype[Any], int] | None:
    """Token dtype and count from an llm.c header; None without one.

    Raises ValueError for a truncated file.
    """
    dtype = LLMC_TOKENS.get(_int32(head))
    if dtype is None:
        return None
    size = path.stat().st_size
    tokens = struct.unpack_from("<i", head, 8)[0] if len(head) >= 12 else -1
    if tokens < 0 or size != LLMC_HEADER_BYTES + tokens * dtype.itemsize:
        raise ValueError(
            f"{path} has an llm.c header for {tokens} tokens of {dtype.name} and {size} bytes in total instead of "
            f"{LLMC_HEADER_BYTES + max(0, tokens) * dtype.itemsize}: it is truncated; copy it again"
        )
    return dtype, tokens


def _int32(head: bytes) -> int:
    return int(struct.unpack_from("<i", head)[0]) if len(head) >= 4 else -1


def _is_litdata_chunk(path: Path, head: bytes) -> bool:
    """Whether it is a litdata chunk: uint32 number of items, then the offset of each item and of the end."""
    if len(head) < 8:
        return False
    items, first = struct.unpack_from("<II", head)
    size = path.stat().st_size
    if items == 0 or first != 4 * (items + 2) or first > size:
        return False
    with open(path, "rb") as f:
        f.seek(first - 4)
        return int(struct.unpack("<I", f.read(4))[0]) == size
