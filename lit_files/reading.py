"""Reads files that may be damaged or not regular files: every fault raises an error that names the file.

Only regular files are opened: a named pipe or a device could block or never end. JSON is read into a dataclass that is
its schema, so that a wrong type is found when the file is read, not when the value is used.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import stat
import types
import typing
from pathlib import Path
from typing import Any, BinaryIO, Literal, TypeVar

from lit_files.platform import READ_FLAGS

T = TypeVar("T")

MAX_TEXT_BYTES = 256 << 20  # limit of a file parsed at once; the largest tokenizers have 40 MB
MAX_DEPTH = 64  # of nested lists and objects
INT64 = 1 << 63

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a character device",
    stat.S_IFBLK: "a block device",
    stat.S_IFSOCK: "a socket",
}


def regular(path: str | Path) -> Path:
    """Return the path, for a library to open, if it is a regular file.

    Raises FileNotFoundError if there is nothing, ValueError for a named pipe, a device, a socket or a folder.
    """
    _check_kind(path, os.stat(path))
    return Path(path)


def open_regular(path: str | Path) -> BinaryIO:
    """Open a file for reading bytes; raises as `regular` does, and never waits for a writer of a pipe."""
    _check_kind(path, os.stat(path))  # opening some devices has side effects
    descriptor = os.open(path, READ_FLAGS)
    try:
        _check_kind(path, os.fstat(descriptor))
    except ValueError:
        os.close(descriptor)
        raise
    return open(descriptor, "rb", buffering=0)  # a FileIO


def _check_kind(path: str | Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        kind = _KINDS.get(stat.S_IFMT(facts.st_mode), "something else")
        raise ValueError(f"{path} is {kind}, not a regular file")


def read_bytes(path: str | Path, most: int = MAX_TEXT_BYTES) -> bytes:
    """Read a file that is parsed at once. Raises ValueError if it has more than `most` bytes."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise ValueError(f"{path} has {size} bytes; a file of its kind has at most {most}")
        content = bytearray()
        while piece := file.read(size + 1 - len(content)):
            content += piece
            if len(content) > size:
                break
    return bytes(content)


def read_text(path: str | Path) -> str:
    """Read a UTF-8 file. Raises ValueError naming the file if it is not valid UTF-8."""
    try:
        return read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is damaged: it is not UTF-8 text ({error.reason} at byte {error.start})") from error


def check_unicode(text: str) -> str:
    """Return the text. Raises ValueError for an unpaired surrogate: JSON can express one, Unicode does not allow it."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"character {error.start} is an unpaired surrogate, which is not valid Unicode") from None
    return text


def first_line(error: BaseException) -> str:
    """The first line of an error's message; the name of its type if it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def parse_json(text: str | bytes, source: str | Path) -> Any:
    """Parse a JSON text. Raises ValueError that names `source`."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, no Unicode, numbers of thousands of digits; deep nesting
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else f"it is not JSON ({error})"
        raise ValueError(f"{source} is damaged: {reason}") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file of any structure (see `read_dataclass`). Raises ValueError that names the file."""
    return parse_json(read_bytes(path), path)


def read_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file, which must be an object. Raises ValueError that names the file."""
    return as_object(read_json(path), path)


def read_foreign_object(path: str | Path) -> dict[str, Any]:
    """Read a JSON file of another program, which must be an object of bounded depth. Its whole numbers may be of any
    size: transformers writes 10^30 for an unlimited length. Raises ValueError that names the file."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is damaged: it must be a JSON object")
    try:
        _check_plain(content, "", MAX_DEPTH, any_number=True)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return content


def as_object(value: Any, source: str | Path) -> dict[str, Any]:
    """Check that a value is a JSON object of bounded depth and numbers. Raises ValueError that names `source`."""
    return build(dict[str, Any], value, source)


def read_dataclass(kind: type[T], path: str | Path) -> T:
    """Read a JSON file into a dataclass. Raises ValueError naming the file and the fault."""
    return build(kind, read_json(path), path)


