"""Reads other programs' token files as documents, in bounded memory: Megatron `.bin/.idx`, datatrove's `.ds`, legacy
chunks of lit-gpt and TinyLlama (`LITPKDS`), shards of llm.c and modded-nanogpt, `.npy`, flat `.bin` and `.npy`.

Megatron and datatrove store an index of documents. Elsewhere documents are delimited by a separator id, have a fixed
length, or are entire files.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lit_data.corpus.files import ReadErrors
from lit_data.packed.import_settings import FlatDtype
from lit_data.packed.index import DTYPE_CODES, HEADER, MAGIC, MAX_DOCUMENT_TOKENS, IntArray
from lit_data.packed.token_headers import HEAD_BYTES, LLMC_HEADER_BYTES, describe_other, llmc_tokens
from lit_files.mapping import map_array
from lit_files.reading import open_regular

Tokens = npt.NDArray[Any]

CHUNK_MAGIC = b"LITPKDS"
CHUNK_HEADER = struct.Struct("<7sQBQ")  # magic, version, dtype code, tokens
CHUNK_DTYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # 6 and 7 are floats
SUFFIXES = (".idx", ".bin", ".ds", ".npy")
BLOCK_TOKENS = 1 << 22
BLOCK_DOCUMENTS = 1 << 16


@dataclass(frozen=True)
class TokenFile:
    """One file of tokens.

    Attributes:
        name: path relative to the input it was found under; its documents are named after it.
        kind: `megatron`, `datatrove`, `chunk`, `llm.c`, `npy` or `flat`.
        offset: bytes before the first token.
        tokens: number of tokens.
    """

    path: Path
    name: str
    kind: str
    dtype: np.dtype[Any]
    offset: int
    tokens: int

    @property
    def has_index(self) -> bool:
        """Whether an index file with the documents' ends exists."""
        return self.kind in ("megatron", "datatrove")

    def map(self) -> Tokens:
        """The file's tokens [tokens], memory-mapped."""
        return map_array(self.path, self.dtype, (self.tokens,), self.offset)


@dataclass(frozen=True)
class Block:
    """Some documents of a file: concatenated tokens [sum(lengths)], lengths [n], 0-based numbers in the file [n]."""

    file: TokenFile
    tokens: Tokens
    lengths: IntArray
    numbers: IntArray

    def only(self, kept: npt.NDArray[np.bool_]) -> Block:
        """Select documents by the mask `kept` [n]."""
        if kept.all():
            return self
        tokens = self.tokens[np.repeat(kept, self.lengths)]
        return Block(self.file, tokens, self.lengths[kept], self.numbers[kept])


