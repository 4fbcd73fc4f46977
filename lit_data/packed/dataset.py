"""The packed dataset: token shards that Megatron reads, and a manifest that says what they hold.

A folder with `NAME-00000.bin` and `.idx` (Megatron's MMIDIDX version 1, one document a sequence, closed by EOS),
`NAME-00000.docs.parquet` (id, source, place, bytes, words and metadata of each document) and `manifest.json`, written
last: no manifest, no dataset.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lit_files.checksum import file_sha256
from lit_files.mapping import MAX_MAPS, live_maps, map_array
from lit_files.parquet import group_rows, open_table
from lit_files.publish import sync_file, write_json
from lit_files.reading import open_regular, read_record

IntArray = npt.NDArray[np.int64]

FORMAT_VERSION = 2  # 1 had no words
READABLE_VERSIONS = (1, 2)
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
SpecialTokens = Literal["text", "parse"]
WORDS_WORK = ".words"  # folder in a dataset's, of scripts/count_words.py
DOCUMENT_COLUMNS = (
    ("id", pa.string()), ("source", pa.string()), ("place", pa.int64()), ("bytes", pa.int64()), ("words", pa.int64()),
)  # fmt: skip
COARSE_BITS = 10  # of a search in an index: so many bits of the place are found by one call
FEW_VALUES = 32  # of a search in an index: up to so many are found faster one by one
CHECK_DOCUMENTS = 1 << 20  # of an index compared at a time, 20 MB
CHECK_THREADS = 8  # look at the files of a dataset at once: on a network file system each look takes a while


@dataclass(frozen=True)
class Shard:
    """One shard of a dataset: its base name, its counts, and the size in bytes and SHA-256 of each of its files.

    words: None where they were not counted.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    sizes: dict[str, int]
    sha256: dict[str, str]
    words: int | None = None


