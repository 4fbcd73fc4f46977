"""Documents from files of text: .txt (also .train, .dev, .test), .jsonl, .jsonl.zst, .parquet, and folders of them.

Read one at a time: memory holds the longest document, and for Parquet a row group's pages. Nothing is cleaned: line
ends, spaces and blank documents stay as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

OnError = Literal["stop", "skip"]

WHOLE_FILE_SUFFIXES = (".txt", ".train", ".dev", ".test")
SUFFIXES = (*WHOLE_FILE_SUFFIXES, ".jsonl", ".jsonl.zst", ".parquet")
SUPPORTED = ", ".join(SUFFIXES)
COMPRESSED_CHUNK_BYTES = 256  # a zstd block of 4 bytes can hold 128 KiB; still far faster than any tokenizer
MAX_WINDOW_BYTES = 1 << 31  # archives made with `zstd --long=31` are common; the default of 2^27 refuses them
ROWS_PER_BATCH = 64
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Document:
    """One text.

    Attributes:
        id: the document's own, or `relative-path:line` (relative path for a file that is one document).
        text: never changed on the way.
        source: path of the file, as given.
        place: line of a .jsonl or row of a .parquet, from 1; 0 where the file is one document.
        meta: those of the metadata fields that the document has, as text.
    """

    id: str
    text: str
    source: str
    place: int
    meta: dict[str, str]


@dataclass
class ReadErrors:
    """What was left out on the way: the number of faults and the first few, and files of other kinds in folders."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    ignored_files: int = 0
    ignored_first: list[str] = field(default_factory=list)
    keep: int = 5

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < self.keep:
            self.first.append(message)

    def ignore(self, file: Path) -> None:
        self.ignored_files += 1
        if len(self.ignored_first) < self.keep:
            self.ignored_first.append(str(file))


@dataclass(frozen=True)
class TextFile:
    """A file to read: its path, and its name relative to the input it was found under."""

    path: Path
    relative: str
    suffix: str


def suffix_of(path: Path) -> str | None:
    """The supported suffix a file name ends with, or None."""
    name = path.name.lower()
    return next((s for s in sorted(SUFFIXES, key=len, reverse=True) if name.endswith(s)), None)


def list_files(paths: Iterable[str | Path], errors: ReadErrors | None = None) -> list[TextFile]:
    """The files to read: inputs in the order given, folders recursively in sorted order.

    Links are followed, each folder once; hidden files are left out; files of other kinds in a folder are noted in
    `errors`. Raises FileNotFoundError for a missing path, ValueError for an unknown suffix or a folder without text.
    """
    files: list[TextFile] = []
    for given in map(Path, paths):
        if given.is_dir():
            found = _files_below(given, errors if errors is not None else ReadErrors())
            if not found:
                raise ValueError(f"{given} holds no text: none of its files ends in {SUPPORTED}")
            files.extend(found)
        elif not given.exists():
            raise FileNotFoundError(f"{given} does not exist")
        else:
            suffix = suffix_of(given)
            if suffix is None:
                raise ValueError(f"{given} is of an unknown kind; text is read from {SUPPORTED}, and folders of these")
            files.append(TextFile(given, given.name, suffix))
    for file in files:
        if not _is_unicode(str(file.path)):
            raise ValueError(f"the file name {str(file.path)!r} is not valid UTF-8; rename the file")
    return files


