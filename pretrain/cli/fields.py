"""Turns dataclass fields into flags: name, type, default, attribute docstring as help. Standard library only."""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import itertools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED = dataclasses.MISSING


@dataclass(frozen=True)
class Flag:
    """A flag: dotted `name` without dashes, type, default (or REQUIRED), and the class whose docstrings describe it."""

    name: str
    kind: Any
    default: Any
    documented_by: type

    @property
    def help(self) -> str:
        return field_docs(self.documented_by).get(self.name.rpartition(".")[2], "")

    @property
    def placeholder(self) -> str:
        """Placeholder for the value in --help."""
        return placeholder(self.kind)

    @property
    def help_with_default(self) -> str:
        if self.default is REQUIRED or self.default is None or self.default in ([], (), {}):
            return self.help
        shown = str(self.default).lower() if isinstance(self.default, bool) else f"{self.default}"
        return f"{self.help} (default: {shown})"


def flags_of(fields: type, prefix: str = "") -> Iterator[Flag]:
    """The flags of a dataclass; those of a nested dataclass are prefixed with its field's name and a dot."""
    hints = get_type_hints(fields)
    for field in dataclasses.fields(fields):
        kind = hints[field.name]
        if is_section(kind):
            yield from flags_of(kind, f"{prefix}{field.name}.")
            continue
        default = field.default_factory() if field.default_factory is not REQUIRED else field.default
        yield Flag(f"{prefix}{field.name}", kind, default, field.metadata.get("documented_by", fields))


def is_section(kind: Any) -> bool:
    return isinstance(kind, type) and dataclasses.is_dataclass(kind)


@functools.cache
def field_docs(fields: type) -> dict[str, str]:
    """The attribute docstrings of a dataclass, each on one line."""
    body = _classes(inspect.getfile(fields))[fields.__name__].body
    return {
        field.target.id: " ".join(doc.value.value.split())
        for field, doc in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant) and isinstance(doc.value.value, str)
    }


@functools.cache
def _classes(path: str) -> dict[str, ast.ClassDef]:
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def without_none(kind: Any) -> tuple[Any, ...]:
    """The members of a union except None; for any other type, the type itself."""
    members = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    return tuple(member for member in members if member is not type(None))


def placeholder(kind: Any) -> str:
    """`int | None` -> N, `Literal["a", "b"]` -> a|b, `list[bool]` -> [true|false, ...]."""
    members = without_none(kind)
    if len(members) > 1:
        return "|".join(map(placeholder, members))
    kind, origin = members[0], get_origin(members[0])
    if origin is Literal:
        return "|".join(map(str, get_args(kind)))
    if origin in (list, tuple):
        return f"[{placeholder(get_args(kind)[0])}, ...]"
    if origin is dict:
        return f"{{NAME: {placeholder(get_args(kind)[1])}, ...}}"
    if is_section(kind):
        return "{" + ", ".join(field.name for field in dataclasses.fields(kind)) + "}"
    return {bool: "true|false", int: "N", float: "X", str: "TEXT", Path: "PATH"}.get(kind, "JSON")
