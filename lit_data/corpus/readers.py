"""Documents from files of text: .txt (also .train, .dev, .test), JSON lines, compressed or not, and .parquet; from
folders and patterns of them, and from datasets of Hugging Face.

Read one at a time: memory holds the longest document, and for Parquet a row group's pages. Nothing is cleaned: line
ends, spaces and blank documents stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.corpus.files import (
    PARQUET,
    SUFFIXES,
    SUPPORTED,
    TEXT_SUFFIXES,
    ReadErrors,
    TextFile,
    list_files,
    part_of_files,
)
from lit_data.corpus.streams import DamagedError, after_lines, chunks_of, lines_of

__all__ = [
    "SUFFIXES",
    "SUPPORTED",
    "Document",
    "OnError",
    "Place",
    "ReadErrors",
    "TextFile",
    "list_files",
    "part_of_files",
    "read_documents",
]

OnError = Literal["stop", "skip"]

ROWS_PER_BATCH = 64
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """Where a document stands in the inputs: the number of its file in `list_files` (from 0), and its place there."""

    file: int
    place: int


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        id: the document's own, or `relative-path:line` (relative path for a file that is one document).
        text: never changed on the way.
        source: path of the file, as given.
        place: line of JSON lines or row of a table, from 1; 0 where the file is one document.
        meta: those of the metadata fields that the document has, as text.
        file: number of the file in `list_files`.
        faults: what this reading had left out before this document.
    """

    id: str
    text: str
    source: str
    place: int
    meta: dict[str, str]
    file: int = 0
    faults: int = 0