def _files_below(folder: Path, errors: ReadErrors) -> list[TextFile]:
    found: list[TextFile] = []
    seen = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        kept = []
        for name in folders:
            real = os.path.realpath(os.path.join(root, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = sorted(kept)
        for name in names:
            path = Path(root, name)
            if name.startswith("."):
                continue
            suffix = suffix_of(path)
            if suffix is None:
                errors.ignore(path)
            else:
                found.append(TextFile(path, path.relative_to(folder).as_posix(), suffix))
    return sorted(found, key=lambda f: f.relative)


def read_documents(
    paths: Sequence[str | Path],
    *,
    on_error: OnError = "stop",
    text_field: str = "text",
    id_field: str = "id",
    metadata: Sequence[str] = (),
    errors: ReadErrors | None = None,
) -> Iterator[Document]:
    """Read the documents of files and folders in order.

    Args:
        on_error: what to do about invalid UTF-8 or JSON, a line without text, a damaged file: `stop` raises a
            ValueError that names file and line, `skip` notes it in `errors` and goes on with the next document
            (after damage to a compressed file: with the next file).
        text_field: key (JSON) or column (Parquet) of the text.
        id_field: key or column of the id; documents without one are named `relative-path:line`.
        metadata: further keys or columns to carry along; values that are no text are written as JSON.
        errors: collects what was left out.

    Raises:
        FileNotFoundError: a path does not exist.
        ValueError: at once for paths that can't be read; while iterating for faults in the files.
    """
    if on_error not in ("stop", "skip"):
        raise ValueError(f"--on_error {on_error}: choose stop or skip")
    errors = errors if errors is not None else ReadErrors()
    reader = _Reader(on_error, text_field, id_field, tuple(metadata), errors)
    files = list_files(paths, errors)
    return (document for file in files for document in reader.read(file))


@dataclass(frozen=True)
class _Reader:
    on_error: OnError
    text_field: str
    id_field: str
    metadata: tuple[str, ...]
    errors: ReadErrors

    def read(self, file: TextFile) -> Iterator[Document]:
        try:
            if file.suffix in WHOLE_FILE_SUFFIXES:
                yield from self._whole_file(file)
            elif file.suffix == ".parquet":
                yield from self._parquet(file)
            else:
                yield from self._json_lines(file)
        except OSError as error:  # a disk or a permission: nothing to be skipped
            raise ValueError(f"{file.path} cannot be read: {error.strerror or error}") from error

    def _fault(self, message: str, cause: Exception | None = None) -> None:
        if self.on_error == "stop":
            raise ValueError(f"{message} (--on_error skip leaves such documents out)") from cause
        self.errors.add(message)

    def _whole_file(self, file: TextFile) -> Iterator[Document]:
        data = file.path.read_bytes()
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            line = data.count(b"\n", 0, error.start) + 1
            self._fault(f"{file.path}, line {line}: not UTF-8 ({error.reason}, byte {error.start} of the file)", error)
            return
        yield Document(file.relative, text, str(file.path), 0, {})

    def _json_lines(self, file: TextFile) -> Iterator[Document]:
        lines = _lines_of(_decompressed(file.path) if file.suffix == ".jsonl.zst" else _chunks_of(file.path))
        place = 0
        while True:
            try:
                line = next(lines, None)
            except _Damaged as error:
                self._fault(f"{file.path}, after line {place}: {error}", error)
                return
            if line is None:
                return
            place += 1
            if place == 1:
                line = line.removeprefix(UTF8_BOM)
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                self._fault(
                    f"{file.path}, line {place}: not UTF-8 ({error.reason}, byte {error.start} of the line)", error
                )
                continue
            except (ValueError, RecursionError) as error:
                self._fault(f"{file.path}, line {place}: invalid JSON: {error}", error)
                continue
            if not isinstance(record, dict):
                self._fault(f"{file.path}, line {place}: a JSON {_kind(record)} where an object is needed")
                continue
            document = self._document(file, place, record, "line")
            if document is not None:
                yield document

    def _parquet(self, file: TextFile) -> Iterator[Document]:
        place = 0
        try:
            with pq.ParquetFile(file.path, page_checksum_verification=True) as table:
                names = table.schema_arrow.names
                for column in (self.text_field, *self.metadata):
                    if column not in names:
                        flag = "text_field" if column == self.text_field else "metadata"
                        have = ", ".join(map(str, names))
                        raise ValueError(f"{file.path} has no column {column!r} (--{flag}); its columns are {have}")
                columns = [c for c in dict.fromkeys((self.text_field, self.id_field, *self.metadata)) if c in names]
                for batch in table.iter_batches(batch_size=ROWS_PER_BATCH, columns=columns):
                    for row in range(batch.num_rows):
                        place += 1
                        try:
                            record = {c: _parquet_value(batch.column(c)[row]) for c in columns}
                        except UnicodeDecodeError as error:
                            self._fault(f"{file.path}, row {place}: not UTF-8 ({error.reason})", error)
                            continue
                        document = self._document(file, place, record, "row")
                        if document is not None:
                            yield document
        except (pa.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            self._fault(f"{file.path}, after row {place}: a damaged or truncated Parquet file: {error}", error)

    def _document(self, file: TextFile, place: int, record: dict[str, Any], unit: str) -> Document | None:
        where = f"{file.path}, {unit} {place}"
        text = record.get(self.text_field)
        if not isinstance(text, str):
            if self.text_field not in record:
                keys = ", ".join(map(repr, list(record)[:8])) or "none"
                self._fault(f"{where}: no field {self.text_field!r} (--text_field); its fields: {keys}")
            else:
                self._fault(f"{where}: the field {self.text_field!r} holds a JSON {_kind(text)}, not text")
            return None
        given = record.get(self.id_field)
        id = f"{file.relative}:{place}" if given is None else _as_text(given)
        meta = {m: _as_text(record[m]) for m in self.metadata if record.get(m) is not None}
        for name, value in ((self.text_field, text), (self.id_field, id), *meta.items()):
            if not _is_unicode(value):
                self._fault(f"{where}: the field {name!r} holds half of a surrogate pair, which is no Unicode text")
                return None
        return Document(id, text, str(file.path), place, meta)


class _Damaged(Exception):
    """A compressed stream that ends early or does not decode."""


def _chunks_of(path: Path, chunk_bytes: int = 1 << 20) -> Iterator[bytes]:
    with open(path, "rb") as f:
        while chunk := f.read(chunk_bytes):
            yield chunk


def _decompressed(path: Path) -> Iterator[bytes]:
    """The content of a zstd file of one frame or several.

    zstandard's own stream reader takes a truncated file for a short one; here the end of each frame is looked at.
    """
    import zstandard  # only here: training, which needs the tokenizer copy of prepare.py, reads no text

    make = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES).decompressobj
    frame = make()
    started, any_frame = False, False
    for chunk in _chunks_of(path, COMPRESSED_CHUNK_BYTES):
        while chunk:
            started = any_frame = True
            try:
                data = frame.decompress(chunk)
            except zstandard.ZstdError as error:
                raise _Damaged(f"damaged, or no zstd file: {error}") from error
            if data:
                yield data
            chunk = b""
            if frame.eof:
                chunk, frame, started = frame.unused_data, make(), False
    if started or not any_frame:
        raise _Damaged("the zstd file is truncated; copy or download it again")


def _lines_of(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Split at newlines only: a JSON string may hold other line separators of Unicode. The last may lack its own."""
    parts: list[bytes] = []  # of the line that is not whole yet; joined once, so that long lines cost linear time
    for chunk in chunks:
        first, *rest = chunk.split(b"\n")
        parts.append(first)
        for line in rest:
            yield b"".join(parts)
            parts = [line]
    last = b"".join(parts)
    if last:
        yield last


def _parquet_value(scalar: Any) -> Any:
    value = scalar.as_py()
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