@dataclass(frozen=True)
class Manifest:
    """What a packed dataset holds. All counts are exact.

    Attributes:
        bos_id: the id that each document begins with; None: documents begin with their text.
        special_tokens: whether names of special tokens in the text were encoded as `text`, or `parse`d to their ids.
        words: separated by white space, counted in the text as it was encoded; None: not counted.
    """

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
    bos_id: int | None = None
    special_tokens: SpecialTokens = "text"
    words: int | None = None

    @cached_property
    def fingerprint(self) -> str:
        """A hash over what decides the data: tokenizer, how texts were encoded, order and checksums of the shards."""
        content = {
            "tokenizer": self.tokenizer["fingerprint"],
            "eos_id": self.eos_id,
            "shards": [[s.documents, s.tokens, s.sha256["bin"], s.sha256["idx"]] for s in self.shards],
            **self.encoding,
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @property
    def encoding(self) -> dict[str, Any]:
        """How texts were encoded, where it is not the default: nothing is hashed of it for older datasets."""
        found: dict[str, Any] = {} if self.bos_id is None else {"bos_id": self.bos_id}
        return found if self.special_tokens == "text" else {**found, "special_tokens": self.special_tokens}

    def to_dict(self) -> dict[str, Any]:
        """For manifest.json. Fields that version 1 did not know are there only where they say something."""
        content = asdict(self)
        for name in ("bos_id", "special_tokens"):
            if name not in self.encoding:
                del content[name]
        for counted in (content, *content["shards"]):
            if counted["words"] is None:
                del counted["words"]
        return content


def dtype_of(vocab_size: int) -> np.dtype[Any]:
    """The dtype that Megatron stores ids of a vocabulary in."""
    return np.dtype(np.uint16 if vocab_size < UINT16_LIMIT else np.int32)


class _ShardWriter:
    """Writes one shard: tokens to `.bin`, each document's row to `.rows` (an Arrow stream), the rest when closed.

    Both files only grow, so that a writer that was killed goes on from sizes that were synced before (`state`).
    """

    def __init__(
        self, folder: Path, name: str, dtype: npt.DTypeLike, schema: pa.Schema, state: dict[str, Any] | None = None
    ) -> None:
        self.folder, self.name, self.dtype, self.schema = folder, name, np.dtype(dtype), schema
        self.documents = self.tokens = self.bytes = 0
        self.words: int | None = 0
        self._hash = hashlib.sha256()
        self._pending: list[pa.RecordBatch] = []
        self._pending_rows = 0
        if state is None:
            self._bin: BinaryIO = open(self._path("bin"), "wb")  # noqa: SIM115 - closed by close
            self._rows: BinaryIO = open(self._path("rows"), "wb")  # noqa: SIM115
        else:
            self.documents, self.tokens, self.bytes = state["documents"], state["tokens"], state["bytes"]
            self.words = state["words"]
            self._bin = _reopen(self._path("bin"), state["bin_size"])
            self._rows = _reopen(self._path("rows"), state["rows_size"])
            with open(self._path("bin"), "rb") as f:
                while chunk := f.read(1 << 24):
                    self._hash.update(chunk)

    def _path(self, kind: str) -> Path:
        return self.folder / f"{self.name}.{kind}"

    def add(self, tokens: npt.NDArray[Any], rows: pa.RecordBatch) -> None:
        """Append whole documents: their tokens one after another, and a row of the schema for each."""
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        self._bin.write(data)
        self._hash.update(data)
        self.documents += rows.num_rows
        self.tokens += len(tokens)
        self.bytes += pc.sum(rows["bytes"]).as_py()
        self.words = add_words(self.words, rows["words"])
        self._pending.append(rows)
        self._pending_rows += rows.num_rows
        if self._pending_rows >= DOCUMENTS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            # Each flush is a stream of its own, schema first: any prefix of whole flushes can be read back.
            with pa.ipc.new_stream(self._rows, self.schema) as stream:
                stream.write_table(pa.Table.from_batches(self._pending, self.schema).combine_chunks())
            self._pending, self._pending_rows = [], 0

    def state(self) -> dict[str, Any]:
        """Make what was added durable; a new writer goes on from the returned state."""
        self._flush()
        for file in (self._bin, self._rows):
            file.flush()
            os.fsync(file.fileno())
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "bin_size": self._bin.tell(),
            "rows_size": self._rows.tell(),
        }

    def close(self) -> Shard:
        """Write index and documents' table, sync everything. `.rows` stays until the dataset is published."""
        self._flush()
        self._rows.close()
        self._bin.close()
        lengths = np.empty(self.documents, dtype=np.int32)
        done = 0
        with pq.ParquetWriter(self._path("docs.parquet"), _without_length(self.schema), compression="zstd") as docs:
            for table in _regrouped(_read_rows(self._path("rows")), DOCUMENTS_PER_GROUP):
                lengths[done : done + table.num_rows] = table["length"].to_numpy()
                done += table.num_rows
                docs.write_table(table.drop_columns(["length"]))
        assert done == self.documents, f"{self._path('rows')} holds {done} rows instead of {self.documents}"
        ends = np.cumsum(lengths, dtype=np.int64)
        pointers = (ends - lengths) * self.dtype.itemsize
        code = next(c for c, d in DTYPE_CODES.items() if np.dtype(d) == self.dtype)
        with open(self._path("idx"), "wb") as f:
            f.write(HEADER.pack(MAGIC, 1, code, len(lengths), len(lengths) + 1))
            f.write(lengths.tobytes())
            f.write(pointers.tobytes())
            f.write(np.arange(len(lengths) + 1, dtype=np.int64).tobytes())
        paths = {kind: self._path(kind) for kind in ("bin", "idx", "docs.parquet")}
        for path in paths.values():
            sync_file(path)
        sums = {kind: self._hash.hexdigest() if kind == "bin" else file_sha256(path) for kind, path in paths.items()}
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        return Shard(self.name, self.documents, self.tokens, self.bytes, sizes, sums, self.words)

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in (self._bin, self._rows):
            with contextlib.suppress(OSError):
                file.close()


def add_words(before: int | None, column: pa.Array | pa.ChunkedArray) -> int | None:
    """The sum of word counts; None once a document's are not known."""
    return None if before is None or column.null_count else before + (pc.sum(column).as_py() or 0)


def sum_of_words(shards: Sequence[Shard]) -> int | None:
    """The words of all shards; None if one has not counted them."""
    counts = [s.words for s in shards]
    return None if None in counts else sum(c for c in counts if c is not None)


