"""The packed dataset: token shards that Megatron reads, and a manifest that says what they hold.

A folder with `NAME-00000.bin` and `.idx` (Megatron's MMIDIDX version 1, one document a sequence, closed by EOS),
`NAME-00000.docs.parquet` (id, source, place, bytes and metadata of each document) and `manifest.json`, written last:
no manifest, no dataset.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

IntArray = npt.NDArray[np.int64]

FORMAT_VERSION = 1
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
UINT16_LIMIT = 65500  # Megatron's: vocabularies below it are stored as uint16
MAX_DOCUMENT_TOKENS = 2**31 - 1  # sequence lengths are int32
DOCUMENTS_PER_GROUP = 4096
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Shard:
    """One shard of a dataset: its base name, its counts, and the size in bytes and SHA-256 of each of its files."""

    name: str
    documents: int
    tokens: int
    bytes: int
    sizes: dict[str, int]
    sha256: dict[str, str]


@dataclass(frozen=True)
class Manifest:
    """What a packed dataset holds. All counts are exact."""

    format_version: int
    tokenizer: dict[str, Any]
    vocab_size: int
    eos_id: int
    dtype: str
    documents: int
    tokens: int
    bytes: int
    shards: list[Shard]
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """A hash over what decides the data: tokenizer, order and checksums of the shards."""
        content = {
            "tokenizer": self.tokenizer["fingerprint"],
            "eos_id": self.eos_id,
            "shards": [[s.documents, s.tokens, s.sha256["bin"], s.sha256["idx"]] for s in self.shards],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sync_file(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


class _ShardWriter:
    """Writes one shard's files; hashes the tokens while they pass."""

    def __init__(self, folder: Path, name: str, dtype: type, metadata: Sequence[str]) -> None:
        self.folder, self.name, self.dtype = folder, name, np.dtype(dtype)
        self.lengths: list[int] = []
        self.bytes = 0
        self._bin: BinaryIO = open(folder / f"{name}.bin", "wb")  # noqa: SIM115 - closed by close
        self._hash = hashlib.sha256()
        self._schema = pa.schema(
            [("id", pa.string()), ("source", pa.string()), ("place", pa.int64()), ("bytes", pa.int64())]
            + [(m, pa.string()) for m in metadata]
        )
        self._docs = pq.ParquetWriter(folder / f"{name}.docs.parquet", self._schema, compression="zstd")
        self._rows: list[dict[str, Any]] = []

    def add(self, ids: npt.NDArray[Any], row: dict[str, Any]) -> None:
        data = np.ascontiguousarray(ids, dtype=self.dtype).data.cast("B")
        self._bin.write(data)
        self._hash.update(data)
        self.lengths.append(len(ids))
        self.bytes += row["bytes"]
        self._rows.append(row)
        if len(self._rows) >= DOCUMENTS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            self._docs.write_table(pa.Table.from_pylist(self._rows, schema=self._schema))
            self._rows = []

    def close(self) -> Shard:
        self._flush()
        self._docs.close()
        self._bin.close()
        lengths = np.asarray(self.lengths, dtype=np.int32)
        ends = np.cumsum(lengths, dtype=np.int64)
        pointers = (ends - lengths) * self.dtype.itemsize
        code = next(c for c, d in DTYPE_CODES.items() if np.dtype(d) == self.dtype)
        with open(self.folder / f"{self.name}.idx", "wb") as f:
            f.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            f.write(lengths.tobytes())
            f.write(pointers.tobytes())
            f.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        paths = {kind: self.folder / f"{self.name}.{kind}" for kind in ("bin", "idx", "docs.parquet")}
        for path in paths.values():
            sync_file(path)
        sums = {kind: self._hash.hexdigest() if kind == "bin" else file_sha256(path) for kind, path in paths.items()}
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        return Shard(self.name, len(lengths), int(ends[-1]) if len(ends) else 0, self.bytes, sizes, sums)

    def abandon(self) -> None:
        self._bin.close()
        with contextlib.suppress(Exception):
            self._docs.close()


