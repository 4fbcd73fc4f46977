"""Reads documents from text files: .txt (also .train, .dev, .test), JSON lines, compressed or not, and .parquet; from
folders and patterns of them, and from Hugging Face datasets.

Reads one at a time: memory is bounded by the longest document, and for Parquet a row group's pages. Documents are
limited to `max_document_mb`, as a few compressed kilobytes can expand to any size. Nothing is cleaned: line ends,
spaces and blank documents stay as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_data.corpus.files import PARQUET, TEXT_SUFFIXES, ReadErrors, TextFile, list_files
from lit_data.corpus.options import MAX_DOCUMENT_MB, OnError, check_split
from lit_data.corpus.parquet_columns import column_of, first_group, has_column, no_column, rows_at_once, values_of
from lit_data.corpus.streams import DamagedError, OnRead, after_lines, bytes_within, chunks_of, ignore, lines_of

UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, order=True, slots=True)
class Place:
    """A document's position in the inputs: the 0-based number of its file in `list_files`, and its place there."""

    file: int
    place: int


@dataclass(frozen=True, slots=True)
class Document:
    """A document.

    Attributes:
        id: the document's own, or `relative-path:line` (the relative path for one document per file). Non-text ids are
            written as JSON, invalid UTF-8 in hexadecimal.
        text: unchanged.
        source: path of the file, as given.
        place: line (the first of several) or table row, from 1; 0 for one document per file.
        meta: the document's metadata fields, as text.
        file: number of the file in `list_files`.
        faults: what was skipped before this document in this call.
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
    split_documents: str = "file",
    max_document_mb: int = MAX_DOCUMENT_MB,
    errors: ReadErrors | None = None,
    start: Place | None = None,
    on_read: OnRead = ignore,
) -> Iterator[Document]:
    """Read the documents of files and folders in order.

    Args:
        paths: see `list_files`.
        on_error: how to handle invalid UTF-8 or JSON, a line without text, a damaged file: `stop` raises a ValueError
            that names file and line, `skip` notes it in `errors` and continues with the next document (after damage to
            a compressed file: with the next file).
        text_field: key (JSON) or column (Parquet) of the text; `translation.de` is the field `de` of `translation`.
        id_field: key or column of the id; documents without one are named `relative-path:line`.
        require_id: treat a document without one as a fault (except with one document per file).
        metadata: extra keys or columns to keep; non-text values are written as JSON.
        split_documents: unit of a document in plain text: `file`; `blank_line` for the lines between two of them;
            `line` for each non-blank line; any other text for what is between lines equal to it.
        max_document_mb: a longer document (of 2^20 bytes each) is a fault.
        errors: collects skipped input.
        start: continue right after the document at this place, `Place(document.file, document.place)`. Nothing before
            it is parsed: earlier files are not opened, lines are decompressed and counted, row groups skipped.
        on_read: called with the number of bytes read, for a display of progress; not for datasets of Hugging Face.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: immediately for unreadable paths; while iterating for faults in the files.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"--on_error {on_error}: choose stop or skip")
    check_split(split_documents)
    if max_document_mb < 1:
        raise ValueError(f"--max_document_mb {max_document_mb}: at least 1 is needed")
    errors = errors if errors is not None else ReadErrors()
    files = list_files(paths, errors)
    if start is not None and not 0 <= start.file < len(files):
        raise ValueError(
            f"cannot resume in file number {start.file} of {len(files)}: the inputs have changed; start again with "
            "--fresh"
        )
    first = start.file if start is not None else 0

    fields = _Fields(text_field, id_field, require_id, tuple(metadata))

    def read() -> Iterator[Document]:
        for number, file in enumerate(files[first:], first):
            after = start.place if start is not None and number == first else None
            reader = _FileReader(file, number, on_error, fields, split_documents, max_document_mb, errors, on_read)
            yield from reader.read(after)

    return read()