def _reopen(path: Path, size: int) -> BinaryIO:
    """Open for appending after the first `size` bytes; what a killed writer wrote beyond them is cut off."""
    file = open(path, "r+b")  # noqa: SIM115 - the caller's
    actual = file.seek(0, os.SEEK_END)
    if actual < size:
        file.close()
        raise ValueError(f"{path} has {actual} bytes, {size} were synced before: it was damaged; begin again (--fresh)")
    file.truncate(size)
    file.seek(size)
    return file


def _read_rows(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path), "rb") as source:
        while source.tell() < source.size():
            yield pa.ipc.open_stream(source).read_all()


def _regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows`, the last one aside: files then don't depend on how rows came."""
    held: list[pa.Table] = []
    n_held = 0
    for table in tables:
        held.append(table)
        n_held += table.num_rows
        if n_held >= rows:
            whole = pa.concat_tables(held).combine_chunks()
            cut = n_held // rows * rows
            for start in range(0, cut, rows):
                yield whole.slice(start, rows)
            held, n_held = [whole.slice(cut)], n_held - cut
    if n_held:
        yield pa.concat_tables(held).combine_chunks()


def _without_length(schema: pa.Schema) -> pa.Schema:
    return schema.remove(schema.get_field_index("length"))


class PackedWriter:
    """Writes a packed dataset. Use as a context manager: leaving it without an error publishes the folder.

    The folder is built under a temporary name and renamed when whole; on an error nothing is left. With `work`, a
    folder of the caller's, nothing is removed on an error: `state` makes what was added durable, and a new writer of
    the same `work` goes on from it.

    Args:
        folder: must not exist.
        tokenizer: its facts, at least `fingerprint`; stored in the manifest.
        vocab_size: ids must lie below it; decides the dtype (uint16 below 65500, else int32).
        metadata: names of further columns of `docs.parquet`, stored as text.
        shard_tokens: a shard is closed when it holds this many.
        work: the temporary folder, kept on errors.
        state: where an earlier writer of `work` stood.
        allow_empty: publish a dataset without documents too (a part of a larger one).
        bos_id, special_tokens: see `Manifest`; the caller has put the id first in each document.
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
        work: Path | None = None,
        state: dict[str, Any] | None = None,
        allow_empty: bool = False,
        bos_id: int | None = None,
        special_tokens: SpecialTokens = "text",
    ) -> None:
        self.folder = Path(folder)
        if self.folder.exists():
            raise ValueError(f"{self.folder} exists already; choose another output folder or remove it")
        if not 0 <= eos_id < vocab_size:
            raise ValueError(f"the end-of-document id {eos_id} is outside the vocabulary of {vocab_size}")
        if bos_id is not None and not 0 <= bos_id < vocab_size:
            raise ValueError(f"the beginning-of-sequence id {bos_id} is outside the vocabulary of {vocab_size}")
        self.tokenizer, self.vocab_size, self.eos_id = tokenizer, vocab_size, eos_id
        self.bos_id, self.special_tokens = bos_id, special_tokens
        self.name, self.metadata, self.shard_tokens = name, tuple(metadata), shard_tokens
        self.source, self.allow_empty = source or {}, allow_empty
        self.dtype = dtype_of(vocab_size)
        metadata_columns = [(m, pa.string()) for m in self.metadata]
        self._schema = pa.schema([*DOCUMENT_COLUMNS, *metadata_columns, ("length", pa.int32())])
        self._shards: list[Shard] = []
        self._shard: _ShardWriter | None = None
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._keep = work is not None
        self._temporary = work if work is not None else self.folder.with_name(f".{self.folder.name}.tmp-{os.getpid()}")
        if state is None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            self._temporary.mkdir(parents=True)
        else:
            self._shards = [Shard(**s) for s in state["shards"]]
            if state["open"] is not None:
                self._shard = self._new_shard(state["open"])

    @property
    def documents(self) -> int:
        """Documents added so far."""
        return sum(s.documents for s in self._shards) + (self._shard.documents if self._shard else 0)

    @property
    def tokens(self) -> int:
        """Tokens added so far."""
        return sum(s.tokens for s in self._shards) + (self._shard.tokens if self._shard else 0)

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
        self,
        ids: npt.ArrayLike,
        *,
        id: str,
        source: str = "",
        place: int = 0,
        n_bytes: int = 0,
        n_words: int | None = None,
        **metadata: str,
    ) -> None:
        """Append one document: its token ids, BOS (if any) and the closing EOS included, and its row of `docs.parquet`.

        Raises ValueError for ids outside the vocabulary, a document without the closing EOS, the declared BOS or
        tokens, one of 2^31 tokens or more, and metadata that was not declared.
        """
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"document {id!r} ({source} {place}): token ids must be a flat list, not {array.ndim}-D")
        row = {"id": id, "source": source, "place": place, "bytes": n_bytes, "words": n_words, **metadata}
        self.add_batch(array, np.asarray([len(array)], dtype=np.int64), {k: [v] for k, v in row.items()})

    def add_batch(self, tokens: npt.NDArray[Any], lengths: IntArray, rows: Mapping[str, Sequence[Any]]) -> None:
        """Append documents: tokens [sum(lengths)], lengths [n], and columns of n values (lists or Arrow arrays).

        The columns are id, source, place, bytes, words and the declared metadata; missing ones are left empty.
        Raises as `add` does, before anything is written.
        """
        unknown = rows.keys() - set(self._schema.names)
        if unknown:
            raise ValueError(f"metadata {', '.join(sorted(unknown))} was not declared to the writer")
        n = len(lengths)
        ends = np.cumsum(lengths, dtype=np.int64)
        self._check(tokens, lengths, ends, rows)
        columns = {**rows, "length": lengths}
        arrays = [pa.array(columns[f.name], f.type) if f.name in columns else pa.nulls(n, f.type) for f in self._schema]
        table = pa.record_batch(arrays, schema=self._schema)
        done = 0
        while done < n:
            if self._shard is None:
                self._shard = self._new_shard(None)
            before = int(ends[done - 1]) if done else 0
            room = before + self.shard_tokens - self._shard.tokens
            stop = int(np.searchsorted(ends, room, side="right"))
            if stop <= done:
                if self._shard.documents:
                    self._close_shard()
                    continue
                stop = done + 1  # larger than a shard: it has one of its own
            self._shard.add(tokens[before : ends[stop - 1]], table.slice(done, stop - done))
            done = stop

    def _check(
        self, tokens: npt.NDArray[Any], lengths: IntArray, ends: IntArray, rows: Mapping[str, Sequence[Any]]
    ) -> None:
        if not len(lengths):
            return

        def name(document: int) -> str:
            id, source, place = (rows.get(k) for k in ("id", "source", "place"))
            where = str(source[document]) if source is not None else ""
            at = f" ({where} {0 if place is None else place[document]})" if where else ""
            return f"document {str(id[document]) if id is not None else document!r}{at}"

        assert ends[-1] == len(tokens), f"{len(tokens)} tokens do not make documents of {ends[-1]}"
        if lengths.min() < 1:
            raise ValueError(f"{name(int(lengths.argmin()))} has no tokens")
        if lengths.max() > MAX_DOCUMENT_TOKENS:
            raise ValueError(
                f"{name(int(lengths.argmax()))} has {lengths.max()} tokens; the format holds documents below 2^31, "
                "so split it"
            )
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.vocab_size:
            bad = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
            where = name(int(np.searchsorted(ends, bad, side="right")))
            raise ValueError(
                f"{where} holds token id {tokens[bad]}, outside the vocabulary of {self.vocab_size}; check that the "
                "tokenizer is the one the vocabulary size was taken from"
            )
        unended = np.flatnonzero(tokens[ends - 1] != self.eos_id)
        if len(unended):
            raise ValueError(f"{name(int(unended[0]))} does not end with the end-of-document id {self.eos_id}")
        if self.bos_id is not None:
            unbegun = np.flatnonzero(tokens[ends - lengths] != self.bos_id)
            if len(unbegun):
                raise ValueError(
                    f"{name(int(unbegun[0]))} does not begin with the beginning-of-sequence id {self.bos_id}"
                )

    def _new_shard(self, state: dict[str, Any] | None) -> _ShardWriter:
        return _ShardWriter(self._temporary, f"{self.name}-{len(self._shards):05d}", self.dtype, self._schema, state)

    def _close_shard(self) -> None:
        assert self._shard is not None
        self._shards.append(self._shard.close())
        self._shard = None

    def state(self) -> dict[str, Any]:
        """Make what was added durable, and say where this writer stands (JSON)."""
        open_shard = self._shard.state() if self._shard is not None else None
        sync_file(self._temporary)
        return {"shards": [asdict(s) for s in self._shards], "open": open_shard}

    def finish(self) -> Manifest:
        """Close the last shard and write the manifest, all of it in the temporary folder (see `remove_rows`)."""
        if self.documents == 0 and not self.allow_empty:
            raise ValueError(f"no documents for {self.folder}: the dataset would be empty")
        if self._shard is not None:
            self._close_shard()
        shards = self._shards
        manifest = Manifest(
            FORMAT_VERSION,
            self.tokenizer,
            self.vocab_size,
            self.eos_id,
            self.dtype.name,
            sum(s.documents for s in shards),
            sum(s.tokens for s in shards),
            sum(s.bytes for s in shards),
            shards,
            self.source,
            self.bos_id,
            self.special_tokens,
            sum_of_words(shards),
        )
        write_json(self._temporary / MANIFEST, manifest.to_dict())
        return manifest

    def close(self) -> Manifest:
        """Write the manifest and publish the folder."""
        try:
            manifest = self.finish()
        except ValueError:
            self.abandon()
            raise
        remove_rows(self._temporary)
        os.rename(self._temporary, self.folder)
        sync_file(self.folder.parent)
        return manifest

    def abandon(self) -> None:
        """Close the files, and remove them unless they are the caller's to keep."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        if not self._keep:
            shutil.rmtree(self._temporary, ignore_errors=True)


def remove_rows(folder: Path) -> None:
    """Remove what only a writer that goes on would need, once there is none."""
    for path in folder.glob("*.rows"):
        path.unlink()
    sync_file(folder)


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
        manifest = read_record(Manifest, path)
        _check_manifest(manifest)
    except ValueError as error:
        said = str(error).removeprefix(f"{path} is damaged: ")
        raise ValueError(f"{path} is damaged or of another version: {said}; prepare the dataset again") from error
    return manifest


def _check_manifest(manifest: Manifest) -> None:
    """Raises ValueError where what a manifest says contradicts itself."""
    if manifest.format_version not in READABLE_VERSIONS:
        readable = " and ".join(map(str, READABLE_VERSIONS))
        raise ValueError(f"it has format version {manifest.format_version}; this program reads {readable}")
    if not isinstance(manifest.tokenizer.get("fingerprint"), str):
        raise ValueError("tokenizer.fingerprint is not a string")
    if not isinstance(manifest.tokenizer.get("folder"), str | None):
        raise ValueError("tokenizer.folder is not a string")
    if manifest.dtype not in {np.dtype(d).name for d in DTYPE_CODES.values() if np.dtype(d).kind in "iu"}:
        raise ValueError(f"dtype is {manifest.dtype!r:.40}, no type of token ids")
    if not 0 <= manifest.eos_id < manifest.vocab_size <= 1 << 31:
        raise ValueError(f"eos_id is {manifest.eos_id} and vocab_size {manifest.vocab_size}")
    if manifest.bos_id is not None and not 0 <= manifest.bos_id < manifest.vocab_size:
        raise ValueError(f"bos_id is {manifest.bos_id} and vocab_size {manifest.vocab_size}")
    names = {shard.name for shard in manifest.shards}
    if len(names) != len(manifest.shards) or any(Path(name).name != name for name in names):
        raise ValueError("two shards have one name, or a name is no file's of this folder")
    for count in ("documents", "tokens", "bytes"):
        counts = [getattr(shard, count) for shard in manifest.shards]
        if min(counts, default=0) < 0 or sum(counts) != getattr(manifest, count):
            raise ValueError(f"{count} is {getattr(manifest, count)}, but the shards hold {sum(counts)}")
    if (manifest.shards and manifest.words != sum_of_words(manifest.shards)) or any(
        (s.words or 0) < 0 for s in manifest.shards
    ):
        raise ValueError(f"words is {manifest.words}, but the shards hold {sum_of_words(manifest.shards)}")
    itemsize = np.dtype(manifest.dtype).itemsize
    for shard in manifest.shards:
        if not {"bin", "idx"} <= shard.sizes.keys() & shard.sha256.keys():
            raise ValueError(f"{shard.name} has no size or no checksum of its .bin and .idx")
        if shard.documents > shard.tokens or shard.sizes["bin"] < shard.tokens * itemsize:
            raise ValueError(f"{shard.name} cannot hold {shard.documents} documents and {shard.tokens} tokens")


def check_documents_table(file: pq.ParquetFile, shard: Shard) -> None:
    """See that an opened docs.parquet is that of a shard. Raises ValueError that says what is wrong."""
    schema = {field.name: field.type for field in file.schema_arrow}
    for name, kind in DOCUMENT_COLUMNS:
        if name == "words" and shard.words is None:  # not counted: in older datasets it may be the user's own metadata
            continue
        if schema.get(name) != kind:
            raise ValueError(f"its column {name} is {schema.get(name, 'missing')} instead of {kind}")
    if (rows := sum(group_rows(file.metadata))) != shard.documents:
        raise ValueError(f"it has {rows} rows, the manifest says {shard.documents}; prepare the dataset again")


def _by_shard(starts: IntArray, values: IntArray) -> Iterator[tuple[int, IntArray | slice]]:
    """Each shard that holds some of the values, and which: their indices. Shard s holds [starts[s], starts[s + 1])."""
    if not len(values):
        return
    shards = np.searchsorted(starts, values, side="right") - 1
    low, high = int(shards.min()), int(shards.max())
    if low == high:
        yield low, slice(None)
        return
    order = np.argsort(shards, kind="stable")
    ordered = shards[order]
    begins = np.append(0, np.flatnonzero(ordered[1:] != ordered[:-1]) + 1)
    of = ordered[begins].tolist()
    for shard, a, b in zip(of, begins.tolist(), [*begins[1:].tolist(), len(order)], strict=True):
        yield shard, order[a:b]


def _last_at_or_below(ascending: IntArray, values: IntArray) -> IntArray:
    """Index of the last element <= each value; the first element is <= all of them.

    For memory-mapped arrays that are not aligned, as in an .idx: np.searchsorted would copy the whole array each time.
    It finds the stretch between some elements, no more than there are values, and halving does the rest.
    """
    if len(values) <= FEW_VALUES:
        view = memoryview(ascending.view(np.uint8).data).cast("q")  # gives Python's integers, which cost a third
        return np.asarray([bisect_right(view, value) - 1 for value in values.tolist()], dtype=np.int64)
    coarse = min(COARSE_BITS, len(values).bit_length())
    step = 1 << max(0, (len(ascending) - 1).bit_length() - coarse)
    found = (np.searchsorted(ascending[::step], values, side="right") - 1) * step
    while step := step // 2:
        ahead = found + step
        inside = np.minimum(ahead, len(ascending) - 1)
        found = np.where((ahead < len(ascending)) & (ascending[inside] <= values), ahead, found)
    return found


class PackedDataset:
    """A packed dataset opened for reading, memory-mapped. Cheap to open and to send to another process.

    The documents of all shards form one stream of tokens.

    Args:
        check: compare the files' sizes, counts and last pointers with the manifest. One process of a run does that for
            all: the others, and unpickled datasets, trust it. The pointers of a shard are checked when it is first
            asked for a document.

    Raises ValueError where a file is missing, truncated or does not fit the manifest.
    """

    def __init__(self, folder: str | Path, *, check: bool = True) -> None:
        self.path = Path(folder)
        self.manifest = read_manifest(self.path)
        self._open()
        if check:
            self._check_shards()

    def _open(self) -> None:
        self.dtype = np.dtype(self.manifest.dtype)
        self.token_start: IntArray = np.cumsum([0] + [s.tokens for s in self.manifest.shards], dtype=np.int64)
        """Position in the stream of each shard's first token, and the number of tokens; (shards + 1,)."""
        self._document_start = np.cumsum([0] + [s.documents for s in self.manifest.shards], dtype=np.int64)
        self._token_starts: list[int] = self.token_start.tolist()  # bisect is faster than numpy for one number
        self._maps: OrderedDict[tuple[int, str], npt.NDArray[Any]] = OrderedDict()
        self._sound: set[int] = set()  # shards whose pointers were checked

    def _check_shards(self) -> None:
        shards = self.manifest.shards
        with ThreadPoolExecutor(CHECK_THREADS if len(shards) > CHECK_THREADS else 1) as pool:
            size = max(1, -(-len(shards) // (4 * CHECK_THREADS)))
            for _ in pool.map(self._check_some, (shards[i : i + size] for i in range(0, len(shards), size))):
                pass

    def _check_some(self, shards: list[Shard]) -> None:
        for shard in shards:
            self._check_shard(shard)

    def _check_shard(self, shard: Shard) -> None:
        prefix = os.path.join(self.path, shard.name)
        for kind, size in shard.sizes.items():
            file = f"{prefix}.{kind}"
            try:
                actual: int | None = os.stat(file).st_size
            except FileNotFoundError:
                actual = None
            if actual != size:
                if (self.path / WORDS_WORK / MANIFEST).is_file():
                    raise ValueError(
                        f"{self.path}: scripts/count_words.py was interrupted; call it again on this folder to finish"
                    )
                state = "is missing" if actual is None else f"has {actual} bytes instead of {size}"
                raise ValueError(f"{file} {state}: the shard is truncated or was replaced; prepare the dataset again")
        n = shard.documents
        if shard.sizes["idx"] < HEADER.size + 12 * n:
            raise ValueError(
                f"{prefix}.idx is too short for the {n} documents of the manifest: prepare the dataset again"
            )
        with open_regular(f"{prefix}.idx") as f:
            head = f.read(HEADER.size)
            last_length = os.pread(f.fileno(), 4, HEADER.size + 4 * (n - 1)) if n else b""
            last_pointer = os.pread(f.fileno(), 8, HEADER.size + 12 * n - 8) if n else b""
        magic, version, code, sequences, _ = HEADER.unpack(head)
        if magic != MAGIC or version != 1 or np.dtype(DTYPE_CODES.get(code, np.float32)) != self.dtype:
            raise ValueError(f"{prefix}.idx is no MMIDIDX version 1 of {self.dtype}; prepare again")
        if sequences != n:
            raise ValueError(
                f"{prefix}.idx holds {sequences} documents, the manifest says {n}: prepare the dataset again"
            )
        end = int.from_bytes(last_pointer, "little", signed=True)
        end += int.from_bytes(last_length, "little", signed=True) * self.dtype.itemsize
        if end != shard.tokens * self.dtype.itemsize:
            raise ValueError(
                f"{prefix}.idx ends at byte {end} of the .bin, the manifest says {shard.tokens} tokens: it was damaged "
                "or replaced; prepare the dataset again"
            )

    def _map(self, shard: int, kind: str) -> npt.NDArray[Any]:
        """A shard's tokens (`bin`) or the byte offsets of its documents (`idx`), mapped when first asked for."""
        key = (shard, kind)
        found = self._maps.get(key)
        if found is not None:
            return found
        facts = self.manifest.shards[shard]
        path = self.path / f"{facts.name}.{kind}"
        if kind == "bin":
            found = map_array(path, self.dtype, (facts.tokens,), random=True)
        else:
            found = map_array(path, np.int64, (facts.documents,), HEADER.size + 4 * facts.documents, random=True)
            if shard not in self._sound:
                self._check_pointers(facts)
                self._sound.add(shard)
        self._maps[key] = found
        while live_maps() > MAX_MAPS and len(self._maps) > 1:
            self._maps.popitem(last=False)
        return found

    def _check_pointers(self, shard: Shard) -> None:
        """See that the documents of a shard follow each other as its lengths say. Raises ValueError if they do not."""
        path, n = self.path / f"{shard.name}.idx", shard.documents
        lengths = map_array(path, np.int32, (n,), HEADER.size)  # maps of their own: these are read from end to end
        pointers = map_array(path, np.int64, (n,), HEADER.size + 4 * n)
        end = 0
        for first in range(0, n, CHECK_DOCUMENTS):
            size = lengths[first : first + CHECK_DOCUMENTS].astype(np.int64)
            ends = end + np.cumsum(size) * self.dtype.itemsize
            wrong = (pointers[first : first + CHECK_DOCUMENTS] != ends - size * self.dtype.itemsize) | (size < 1)
            if wrong.any():
                number = first + int(wrong.argmax())
                raise ValueError(
                    f"{path} is damaged: the place or the length of document {number} of the shard is wrong; prepare "
                    "the dataset again (scripts/inspect_dataset.py --verify compares all files with their checksums)"
                )
            end = int(ends[-1])
        if end != shard.tokens * self.dtype.itemsize:
            raise ValueError(f"{path} is damaged: it names {end} bytes of the .bin, not {shard.tokens} tokens")

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
    def n_words(self) -> int:
        """Words of the text. Raises ValueError, naming the command that counts them, where they are not known."""
        if self.manifest.words is None:
            raise ValueError(
                f"the words of {self.path} are not counted: it was made by an earlier version or from tokens; count "
                f"them with: python scripts/count_words.py {self.path}"
            )
        return self.manifest.words

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
        parts = [self._map(shard, "bin")[a:b] for shard, a, b in self.shard_ranges(start, stop)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.empty(0, dtype=self.dtype)

    def copy_tokens(self, out: IntArray, start: int, stop: int) -> None:
        """Copy tokens [start, stop) of the stream to `out`, int64 [stop - start]."""
        done = 0
        for shard, a, b in self.shard_ranges(start, stop):
            out[done : done + b - a] = self._map(shard, "bin")[a:b]
            done += b - a

    def shard_ranges(self, start: int, stop: int) -> list[tuple[int, int, int]]:
        """Where tokens [start, stop) of the stream lie: (shard, first, end) counted in the shard."""
        ranges = []
        shard = bisect_right(self._token_starts, start) - 1
        while start < stop:
            base, end = self._token_starts[shard], min(stop, self._token_starts[shard + 1])
            if end > start:
                ranges.append((shard, start - base, end - base))
                start = end
            shard += 1
        return ranges

    def document_of(self, positions: IntArray) -> IntArray:
        """Stream positions [n] -> numbers of the documents that hold them, int64 [n]."""
        out = np.empty(len(positions), dtype=np.int64)
        for shard, here in _by_shard(self.token_start, positions):
            pointer = (positions[here] - self._token_starts[shard]) * self.dtype.itemsize
            out[here] = self._document_start[shard] + _last_at_or_below(self._map(shard, "idx"), pointer)
        return out

    def document_start(self, documents: IntArray) -> IntArray:
        """Document numbers [n] -> stream positions of their first tokens, int64 [n]; `n_documents` gives `n_tokens`."""
        out = np.full(len(documents), self.n_tokens, dtype=np.int64)
        for shard, here in _by_shard(self._document_start, documents):
            if shard < len(self.manifest.shards):
                pointers = self._map(shard, "idx")[documents[here] - self._document_start[shard]]
                out[here] = self._token_starts[shard] + pointers // self.dtype.itemsize
        return out

    def document(self, number: int) -> dict[str, Any]:
        """What is known of a document: id, source, place, bytes, metadata, and `start` and `tokens` in the stream."""
        if not 0 <= number < self.n_documents:
            raise ValueError(f"document {number} is not in {self.path}, which has {self.n_documents}")
        shard = int(np.searchsorted(self._document_start, number, side="right")) - 1
        row = number - int(self._document_start[shard])
        facts: dict[str, Any] = {}
        with open_table(self.path / f"{self.manifest.shards[shard].name}.docs.parquet") as file:
            check_documents_table(file, self.manifest.shards[shard])
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row < rows:
                    facts = file.read_row_group(group).slice(row, 1).to_pylist()[0]
                    break
                row -= rows
        start, stop = self.document_start(np.asarray([number, number + 1], dtype=np.int64)).tolist()
        return {"number": number, **facts, "start": start, "tokens": stop - start}

    def find(self, id: str) -> list[int]:
        """Numbers of all documents with an id (ids may repeat). Scans the id column."""
        found: list[int] = []
        for shard, base in zip(self.manifest.shards, self._document_start, strict=False):
            with open_table(self.path / f"{shard.name}.docs.parquet") as file:
                matches = pc.equal(file.read(columns=["id"])["id"], id).to_numpy(zero_copy_only=False)
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