class PackedWriter:
    """Writes a packed dataset. Use as a context manager: leaving it without an error publishes the folder.

    The folder is built under a temporary name beside `folder` and renamed when whole; on an error nothing is left.

    Args:
        folder: must not exist.
        tokenizer: its facts, at least `fingerprint`; stored in the manifest.
        vocab_size: ids must lie below it; decides the dtype (uint16 below 65500, else int32).
        metadata: names of further columns of `docs.parquet`, stored as text.
        shard_tokens: a shard is closed when it holds this many.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tokenizer: dict[str, Any],
        vocab_size: int,
        eos_id: int,
        name: str = "data",
        metadata: Sequence[str] = (),
        shard_tokens: int = 1 << 31,
        source: dict[str, Any] | None = None,
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise ValueError(f"{self.folder} exists already; choose another output folder or remove it")
        if not 0 <= eos_id < vocab_size:
            raise ValueError(f"the end-of-document id {eos_id} lies outside the vocabulary of {vocab_size}")
        self.tokenizer, self.vocab_size, self.eos_id = tokenizer, vocab_size, eos_id
        self.name, self.metadata, self.shard_tokens = name, tuple(metadata), shard_tokens
        self.source = source or {}
        self.dtype: type = np.uint16 if vocab_size < UINT16_LIMIT else np.int32
        self.documents = self.tokens = 0
        self._shards: list[Shard] = []
        self._shard: _ShardWriter | None = None
        self._shard_tokens = 0
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self.folder.with_name(f".{self.folder.name}.tmp-{os.getpid()}")
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()

    def __enter__(self) -> PackedWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self.close()
        except BaseException:
            self.abandon()
            raise
        if kind is not None:
            self.abandon()

    def add(
        self, ids: npt.ArrayLike, *, id: str, source: str = "", place: int = 0, n_bytes: int = 0, **metadata: str
    ) -> None:
        """Append one document: its token ids, the closing EOS included.

        Raises ValueError for ids outside the vocabulary, an empty document, or one of 2^31 tokens or more.
        """
        array = np.asarray(ids)
        where = f"document {id!r} ({source} {place})"
        if array.ndim != 1 or not len(array):
            raise ValueError(f"{where} has no tokens")
        if len(array) > MAX_DOCUMENT_TOKENS:
            raise ValueError(f"{where} has {len(array)} tokens; the format holds documents below 2^31, so split it")
        low, high = int(array.min()), int(array.max())
        if low < 0 or high >= self.vocab_size:
            raise ValueError(
                f"{where} holds token id {high if high >= self.vocab_size else low}, outside the vocabulary of "
                f"{self.vocab_size}; check that the tokenizer is the one the vocabulary size was taken from"
            )
        if self._shard is not None and self._shard_tokens + len(array) > self.shard_tokens:
            self._close_shard()
        if self._shard is None:
            shard_name = f"{self.name}-{len(self._shards):05d}"
            self._shard = _ShardWriter(self._temporary, shard_name, self.dtype, self.metadata)
            self._shard_tokens = 0
        self._shard.add(array, {"id": id, "source": source, "place": place, "bytes": n_bytes, **metadata})
        self._shard_tokens += len(array)
        self.documents += 1
        self.tokens += len(array)

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(self._shard.close())
        self._shard = None

    def close(self) -> Manifest:
        """Write the manifest and publish the folder."""
        if self.documents == 0:
            self.abandon()
            raise ValueError(f"no documents for {self.folder}: the dataset would be empty")
        if self._shard is not None:
            self._close_shard()
        manifest = Manifest(
            FORMAT_VERSION,
            self.tokenizer,
            self.vocab_size,
            self.eos_id,
            np.dtype(self.dtype).name,
            self.documents,
            self.tokens,
            sum(s.bytes for s in self._shards),
            self._shards,
            self.source,
        )
        path = self._temporary / MANIFEST
        with open(path, "w", encoding="utf-8") as f:
            json.dump(asdict(manifest), f, indent=1, ensure_ascii=False)
            f.flush()
            os.fsync(f.fileno())
        sync_file(self._temporary)
        os.rename(self._temporary, self.folder)
        sync_file(self.folder.parent)
        return manifest

    def abandon(self) -> None:
        """Remove what was written."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        shutil.rmtree(self._temporary, ignore_errors=True)