def find_token_files(
    inputs: Sequence[str | Path], dtype: FlatDtype | None = None, errors: ReadErrors | None = None
) -> list[TokenFile]:
    """Find the token files of inputs: files, Megatron prefixes (PREFIX.bin, PREFIX.idx), and folders of these.

    `dtype` applies to files without one: flat `.bin`, and `.npy` without NumPy's header, as OLMo writes them. A file
    found twice is used once and noted in `errors.warnings`.

    Raises:
        FileNotFoundError: an input that does not exist.
        ValueError: a file that is truncated or not a token file, or a folder without token files.
    """
    errors = errors if errors is not None else ReadErrors()
    found: dict[tuple[int, int], TokenFile] = {}
    for path, name, is_companion in (each for given in map(Path, inputs) for each in _token_paths(given)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; it belongs to a file beside it, so copy it as well")
        facts = path.stat()
        first = found.get((facts.st_dev, facts.st_ino))
        if first is None:
            found[facts.st_dev, facts.st_ino] = _open(path, name, dtype)
        elif not is_companion:  # a shell pattern matches both .bin and .idx; that is fine
            how = "is given twice" if first.path == path else f"is the same file as {first.path}"
            errors.warnings.append(f"{path} {how}; it is read once")
    errors.warnings += [
        f"{loss} says which tokens to leave out of the loss; it is not read"
        for f in found.values()
        if (loss := f.path.with_name(f"{f.path.name}.loss")).is_file()
    ]
    return list(found.values())


def _token_paths(given: Path) -> Iterator[tuple[Path, str, bool]]:
    """Token files of an input: (file, name, whether only a companion file was given)."""
    if given.is_dir():
        names = [p for p in sorted(given.rglob("*")) if p.suffix in SUFFIXES and p.is_file()]
        known = set(names)
        paths = [p for p in names if p.suffix != ".bin" or p.with_suffix(".idx") not in known]
        if not paths:
            raise ValueError(f"{given} holds no {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
        for path in paths:
            path = _tokens_of(path)
            yield path, path.relative_to(given).as_posix(), False
    elif given.is_file():
        path = _tokens_of(given)
        yield path, path.name, path != given
    elif given.with_name(given.name + ".idx").is_file():
        yield given.with_name(given.name + ".bin"), given.name + ".bin", False
    else:
        raise FileNotFoundError(f"{given} does not exist")


def _tokens_of(path: Path) -> Path:
    """The token file that a companion file belongs to."""
    if path.suffix == ".idx":
        return path.with_suffix(".bin")
    beside = path.suffix in (".index", ".metadata", ".loss") and path.with_suffix("").suffix == ".ds"
    return path.with_suffix("") if beside else path


def _open(path: Path, name: str, dtype: FlatDtype | None) -> TokenFile:
    if path.suffix == ".bin" and path.with_suffix(".idx").is_file():
        index = MegatronIndex(path.with_suffix(".idx"))
        size = path.stat().st_size
        if size < index.end_byte:
            raise ValueError(
                f"{path} has {size} bytes, its .idx names {index.end_byte}: it is truncated; copy it again"
            )
        return TokenFile(path, name, "megatron", index.dtype, 0, size // index.dtype.itemsize)
    with open(path, "rb") as f:
        head = f.read(HEAD_BYTES)
    if path.suffix == ".npy" and head.startswith(b"\x93NUMPY"):
        return _open_npy(path, name)
    if (other := describe_other(path, head)) is not None:
        raise ValueError(other)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} is of an unknown type; tokens are read from {', '.join(SUFFIXES)}")
    if path.suffix == ".ds":
        return _open_datatrove(path, name, dtype)
    if path.suffix == ".bin" and head.startswith(CHUNK_MAGIC):
        return _open_chunk(path, name, head)
    if (shard := llmc_tokens(path, head)) is not None:
        if dtype not in (None, shard[0].name):
            raise ValueError(f"--dtype {dtype}: the header of {path} says {shard[0].name}; leave --dtype out")
        return TokenFile(path, name, "llm.c", shard[0], LLMC_HEADER_BYTES, shard[1])
    if dtype is None:
        raise _no_dtype(path)
    return _open_flat(path, name, np.dtype(dtype).newbyteorder("<"), f"--dtype {dtype}")


def _no_dtype(path: Path) -> ValueError:
    why = {
        ".npy": "it has no header of NumPy, as OLMo's have none",
        ".ds": "it has neither .index nor .metadata beside it",
    }.get(path.suffix, f"no .idx beside it, no header of {CHUNK_MAGIC.decode()} or llm.c; nanoGPT's are uint16")
    return ValueError(f"{path} is a flat file of tokens ({why}): give the type of its ids with --dtype")


def _open_flat(path: Path, name: str, dtype: np.dtype[Any], named: str) -> TokenFile:
    size = path.stat().st_size
    if size % dtype.itemsize:
        raise ValueError(
            f"{path} has {size} bytes, not a multiple of the {dtype.itemsize} of {named}: it is truncated; copy it "
            "again"
        )
    return TokenFile(path, name, "flat", dtype, 0, size // dtype.itemsize)


def _open_npy(path: Path, name: str) -> TokenFile:
    # Not np.load: its errors for objects and long headers suggest allow_pickle, which can run code.
    try:
        with open(path, "rb") as f:
            version = np.lib.format.read_magic(f)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(f)
            offset = f.tell()
    except (ValueError, EOFError, OSError, TypeError, SyntaxError):
        raise ValueError(f"{path} is truncated or has a damaged NumPy header; save the ids again") from None
    if dtype.kind not in "iu" or not np.can_cast(dtype, np.int64) or len(shape) != 1:
        held = "Python objects" if dtype.hasobject else f"{len(shape)}-dimensional {dtype}"
        raise ValueError(f"{path} holds {held}; save the ids as a flat array of integers (not uint64)")
    size, expected = path.stat().st_size, offset + shape[0] * dtype.itemsize
    if size < expected:
        raise ValueError(f"{path} has {size} bytes, its header says {expected}: it is truncated; copy it again")
    return TokenFile(path, name, "npy", dtype, offset, int(shape[0]))


def _open_datatrove(path: Path, name: str, dtype: FlatDtype | None) -> TokenFile:
    """Tokens of 2 or 4 bytes; `.ds.index` has each document's end in tokens, `.ds.metadata` the token size."""
    size, index = path.stat().st_size, _beside(path, ".index")
    itemsize = _token_bytes(_beside(path, ".metadata"))
    tokens = None
    if index.is_file():
        ends = index.stat().st_size // 8
        if index.stat().st_size % 8:
            raise ValueError(
                f"{index} has {index.stat().st_size} bytes, not a multiple of 8: it is truncated; copy it again"
            )
        tokens = int(np.fromfile(index, "<u8", 1, offset=8 * (ends - 1))[0]) if ends else 0
        itemsize = itemsize or (size // tokens if tokens else 2)
    if itemsize is None:
        if dtype is None:
            raise _no_dtype(path)
        return _open_flat(path, name, np.dtype(dtype).newbyteorder("<"), f"--dtype {dtype}")
    found = np.dtype({2: "<u2", 4: "<u4"}.get(itemsize, "V1"))
    if found.kind != "u" or (tokens is not None and size != tokens * itemsize):
        expected = f"its .index names {tokens} tokens" if tokens is not None else f"a token has {itemsize} bytes"
        raise ValueError(f"{path} has {size} bytes, but {expected}: one of the files is damaged; copy them again")
    if dtype is not None and np.dtype(dtype).itemsize != itemsize:
        raise ValueError(f"--dtype {dtype}: the files beside {path} say {found.name}; leave --dtype out")
    if tokens is None:
        return _open_flat(path, name, found, ".ds.metadata")
    return TokenFile(path, name, "datatrove", found, 0, tokens)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _token_bytes(metadata: Path) -> int | None:
    """Token size from a .ds.metadata, whose first line is TOKENIZER|SIZE; None if it has none."""
    if not metadata.is_file():
        return None
    with open(metadata, "rb") as f:
        found = re.fullmatch(rb".*\|(\d+)", f.readline(1 << 16).strip())
    return int(found[1]) if found else None


def _open_chunk(path: Path, name: str, head: bytes) -> TokenFile:
    if len(head) < CHUNK_HEADER.size:
        raise ValueError(f"{path} is truncated in its header; copy it again")
    _, version, code, tokens = CHUNK_HEADER.unpack_from(head)
    if version != 1 or code not in CHUNK_DTYPES:
        raise ValueError(
            f"{path} is a chunk of version {version} with type code {code}; only version 1 with integers can be read"
        )
    dtype = np.dtype(CHUNK_DTYPES[code]).newbyteorder("<")
    size, expected = path.stat().st_size, CHUNK_HEADER.size + tokens * dtype.itemsize
    if size != expected:
        raise ValueError(f"{path} has {size} bytes, its header says {expected}: it is truncated; copy it again")
    return TokenFile(path, name, "chunk", dtype, CHUNK_HEADER.size, tokens)


class MegatronIndex:
    """Reads a Megatron `.idx` (MMIDIDX version 1): lengths and byte offsets of sequences, and document ends.

    A document is one or more sequences. Raises ValueError for an index that is truncated or contradicts itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with open_regular(path) as f:
            head = f.read(HEADER.size)
        if len(head) < HEADER.size or not head.startswith(MAGIC):
            raise ValueError(f"{path} is not a Megatron index (MMIDIDX), or is truncated")
        _, version, code, self.sequences, self.boundaries = HEADER.unpack(head)
        dtype = DTYPE_CODES.get(code)
        if version != 1 or dtype is None or np.dtype(dtype).kind not in "iu":
            raise ValueError(
                f"{path} has version {version} and type code {code}; only version 1 with integers can be read"
            )
        self.dtype = np.dtype(dtype).newbyteorder("<")
        size, expected = path.stat().st_size, HEADER.size + 12 * self.sequences + 8 * self.boundaries
        if self.sequences and size == expected + self.sequences:
            raise ValueError(f"{path} is an index of a multimodal dataset, which is not text")
        if size != expected:
            raise ValueError(f"{path} has {size} bytes instead of {expected}: it is truncated; copy it again")
        if not self.boundaries or self._read("q", 12, 0, 1)[0] or self._last_boundary() != self.sequences:
            raise ValueError(
                f"{path} is damaged: its documents do not cover its {self.sequences} sequences; copy it again"
            )
        self.end_byte = self._find_end()

    @property
    def documents(self) -> int:
        return int(self.boundaries) - 1

    def _read(self, kind: str, bytes_before: int, start: int, stop: int) -> Any:
        """Read entries [start, stop) of the section that starts `bytes_before` bytes per sequence after the header."""
        dtype = np.dtype(f"<{kind}")
        offset = HEADER.size + bytes_before * self.sequences + start * dtype.itemsize
        return np.fromfile(self.path, dtype=dtype, count=stop - start, offset=offset)

    def lengths(self, start: int, stop: int) -> IntArray:
        """Lengths in tokens of sequences [start, stop), int64."""
        lengths: IntArray = self._read("i", 0, start, stop).astype(np.int64)
        if len(lengths) and lengths.min() < 0:
            raise ValueError(
                f"{self.path} is damaged: sequence {start + int(lengths.argmin())} has a negative length; copy it again"
            )
        return lengths

    def first_tokens(self, start: int, stop: int) -> IntArray:
        """Positions in the .bin of the first tokens of sequences [start, stop), int64."""
        offsets: IntArray = self._read("q", 4, start, stop)
        if len(offsets) and (offsets.min() < 0 or (offsets % self.dtype.itemsize).any()):
            raise ValueError(f"{self.path} is damaged: a sequence begins in the middle of a token; copy it again")
        return offsets // self.dtype.itemsize

    def first_sequences(self, start: int, stop: int) -> IntArray:
        """First sequences of documents [start, stop), and the end of the last: int64 [stop - start + 1]."""
        found: IntArray = self._read("q", 12, start, stop + 1)
        if (np.diff(found) < 0).any() or found[0] < 0 or found[-1] > self.sequences:
            raise ValueError(f"{self.path} is damaged: its documents are not in order; copy it again")
        return found

    def _last_boundary(self) -> int:
        return int(self._read("q", 12, self.boundaries - 1, self.boundaries)[0])

    def _find_end(self) -> int:
        """Size in bytes of the .bin up to its last token."""
        end = 0
        for start in range(0, self.sequences, BLOCK_DOCUMENTS):
            stop = min(start + BLOCK_DOCUMENTS, self.sequences)
            ends = self.first_tokens(start, stop) + self.lengths(start, stop)
            end = max(end, int(ends.max()))
        return end * self.dtype.itemsize

    def is_plain(self) -> bool:
        """Whether the sequences are contiguous from the first token of the .bin on."""
        expected = 0
        for start in range(0, self.sequences, BLOCK_DOCUMENTS):
            stop = min(start + BLOCK_DOCUMENTS, self.sequences)
            lengths = self.lengths(start, stop)
            if (self.first_tokens(start, stop) != expected + np.cumsum(lengths) - lengths).any():
                return False
            expected += int(lengths.sum())
        return True


def megatron_blocks(file: TokenFile) -> Iterator[Block]:
    """Iterate over the documents of a Megatron dataset, each with all its sequences."""
    index, tokens = MegatronIndex(file.path.with_suffix(".idx")), file.map()
    for start in range(0, index.documents, BLOCK_DOCUMENTS):
        firsts = index.first_sequences(start, min(start + BLOCK_DOCUMENTS, index.documents))
        starts, lengths = (read(int(firsts[0]), int(firsts[-1])) for read in (index.first_tokens, index.lengths))
        firsts -= firsts[0]
        of_document = np.diff(np.concatenate([[0], np.cumsum(lengths)])[firsts])
        numbers = np.arange(start, start + len(of_document))
        for a, b in _cut_by_size(of_document):
            sequences = slice(int(firsts[a]), int(firsts[b]))
            yield Block(file, _gather(tokens, starts[sequences], lengths[sequences]), of_document[a:b], numbers[a:b])


def datatrove_blocks(file: TokenFile) -> Iterator[Block]:
    """Iterate over the documents of a `.ds`, by its index."""
    index, tokens = _beside(file.path, ".index"), file.map()
    begin, count = 0, index.stat().st_size // 8
    for start in range(0, count, BLOCK_DOCUMENTS):
        here = np.fromfile(index, "<u8", min(BLOCK_DOCUMENTS, count - start), offset=8 * start).astype(np.int64)
        lengths = np.diff(here, prepend=begin)
        if lengths.min() < 0 or here[-1] > file.tokens:
            raise ValueError(f"{index} is damaged: its documents are not in order; copy it again")
        numbers = np.arange(start, start + len(here))
        for a, b in _cut_by_size(lengths):
            first = int(here[a] - lengths[a])
            yield Block(file, tokens[first : int(here[b - 1])], lengths[a:b], numbers[a:b])
        begin = int(here[-1])


def split_blocks(files: Sequence[TokenFile], separator: int, keep: bool, across_files: bool) -> Iterator[Block]:
    """Split at a separator id, which is dropped or (`keep`) left at the end of each document.

    With `across_files` a document may continue in later files; it belongs to the first.

    Raises:
        ValueError: a document of 2^31 tokens or more.
    """
    waiting: list[Tokens] = []  # start, in earlier files, of a still unfinished document
    owner, number = files[0], 0
    for file in files:
        tokens = file.map()
        if not waiting:
            owner, number = file, 0
        begin = 0
        for start in range(0, file.tokens, BLOCK_TOKENS):
            ends = start + np.flatnonzero(tokens[start : start + BLOCK_TOKENS] == separator)
            if waiting and len(ends):
                yield _joined(owner, [*waiting, tokens[: ends[0] + keep]], number)
                waiting, owner, number = [], file, 0
                begin, ends = int(ends[0]) + 1, ends[1:]
            for a in range(0, len(ends), BLOCK_DOCUMENTS):
                here = ends[a : a + BLOCK_DOCUMENTS]
                lengths = np.diff(here, prepend=begin - 1)
                _check_length(file, number, int(lengths[0]))
                block = Block(file, tokens[begin : here[-1] + 1], lengths, np.arange(number, number + len(here)))
                yield block if keep else _without(block, separator)
                begin, number = int(here[-1]) + 1, number + len(here)
        if begin < file.tokens:
            waiting.append(tokens[begin:])
        if waiting and (not across_files or file is files[-1]):
            yield _joined(owner, waiting, number)
            waiting = []


def fixed_blocks(file: TokenFile, document_tokens: int | None) -> Iterator[Block]:
    """Split into documents of a fixed length (the last may be shorter), or one document per file.

    Raises:
        ValueError: a document of 2^31 tokens or more.
    """
    length = document_tokens if document_tokens is not None else max(1, file.tokens)
    _check_length(file, 0, length)
    tokens = file.map()
    at_once = max(1, BLOCK_TOKENS // length) * length
    for start in range(0, file.tokens, at_once):
        block = tokens[start : start + at_once]
        ends = np.arange(length, len(block) + length, length).clip(max=len(block))
        numbers = start // length + np.arange(len(ends))
        yield Block(file, block, np.diff(ends, prepend=0), numbers)


def _check_length(file: TokenFile, number: int, length: int) -> None:
    """Check a document's length before copying it: a wrong separator can make it as long as the file."""
    if length >= MAX_DOCUMENT_TOKENS:
        raise ValueError(
            f"{file.path}: document {number + 1} would have {length} tokens, and the format holds documents below "
            "2^31; give the id that ends documents with --split_at, or a length with --document_tokens"
        )


def _joined(file: TokenFile, parts: list[Tokens], number: int) -> Block:
    length = sum(map(len, parts))
    _check_length(file, number, length)
    tokens = parts[0] if len(parts) == 1 else np.concatenate(parts)
    return Block(file, tokens, np.asarray([length]), np.asarray([number]))


def _without(block: Block, separator: int) -> Block:
    return Block(block.file, block.tokens[block.tokens != separator], block.lengths - 1, block.numbers)


def _cut_by_size(lengths: IntArray) -> Iterator[tuple[int, int]]:
    """Ranges of documents with at most BLOCK_TOKENS in total, or of a single one."""
    ends = np.cumsum(lengths)
    start = 0
    while start < len(lengths):
        limit = ends[start] - lengths[start] + BLOCK_TOKENS
        stop = max(start + 1, int(np.searchsorted(ends, limit, side="right")))
        yield start, stop
        start = stop


def _gather(tokens: Tokens, starts: IntArray, lengths: IntArray) -> Tokens:
    """Concatenate ranges of a file; a view if they are contiguous."""
    if not len(starts):
        return tokens[:0]
    if (starts[1:] == starts[:-1] + lengths[:-1]).all():
        return tokens[starts[0] : starts[0] + lengths.sum()]
    stretches = zip(starts.tolist(), lengths.tolist(), strict=True)
    return np.concatenate([tokens[start : start + length] for start, length in stretches])
