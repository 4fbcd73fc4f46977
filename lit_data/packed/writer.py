"""Writes a packed dataset: append-only shards, so that a killed writer can resume, and the manifest last."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from lit_data.packed.index import MAX_DOCUMENT_TOKENS, IntArray, dtype_of, write_index
from lit_data.packed.manifest import (
    DOCUMENT_COLUMNS,
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    Shard,
    SpecialTokens,
    sum_of_words,
)
from lit_files.checksum import file_sha256
from lit_files.publish import publish, sync_file, write_json

DOCUMENTS_PER_GROUP = 4096


class _ShardWriter:
    """Writes one shard: tokens to `.bin`, each document's row to `.rows` (an Arrow stream), the rest when closed.

    Both files are append-only, so that a killed writer resumes from the last synced sizes (`state`).
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
        """Append complete documents: concatenated tokens, and one row of the schema each."""
        data = np.ascontiguousarray(tokens, dtype=self.dtype).data.cast("B")
        self._bin.write(data)
        self._hash.update(data)
        self.documents += rows.num_rows
        self.tokens += len(tokens)
        self.bytes += pc.sum(rows["bytes"]).as_py() or 0
        self.words = add_words(self.words, rows["words"])
        self._pending.append(rows)
        self._pending_rows += rows.num_rows
        if self._pending_rows >= DOCUMENTS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._pending:
            # Each flush is a separate stream with its own schema: any prefix of complete flushes is readable.
            with pa.ipc.new_stream(self._rows, self.schema) as stream:
                stream.write_table(pa.Table.from_batches(self._pending, self.schema).combine_chunks())
            self._pending, self._pending_rows = [], 0

    def state(self) -> dict[str, Any]:
        """Make added documents durable; a new writer resumes from the returned state."""
        self._flush()
        for file in (self._bin, self._rows):
            sync_file(file)
        return {
            "documents": self.documents,
            "tokens": self.tokens,
            "bytes": self.bytes,
            "words": self.words,
            "bin_size": self._bin.tell(),
            "rows_size": self._rows.tell(),
        }

    def close(self) -> Shard:
        """Write the index and the document table, sync everything. `.rows` stays until the dataset is published."""
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
        write_index(self._path("idx"), lengths, self.dtype)
        paths = {kind: self._path(kind) for kind in ("bin", "idx", "docs.parquet")}
        for path in paths.values():
            sync_file(path)
        sums = {kind: self._hash.hexdigest() if kind == "bin" else file_sha256(path) for kind, path in paths.items()}
        sizes = {kind: path.stat().st_size for kind, path in paths.items()}
        return Shard(self.name, self.documents, self.tokens, self.bytes, sizes, sums, self.words)

    def abandon(self) -> None:
        """Close the files without finishing them."""
        for file in (self._bin, self._rows):
            with contextlib.suppress(OSError):
                file.close()


def add_words(before: int | None, column: pa.Array | pa.ChunkedArray) -> int | None:
    """The sum of word counts; None if any is unknown."""
    return None if before is None or column.null_count else before + (pc.sum(column).as_py() or 0)


def _reopen(path: Path, size: int) -> BinaryIO:
    """Open for appending after the first `size` bytes; truncates what a killed writer wrote beyond them."""
    file = open(path, "r+b")  # noqa: SIM115 - the caller's
    actual = file.seek(0, os.SEEK_END)
    if actual < size:
        file.close()
        raise ValueError(f"{path} has {actual} bytes, but {size} were synced: it was damaged; start again with --fresh")
    file.truncate(size)
    file.seek(size)
    return file


def _read_rows(path: Path) -> Iterator[pa.Table]:
    with pa.OSFile(str(path), "rb") as source:
        while source.tell() < source.size():
            yield pa.ipc.open_stream(source).read_all()


def _regrouped(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Regroup rows into tables of exactly `rows` (the last may be shorter), so that files don't depend on batching."""
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

    The folder is built under a temporary name and renamed when complete; on an error it is removed. With `work`, a
    folder of the caller's, it is kept on errors: `state` makes added documents durable, and a new writer with the same
    `work` resumes from it.

    Args:
        folder: must not exist.
        tokenizer: its facts, at least `fingerprint`; stored in the manifest.
        vocab_size: ids must be below it; decides the dtype (uint16 below 65500, else int32).
        metadata: names of extra columns of `docs.parquet`, stored as text.
        shard_tokens: a shard is closed when it holds this many.
        work: the temporary folder, kept on errors.
        state: state of an earlier writer of `work`.
        allow_empty: also publish a dataset without documents (a part of a larger one).
        bos_id, special_tokens: see `Manifest`; the caller puts the id first in each document.
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
        """Append one document: its token ids, including BOS (if any) and EOS, and its row of `docs.parquet`.

        Raises ValueError for ids outside the vocabulary, a document without the closing EOS, the declared BOS or
        tokens, one of 2^31 tokens or more, and metadata that was not declared.
        """
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"document {id!r} ({source} {place}): token ids must be a flat list, not {array.ndim}-D")
        row = {"id": id, "source": source, "place": place, "bytes": n_bytes, "words": n_words, **metadata}
        self.add_batch(array, np.asarray([len(array)], dtype=np.int64), {k: [v] for k, v in row.items()})

    def add_batch(self, tokens: npt.NDArray[Any], lengths: IntArray, rows: Mapping[str, Sequence[Any]]) -> None:
        """Append documents: concatenated tokens [sum(lengths)], lengths [n], and columns of n values (lists or Arrow
        arrays).

        The columns are id, source, place, bytes, words and the declared metadata; missing ones stay empty.
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
                stop = done + 1  # larger than a shard: gets its own shard
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
        """Make added documents durable; returns the writer's state (JSON)."""
        open_shard = self._shard.state() if self._shard is not None else None
        sync_file(self._temporary)
        return {"shards": [asdict(s) for s in self._shards], "open": open_shard}

    def finish(self) -> Manifest:
        """Close the last shard and write the manifest in the temporary folder (see `remove_rows`)."""
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
        publish(self._temporary, self.folder)
        return manifest

    def abandon(self) -> None:
        """Close the files; remove them unless the caller gave `work`."""
        if self._shard is not None:
            self._shard.abandon()
            self._shard = None
        if not self._keep:
            shutil.rmtree(self._temporary, ignore_errors=True)


def remove_rows(folder: Path) -> None:
    """Remove the files that only a resuming writer needs."""
    for path in folder.glob("*.rows"):
        path.unlink()
    sync_file(folder)