def read_manifest(folder: Path) -> Manifest:
    """Read a dataset's manifest. Raises FileNotFoundError or ValueError that name the folder and the remedy."""
    path = folder / MANIFEST
    if not path.is_file():
        hint = ""
        if (folder / "train" / MANIFEST).is_file():
            hint = f"; did you mean {folder / 'train'}?"
        raise FileNotFoundError(
            f"{folder} is no packed dataset: it has no {MANIFEST}{hint or ' (make one with scripts/prepare_data.py)'}"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        raw["shards"] = [Shard(**s) for s in raw["shards"]]
        manifest = Manifest(**raw)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged or of another version: {error}; prepare the dataset again") from error
    if manifest.format_version != FORMAT_VERSION:
        raise ValueError(f"{path} has format version {manifest.format_version}; this program reads {FORMAT_VERSION}")
    return manifest


def _last_at_or_below(ascending: IntArray, values: IntArray) -> IntArray:
    """Index of the last element <= each value; the first element is <= all of them.

    For memory-mapped arrays that are not aligned, as in an .idx: np.searchsorted would copy the whole array each time.
    """
    found = np.zeros(len(values), dtype=np.int64)
    step = 1 << max(0, len(ascending) - 1).bit_length()
    while step := step // 2:
        ahead = found + step
        inside = np.minimum(ahead, len(ascending) - 1)
        found = np.where((ahead < len(ascending)) & (ascending[inside] <= values), ahead, found)
    return found


class PackedDataset:
    """A packed dataset opened for reading, memory-mapped. Cheap to open and to send to another process.

    The documents of all shards form one stream of tokens. Raises ValueError where a file is missing, truncated or
    does not fit the manifest.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self.manifest = read_manifest(self.path)
        self._open()

    def _open(self) -> None:
        dtype = np.dtype(self.manifest.dtype)
        self._tokens: list[npt.NDArray[Any]] = []
        self._pointers: list[IntArray] = []
        for shard in self.manifest.shards:
            for kind, size in shard.sizes.items():
                file = self.path / f"{shard.name}.{kind}"
                actual = file.stat().st_size if file.is_file() else None
                if actual != size:
                    state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                    raise ValueError(
                        f"{file} {state}: the shard is truncated or was replaced; prepare the dataset again"
                    )
            with open(self.path / f"{shard.name}.idx", "rb") as f:
                magic, version, code, sequences, _ = HEADER.unpack(f.read(HEADER.size))
            if magic != MAGIC or version != 1 or np.dtype(DTYPE_CODES.get(code, np.uint8)) != dtype:
                raise ValueError(f"{self.path / shard.name}.idx is no MMIDIDX version 1 of {dtype}; prepare again")
            if sequences != shard.documents:
                raise ValueError(
                    f"{self.path / shard.name}.idx holds {sequences} documents, the manifest says {shard.documents}: "
                    "prepare the dataset again"
                )
            self._tokens.append(np.memmap(self.path / f"{shard.name}.bin", dtype=dtype, mode="r"))
            offset = HEADER.size + 4 * sequences
            self._pointers.append(
                np.memmap(self.path / f"{shard.name}.idx", dtype=np.int64, mode="r", offset=offset, shape=(sequences,))
            )
        self._itemsize = dtype.itemsize
        self._token_start = np.cumsum([0] + [s.tokens for s in self.manifest.shards], dtype=np.int64)
        self._document_start = np.cumsum([0] + [s.documents for s in self.manifest.shards], dtype=np.int64)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.path, self.manifest = state["path"], state["manifest"]
        self._open()

    @property
    def n_tokens(self) -> int:
        return self.manifest.tokens

    @property
    def n_documents(self) -> int:
        return self.manifest.documents

    @property
    def vocab_size(self) -> int:
        return self.manifest.vocab_size

    @property
    def eos_id(self) -> int:
        return self.manifest.eos_id

    @property
    def fingerprint(self) -> str:
        return self.manifest.fingerprint

    @property
    def tokenizer_folder(self) -> Path | None:
        """Where the tokenizer's files lie, if they are there."""
        folder = self.manifest.tokenizer.get("folder")
        path = (self.path / folder).resolve() if folder else None
        return path if path is not None and path.exists() else None

    def tokens(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the stream, across shards, in the dataset's dtype; 0 <= start <= stop <= n_tokens."""
        assert 0 <= start <= stop <= self.n_tokens, f"[{start}, {stop}) lies outside the {self.n_tokens} tokens"
        first = int(np.searchsorted(self._token_start, start, side="right")) - 1
        parts = []
        for shard in range(first, len(self._tokens)):
            base = int(self._token_start[shard])
            if base >= stop:
                break
            parts.append(self._tokens[shard][max(start - base, 0) : stop - base])
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else self._tokens[0][:0]

    def document_of(self, positions: IntArray) -> IntArray:
        """Stream positions -> numbers of the documents that hold them, int64 of the same shape."""
        shards = np.searchsorted(self._token_start, positions, side="right") - 1
        out = np.empty(len(positions), dtype=np.int64)
        for shard in np.unique(shards):
            here = shards == shard
            pointer = (positions[here] - self._token_start[shard]) * self._itemsize
            inside = _last_at_or_below(self._pointers[shard], pointer)
            out[here] = self._document_start[shard] + inside
        return out

    def document_start(self, documents: IntArray) -> IntArray:
        """Document numbers -> stream position of their first token; `n_documents` gives `n_tokens`."""
        shards = np.searchsorted(self._document_start, documents, side="right") - 1
        out = np.full(len(documents), self.n_tokens, dtype=np.int64)
        for shard in np.unique(shards):
            if shard < len(self._pointers):
                here = shards == shard
                inside = documents[here] - self._document_start[shard]
                out[here] = self._token_start[shard] + self._pointers[shard][inside] // self._itemsize
        return out

    def document(self, number: int) -> dict[str, Any]:
        """What is known of a document: id, source, place, bytes, metadata, and `start` and `tokens` in the stream."""
        if not 0 <= number < self.n_documents:
            raise ValueError(f"document {number} is not in {self.path}, which has {self.n_documents}")
        shard = int(np.searchsorted(self._document_start, number, side="right")) - 1
        row = number - int(self._document_start[shard])
        file = pq.ParquetFile(self.path / f"{self.manifest.shards[shard].name}.docs.parquet")
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < rows:
                facts: dict[str, Any] = file.read_row_group(group).slice(row, 1).to_pylist()[0]
                break
            row -= rows
        start, stop = self.document_start(np.asarray([number, number + 1], dtype=np.int64)).tolist()
        return {"number": number, **facts, "start": start, "tokens": stop - start}

    def find(self, id: str) -> list[int]:
        """Numbers of all documents with an id (ids may repeat). Scans the id column."""
        found: list[int] = []
        for shard, base in zip(self.manifest.shards, self._document_start, strict=False):
            ids = pq.read_table(self.path / f"{shard.name}.docs.parquet", columns=["id"])["id"]
            matches = pc.equal(ids, id).to_numpy(zero_copy_only=False)
            found.extend((int(base) + np.flatnonzero(matches)).tolist())
        return found

    def verify(self) -> list[str]:
        """Compare every file's SHA-256 with the manifest; a list of what is wrong, empty if nothing is."""
        wrong = []
        for shard in self.manifest.shards:
            for kind, expected in shard.sha256.items():
                file = self.path / f"{shard.name}.{kind}"
                if file_sha256(file) != expected:
                    wrong.append(f"{file}: its content does not match the manifest's checksum")
        return wrong