@dataclass(frozen=True)
class _Fields:
    """The fields of a record to read."""

    text: str
    id: str
    require_id: bool
    metadata: tuple[str, ...]

    @property
    def all(self) -> list[str]:
        return list(dict.fromkeys((self.text, self.id, *self.metadata)))

    @property
    def required(self) -> list[str]:
        """The columns every table must have."""
        return [self.text, self.id] if self.require_id else [self.text]


@dataclass(frozen=True)
class _FileReader:
    file: TextFile
    number: int
    on_error: OnError
    fields: _Fields
    split_documents: str
    max_document_mb: int
    errors: ReadErrors
    on_read: OnRead

    def read(self, after: int | None) -> Iterator[Document]:
        """Read all documents, or those after a given place."""
        try:
            if self.file.hub is not None:
                yield from self._hub(after or 0)
            elif self.file.kind == PARQUET:
                yield from self._parquet(after or 0)
            elif self.file.kind not in TEXT_SUFFIXES:
                yield from self._json_lines(after or 0)
            elif self.split_documents == "line":
                yield from self._lines(after or 0)
            elif self.split_documents != "file":
                yield from self._sections(after or 0)
            elif after is None:
                yield from self._whole_file()
        except OSError as error:  # a disk or permission error: can't be skipped
            raise ValueError(f"{self.file.path} cannot be read: {error.strerror or error}") from error

    def _fault(self, message: str, cause: Exception | None = None) -> None:
        message = f"{self.file.path}, {message}"
        if self.on_error == "stop":
            raise ValueError(f"{message} (--on_error skip leaves such documents out)") from cause
        self.errors.add(message)

    def _too_long(self, what: str, remedy: str = "") -> None:
        self._fault(f"{what} of more than {self.max_document_mb} MB (--max_document_mb{remedy})")

    def _chunks(self) -> Iterator[bytes]:
        return chunks_of(self.file.path, self.file.compression, self.on_read)

    @property
    def _limit(self) -> int:
        """Maximum bytes of a document."""
        return self.max_document_mb << 20

    def _whole_file(self) -> Iterator[Document]:
        data: bytes | None = None
        try:
            if self.file.compression or self.file.path.stat().st_size <= self._limit:
                data = bytes_within(self._chunks(), self._limit)
        except DamagedError as error:
            self._fault(f"{error}", error)
            return
        if data is None:
            self._too_long("one document", "; --split_documents line, blank_line or a separator cuts the file")
            return
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self._fault(f"line {line}: not UTF-8 ({error.reason}, byte {error.start} of the file)", error)
            return
        path, faults = str(self.file.path), self.errors.count
        del data  # else it would be kept while the document is processed
        yield Document(self.file.relative, text, path, 0, {}, self.number, faults)

    def _numbered_lines(self, after: int) -> Iterator[tuple[int, bytes | None]]:
        """Iterate over (1-based number, line without its end, or None if too long), from the line after `after`."""
        chunks = self._chunks()
        lines = lines_of(after_lines(chunks, after, str(self.file.path)) if after else chunks, self._limit)
        place = after
        try:
            for line in lines:
                place += 1
                yield place, line.removeprefix(UTF8_BOM) if line is not None and place == 1 else line
        except DamagedError as error:
            self._fault(f"after line {place}: {error}", error)

    def _lines(self, after: int) -> Iterator[Document]:
        """Read each non-blank line of plain text as a document."""
        for place, line in self._numbered_lines(after):
            if line is None:
                self._too_long(f"line {place}: a line")
            elif (text := self._decoded(line.removesuffix(b"\r"), place)) and not text.isspace():
                yield self._piece(place, text)

    def _sections(self, after: int) -> Iterator[Document]:
        """Read the text between blank lines, or between separators, as documents, with inner line ends unchanged."""
        # `after` is the first line of a section already read: it is read again and skipped.
        for place, text in self._between_separators(max(0, after - 1)):
            if place != after:
                yield self._piece(place, text)

    def _between_separators(self, after: int) -> Iterator[tuple[int, str]]:
        """Iterate over sections without faults: (number of the first line, text)."""
        separator = "" if self.split_documents == "blank_line" else self.split_documents
        begin, size = 0, 0
        parts: list[str] | None = []  # None after a fault, until the section ends
        for place, line in self._numbered_lines(after):
            if line is not None and line.decode("utf-8", "replace").strip() == separator:
                if parts and any(map(str.strip, parts)):
                    yield begin, "\n".join(parts).strip("\r\n")
                begin, size, parts = 0, 0, []
                continue
            begin = begin or place
            if parts is None:
                continue
            size += len(line) + 1 if line is not None else 0
            if line is None or size > self._limit:
                self._too_long(f"line {begin}: {'a paragraph' if separator == '' else 'the text between separators'}")
                parts = None
            elif (text := self._decoded(line, place)) is None:
                parts = None
            else:
                parts.append(text)
        if parts and any(map(str.strip, parts)):
            yield begin, "\n".join(parts).strip("\r\n")

    def _decoded(self, line: bytes, place: int) -> str | None:
        try:
            return line.decode("utf-8")
        except UnicodeDecodeError as error:
            self._fault(f"line {place}: not UTF-8 ({error.reason}, byte {error.start} of the line)", error)
            return None

    def _piece(self, place: int, text: str) -> Document:
        id = f"{self.file.relative}:{place}"
        return Document(id, text, str(self.file.path), place, {}, self.number, self.errors.count)

    def _json_lines(self, after: int) -> Iterator[Document]:
        for place, line in self._numbered_lines(after):
            if line is None:
                self._too_long(f"line {place}: a line")
            elif line.strip() and (document := self._parse(line, place)) is not None:
                yield document

    def _parse(self, line: bytes, place: int) -> Document | None:
        try:
            record = _read_json(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            self._fault(f"line {place}: not UTF-8 ({error.reason}, byte {error.start} of the line)", error)
            return None
        except (ValueError, RecursionError) as error:
            self._fault(f"line {place}: invalid JSON: {error}{self._layout()}", error)
            return None
        if not isinstance(record, dict):
            self._fault(f"line {place}: a JSON {_kind(record)} where an object is needed{self._layout()}")
            return None
        # Valid UTF-8 has no lone surrogates: only an escape can produce one.
        return self._document(place, record, "line", may_hold_surrogates=b"\\u" in line)

    def _layout(self) -> str:
        return "; a .json file is read as JSON lines, one object a line" if self.file.kind == ".json" else ""

    def _parquet(self, after: int) -> Iterator[Document]:
        place = after
        try:
            with pq.ParquetFile(self.file.path, page_checksum_verification=True) as table:
                columns = self._columns(table.schema_arrow)
                group, skipped = first_group(table.metadata, after)
                for batch in self._batches(table, range(group, table.num_row_groups), columns):
                    if (unread := skipped + batch.num_rows - after) <= 0:
                        skipped += batch.num_rows
                        continue
                    batch = batch.slice(batch.num_rows - unread) if skipped < after else batch
                    skipped = after
                    for values in zip(*(values_of(column_of(batch, c)) for c in columns), strict=True):
                        place += 1
                        document = self._document(place, dict(zip(columns, values, strict=True)), "row")
                        if document is not None:
                            yield document
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._fault(f"after row {place}: a damaged or truncated Parquet file: {error}", error)

    def _batches(self, table: Any, groups: Iterable[int], columns: list[str]) -> Iterator[Any]:
        """Iterate over the rows of some groups, few at a time if they may be large."""
        for group in groups:
            facts = table.metadata.row_group(group)
            rows = rows_at_once(self.file.path, facts, columns, self._limit)
            yield from table.iter_batches(rows, [group], columns=columns)
            self.on_read(self.file.path.stat().st_size * facts.num_rows // max(1, table.metadata.num_rows))

    def _columns(self, schema: Any) -> list[str]:
        """The requested columns that a table has; metadata may be missing."""
        for column in self.fields.required:
            if not has_column(schema, column):
                flag = "text_field" if column == self.fields.text else "id_field"
                raise no_column(self.file.path, column, flag, schema)
        if (count := schema.names.count(self.fields.text)) > 1:
            raise ValueError(
                f"{self.file.path} has {count} columns named {self.fields.text!r} (--text_field), any of which could "
                "be the text: rename the others in the file"
            )
        return [c for c in self.fields.all if has_column(schema, c)]

    def _hub(self, after: int) -> Iterator[Document]:
        assert self.file.hub is not None
        required = [*self.fields.required, *self.fields.metadata]  # the shards of a dataset have the same columns
        for place, record in enumerate(self.file.hub.rows(after, required, self.fields.id), after + 1):
            document = self._document(place, record, "row")
            if document is not None:
                yield document

    def _document(
        self, place: int, record: dict[str, Any], unit: str, *, may_hold_surrogates: bool = True
    ) -> Document | None:
        where, name = f"{unit} {place}", self.fields.text
        text = _field(record, name)
        if isinstance(text, bytes):
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError as error:
                self._fault(f"{where}: not UTF-8 ({error.reason})", error)
                return None
        if not isinstance(text, str):
            if text is None and not _holds(record, name):
                keys = ", ".join(map(repr, list(record)[:8])) or "none"
                self._fault(f"{where}: no field {name!r} (--text_field); its fields: {keys}")
            else:
                inside = f"; give one of its own fields, such as {name}.{next(iter(text))}" if _has_keys(text) else ""
                self._fault(f"{where}: the field {name!r} holds a JSON {_kind(text)}, not text{inside}")
            return None
        if may_hold_surrogates and not _is_unicode(text):
            self._fault(f"{where}: the field {name!r} contains an unpaired surrogate, which is not valid Unicode")
            return None
        if 4 * len(text) > self._limit and len(text.encode()) > self._limit:
            self._too_long(f"{where}: a text")
            return None
        id = _as_text(_field(record, self.fields.id))
        if id is None:
            if self.fields.require_id:
                self._fault(f"{where}: no field {self.fields.id!r} (--id_field)")
                return None
            id = f"{self.file.relative}:{place}"
        meta = {m: value for m in self.fields.metadata if (value := _as_text(_field(record, m))) is not None}
        return Document(id, text, str(self.file.path), place, meta, self.number, self.errors.count)


def _read_json(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except ValueError:  # a number of thousands of digits, which Python rejects by default
        return json.loads(text, parse_int=str)


def check_metadata(files: Sequence[TextFile], metadata: Sequence[str]) -> None:
    """Raise ValueError for a metadata column missing from all of some Parquet files, before they are read.

    If there are other kinds of files, only reading them can tell.
    """
    missing = list(metadata)
    if any(f.kind != PARQUET for f in files):
        return
    for file in files:
        if not missing:
            return
        try:
            schema = pq.read_schema(file.path)
        except (pa.ArrowException, OSError):  # reading it will raise or skip
            return
        missing = [m for m in missing if not has_column(schema, m)]
    if missing:
        raise no_column(file.path, missing[0], "metadata", schema)


def _field(record: dict[str, Any], name: str) -> Any:
    """The value of a field, possibly nested (`translation.de`); None if missing."""
    if name in record:
        return record[name]
    head, _, rest = name.partition(".")
    inner = record.get(head) if rest else None
    return _field(inner, rest) if isinstance(inner, dict) else None


def _holds(record: dict[str, Any], name: str) -> bool:
    """Whether a record has a field, even if null."""
    if name in record:
        return True
    head, _, rest = name.partition(".")
    inner = record.get(head) if rest else None
    return isinstance(inner, dict) and _holds(inner, rest)


def _has_keys(value: Any) -> bool:
    return isinstance(value, dict) and bool(value)


def _as_text(value: Any) -> str | None:
    """An id or metadata value of any type as text; None stays None."""
    if value is None:
        return None
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return value.hex()
    try:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, TypeError, RecursionError):  # nested too deeply, or keys not allowed in JSON
        return None
    return text if _is_unicode(text) else text.encode("utf-8", "backslashreplace").decode("utf-8")


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