def build(kind: type[T], value: Any, source: str | Path) -> T:
    """Convert a JSON value to an annotated type: dataclasses, containers, unions, literals, numbers, strings.

    Integers must fit int64. Dataclass fields without a default are required, unknown fields are errors. Raises
    ValueError that names `source` and where in it the fault is.
    """
    try:
        return typing.cast(T, _build(kind, value, ""))
    except ValueError as error:
        raise ValueError(f"{source} is damaged: {error}") from error


def _build(kind: Any, value: Any, where: str) -> Any:
    if kind is Any:
        _check_plain(value, where, MAX_DEPTH)
        return value
    if dataclasses.is_dataclass(kind):
        return _build_dataclass(kind, value, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _build_union(arguments, value, where)
    if origin is Literal and value in arguments and type(value) in {type(a) for a in arguments}:
        return value
    if (origin or kind) is list and isinstance(value, list):
        of = arguments[0] if arguments else Any
        return [item if _is_leaf(of, item) else _build(of, item, f"{where}[{i}]") for i, item in enumerate(value)]
    if (origin or kind) is tuple and isinstance(value, list):
        if arguments[-1] is Ellipsis:
            return tuple(_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
        if len(arguments) == len(value):
            return tuple(_build(of, item, f"{where}[{i}]") for i, (of, item) in enumerate(zip(arguments, value)))  # noqa: B905
    if (origin or kind) is dict and isinstance(value, dict):
        of = arguments[1] if arguments else Any
        return {
            key: item if _is_leaf(of, item) else _build(of, item, f"{where}.{key}" if where else key)
            for key, item in value.items()
        }
    if _is_leaf(kind, value):
        return value
    if kind is float and (isinstance(value, float) or (type(value) is int and -INT64 <= value < INT64)):
        return float(value)
    raise _mismatch(kind, value, where)


def _is_leaf(kind: Any, value: Any) -> bool:
    """Whether the value already has the type. Checked first: manifests have tens of thousands of leaves."""
    if kind is int:
        return type(value) is int and -INT64 <= value < INT64
    return kind in (str, bool, type(None)) and type(value) is kind


def _build_dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _mismatch(kind, value, where)
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    if unknown := sorted(set(value) - set(fields)):
        raise ValueError(f"{_at(where)}unknown field {unknown[0]!r:.80}")
    types_of = _types_of(kind)
    given = {
        name: v if _is_leaf(types_of[name], v) else _build(types_of[name], v, f"{where}.{name}" if where else name)
        for name, v in value.items()
    }
    for name, field in fields.items():
        required = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if required and name not in given:
            raise ValueError(f"{_at(where)}the field {name!r} is missing")
    return kind(**given)


@functools.cache
def _types_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _build_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        try:
            return _build(kind, value, where)
        except ValueError as error:
            first = error
    if len(kinds) == 2 and type(None) in kinds and value is not None:  # report the inner fault
        return _build(next(k for k in kinds if k is not type(None)), value, where)
    raise first


def _check_plain(value: Any, where: str, depth: int, *, any_number: bool = False) -> None:
    if depth < 0:
        raise ValueError(f"{_at(where)[:80]}it is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_plain(item, where or str(key), depth - 1, any_number=any_number)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, where, depth - 1, any_number=any_number)
    elif not any_number and isinstance(value, int) and not -INT64 <= value < INT64:
        raise ValueError(f"{_at(where)}a whole number beyond 64 bits")


def _at(where: str) -> str:
    return f"{where}: " if where else ""


def _mismatch(kind: Any, value: Any, where: str) -> ValueError:
    names = {
        int: "a whole number below 2^63", float: "a number", str: "a string", bool: "true or false",
        type(None): "null",
    }  # fmt: skip
    origin = typing.get_origin(kind) or kind
    if origin is Literal:
        wanted = "one of " + ", ".join(map(repr, typing.get_args(kind)))
    elif origin is tuple and Ellipsis not in typing.get_args(kind):
        wanted = f"a list of {len(typing.get_args(kind))}"
    elif origin in (list, tuple):
        wanted = "a list"
    else:
        wanted = names.get(kind, "an object")
    try:
        shown = json.dumps(value)
    except (ValueError, RecursionError):
        shown = f"a {type(value).__name__}"
    return ValueError(f"{where or 'the content'} is {shown[:60]}{'...' * (len(shown) > 60)}; it must be {wanted}")