def read_documents(
    paths: Sequence[str | Path | TextFile],
    *,
    on_error: OnError = "stop",
    text_field: str = "text",
    id_field: str = "id",
    require_id: bool = False,
    metadata: Sequence[str] = (),
    errors: ReadErrors | None = None,
    start: Place | None = None,
) -> Iterator[Document]:
    """Read the documents of files and folders in order.

    Args:
        paths: see `list_files`.
        on_error: what to do about invalid UTF-8 or JSON, a line without text, a damaged file: `stop` raises a
            ValueError that names file and line, `skip` notes it in `errors` and goes on with the next document
            (after damage to a compressed file: with the next file).
        text_field: key (JSON) or column (Parquet) of the text.
        id_field: key or column of the id; documents without one are named `relative-path:line`.
        require_id: take a document without one for a fault (not where a file is one document).
        metadata: further keys or columns to carry along; values that are no text are written as JSON.
        errors: collects what was left out.
        start: go on right after the document at this place, `Place(document.file, document.place)`. What lies before
            it is not parsed: earlier files are not opened, lines are decompressed and counted, row groups left out.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: at once for paths that can't be read; while iterating for faults in the files.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"--on_error {on_error}: choose stop or skip")
    errors = errors if errors is not None else ReadErrors()
    files = list_files(paths, errors)
    if start is not None and not 0 <= start.file < len(files):
        raise ValueError(f"reading was to go on in file number {start.file} of {len(files)}: the inputs have changed")
    first = start.file if start is not None else 0

    def read() -> Iterator[Document]:
        for number, file in enumerate(files[first:], first):
            after = start.place if start is not None and number == first else None
            reader = _FileReader(file, number, on_error, text_field, id_field, require_id, tuple(metadata), errors)
            yield from reader.read(after)

    return read()


@dataclass(frozen=True)
class _FileReader:
    file: TextFile
    number: int
    on_error: OnError
    text_field: str
    id_field: str
    require_id: bool
    metadata: tuple[str, ...]
    errors: ReadErrors

    def read(self, after: int | None) -> Iterator[Document]:
        """All documents, or those after one that was read."""
        try:
            if self.file.hub is not None:
                yield from self._hub(after or 0)
            elif self.file.kind == PARQUET:
                yield from self._parquet(after or 0)
            elif self.file.kind not in TEXT_SUFFIXES:
                yield from self._json_lines(after or 0)
            elif after is None:
                yield from self._whole_file()
        except OSError as error:  # a disk or a permission: nothing to be skipped
            raise ValueError(f"{self.file.path} cannot be read: {error.strerror or error}") from error

    def _fault(self, message: str, cause: Exception | None = None) -> None:
        message = f"{self.file.path}, {message}"
        if self.on_error == "stop":
            raise ValueError(f"{message} (--on_error skip leaves such documents out)") from cause
        self.errors.add(message)

    def _whole_file(self) -> Iterator[Document]:
        try:
            data = b"".join(chunks_of(self.file.path, self.file.compression))
        except DamagedError as error:
            self._fault(f"{error}", error)
            return
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self._fault(f"line {line}: not UTF-8 ({error.reason}, byte {error.start} of the file)", error)
            return
        path, faults = str(self.file.path), self.errors.count
        del data  # else it would stay for as long as the document is worked on
        yield Document(self.file.relative, text, path, 0, {}, self.number, faults)

    def _json_lines(self, after: int) -> Iterator[Document]:
        chunks = chunks_of(self.file.path, self.file.compression)
        lines = lines_of(after_lines(chunks, after, str(self.file.path)) if after else chunks)
        place = after
        while True:
            try:
                line = next(lines, None)
            except DamagedError as error:
                self._fault(f"after line {place}: {error}", error)
                return
            if line is None:
                return
            place += 1
            if place == 1:
                line = line.removeprefix(UTF8_BOM)
            if not line.strip():
                continue
            document = self._parse(line, place)
            if document is not None:
                yield document

    def _parse(self, line: bytes, place: int) -> Document | None:
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            self._fault(f"line {place}: not UTF-8 ({error.reason}, byte {error.start} of the line)", error)
            return None
        except (ValueError, RecursionError) as error:
            self._fault(f"line {place}: invalid JSON: {error}{self._layout()}", error)
            return None
        if not isinstance(record, dict):
            self._fault(f"line {place}: a JSON {_kind(record)} where an object is needed{self._layout()}")
            return None
        # Valid UTF-8 has no halves of surrogate pairs: only an escape can bring one in.
        return self._document(place, record, "line", may_hold_surrogates=b"\\u" in line)

    def _layout(self) -> str:
        return "; a .json file is read as JSON lines, one object a line" if self.file.kind == ".json" else ""

    def _parquet(self, after: int) -> Iterator[Document]:
        place = after
        try:
            with pq.ParquetFile(self.file.path, page_checksum_verification=True) as table:
                columns = self._columns(table.schema_arrow.names)
                group, skipped = _first_group(table.metadata, after)
                groups = list(range(group, table.num_row_groups))
                for batch in table.iter_batches(ROWS_PER_BATCH, groups, columns=columns) if groups else ():
                    if (unread := skipped + batch.num_rows - after) <= 0:
                        skipped += batch.num_rows
                        continue
                    batch = batch.slice(batch.num_rows - unread) if skipped < after else batch
                    skipped = after
                    for record in _records(batch, columns):
                        place += 1
                        if isinstance(record, UnicodeDecodeError):
                            self._fault(f"row {place}: not UTF-8 ({record.reason})", record)
                            continue
                        document = self._document(place, record, "row")
                        if document is not None:
                            yield document
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._fault(f"after row {place}: a damaged or truncated Parquet file: {error}", error)

    def _columns(self, names: Sequence[str]) -> list[str]:
        """Those of the columns to be read that a table has; it must have all but the id, which may be optional."""
        for column in (self.text_field, *self.metadata, *((self.id_field,) if self.require_id else ())):
            if column not in names:
                flag = {self.text_field: "text_field", self.id_field: "id_field"}.get(column, "metadata")
                have = ", ".join(map(str, names))
                raise ValueError(f"{self.file.path} has no column {column!r} (--{flag}); its columns are {have}")
        return [c for c in dict.fromkeys((self.text_field, self.id_field, *self.metadata)) if c in names]

    def _hub(self, after: int) -> Iterator[Document]:
        assert self.file.hub is not None
        required = (self.text_field, *self.metadata, *((self.id_field,) if self.require_id else ()))
        for place, record in enumerate(self.file.hub.rows(after, required, self.id_field), after + 1):
            document = self._document(place, record, "row")
            if document is not None:
                yield document

    def _document(
        self, place: int, record: dict[str, Any], unit: str, *, may_hold_surrogates: bool = True
    ) -> Document | None:
        where = f"{unit} {place}"
        text = record.get(self.text_field)
        if not isinstance(text, str):
            if self.text_field not in record:
                keys = ", ".join(map(repr, list(record)[:8])) or "none"
                self._fault(f"{where}: no field {self.text_field!r} (--text_field); its fields: {keys}")
            else:
                self._fault(f"{where}: the field {self.text_field!r} holds a JSON {_kind(text)}, not text")
            return None
        given = record.get(self.id_field)
        if given is None and self.require_id:
            self._fault(f"{where}: no field {self.id_field!r} (--id_field)")
            return None
        id = f"{self.file.relative}:{place}" if given is None else _as_text(given)
        meta = {m: _as_text(record[m]) for m in self.metadata if record.get(m) is not None}
        if may_hold_surrogates:
            for name, value in ((self.text_field, text), (self.id_field, id), *meta.items()):
                if not _is_unicode(value):
                    self._fault(f"{where}: the field {name!r} holds half of a surrogate pair, which is no Unicode text")
                    return None
        return Document(id, text, str(self.file.path), place, meta, self.number, self.errors.count)


def _first_group(metadata: Any, row: int) -> tuple[int, int]:
    """The row group that holds a row (0-based) of a Parquet file, and the rows before it; beyond the last, none."""
    before = 0
    for group in range(metadata.num_row_groups):
        rows = metadata.row_group(group).num_rows
        if before + rows > row:
            return group, before
        before += rows
    return metadata.num_row_groups, before


def _records(batch: Any, columns: Sequence[str]) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    """The rows of a batch; in place of one that is not UTF-8, the error."""
    try:
        values = [[_parquet_value(v) for v in batch.column(c).to_pylist()] for c in columns]
    except UnicodeDecodeError:
        for row in range(batch.num_rows):
            try:
                yield {c: _parquet_value(batch.column(c)[row].as_py()) for c in columns}
            except UnicodeDecodeError as error:
                yield error
    else:
        for row_values in zip(*values, strict=True):
            yield dict(zip(columns, row_values, strict=True))


def _parquet_value(value: Any) -> Any:
    return value.decode("utf-8") if isinstance(value, bytes) else value


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names: dict[type, str] = {
        bool: "boolean",
        int: "number",
        float: "number",
        str: "string",
        list: "array",
        dict: "object",
    }
    return names.get(type(value), type(value).__name__)
