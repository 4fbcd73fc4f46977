"""Turns the training config of another trainer into one of ours: every key is mapped, or left out with the reason.

`foreign_formats.py` knows the trainers. This module reads the file, recognizes its trainer, refuses unknown keys, and
writes YAML for --config, with a comment above each setting whose meaning differs.
"""

from __future__ import annotations

import ast
import difflib
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lit_files.publish import write_text
from lit_files.reading import read_text
from pretrain.args import RunArgs, flat
from pretrain.cli.choices import parse_yaml
from pretrain.cli.command_line import OTHER_NAMES
from pretrain.cli.fields import flags_of
from pretrain.cli.run_parser import from_settings
from pretrain.convert.foreign_formats import FORMATS, Converted, Format, Source

ORDER = [flag.name for flag in flags_of(RunArgs)]


@dataclass(frozen=True)
class Conversion:
    """A converted config: the YAML text, the settings in it, and the keys left out, each with the reason."""

    title: str
    text: str
    settings: dict[str, Any]
    left_out: list[str]
    commands: list[str]
    """Commands that prepare the data, then the one that trains."""


def convert_config(path: Path, output: Path, source: str | None = None) -> Conversion:
    """Convert the config at `path` and write it to `output`, atomically.

    Args:
        path: YAML, or a Python script whose settings are constants at its top (TinyLlama, LLäMmlein).
        source: the trainer, a key of FORMATS. Default: recognized by the keys.

    Raises ValueError or OSError before anything is written: an output that exists, a file that is no config, a
    trainer that cannot be recognized, an unknown key (with the nearest known one), a value that ours cannot express.
    """
    if output.exists():
        raise ValueError(f"--output {output} exists already; give another name or remove it")
    raw = read_settings(path)
    values = flat(raw)
    kind = recognize(path, values) if source is None else FORMATS[source]
    check_known(path, values, kind)
    try:
        converted = kind.convert(Source(raw, values))
        settings = {key: value for key in ORDER if (value := converted.settings.get(key)) is not None}
        from_settings(nested(settings), path)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    commands = [*converted.commands, f"python pretrain/fabric_train.py --config {output}"]
    text = as_yaml(path, kind, settings, converted, commands)
    write_text(output, text)
    return Conversion(kind.title, text, settings, converted.left_out, commands)


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file, or the constants at the top level of a Python script."""
    text = read_text(path)
    if path.suffix == ".py":
        return constants(path, text)
    try:
        settings = parse_yaml(text)
    except ValueError as error:
        raise ValueError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict) or not settings:
        raise ValueError(f"{path} holds no settings (key: value)")
    return {str(key): value for key, value in settings.items()}


def constants(path: Path, text: str) -> dict[str, Any]:
    """The constants of a script, also those computed from earlier ones. Nothing of it is executed."""
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a Python script: {error}") from error
    found: dict[str, Any] = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            try:
                found[node.targets[0].id] = _evaluate(node.value, found)
            except (ValueError, TypeError, ArithmeticError, RecursionError):
                continue  # a logger, an object: no setting
    return found


_OPERATIONS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}


def _evaluate(node: ast.expr, names: dict[str, Any]) -> Any:
    """A literal, a name, arithmetic on numbers, or Path("a") / "b". Raises ValueError for anything else."""
    if isinstance(node, ast.Name) and node.id in names:
        return names[node.id]
    if (
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "Path"
        and len(node.args) == 1
    ):
        return Path(_evaluate(node.args[0], names))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        left, right = _evaluate(node.left, names), _evaluate(node.right, names)
        if isinstance(left, Path) and isinstance(node.op, ast.Div) and isinstance(right, str):
            return left / right
        if not (isinstance(left, int | float) and isinstance(right, int | float)):
            raise ValueError("arithmetic on other things than numbers")
        return _OPERATIONS[type(node.op)](left, right)
    return ast.literal_eval(node)


def recognize(path: Path, values: dict[str, Any]) -> Format:
    """The format that knows the most keys. Raises ValueError if several do, if it knows fewer than half, and for a
    config of this project.
    """
    known = {name: sum(kind.knows(key) for key in values) for name, kind in FORMATS.items()}
    most = max(known.values())
    best = [name for name, count in known.items() if count == most]
    if sum(key in ORDER for key in values) > most:
        raise ValueError(
            f"{path} is a config of this project already: give it to pretrain/fabric_train.py by --config {path}"
        )
    if 2 * most < len(values) or len(best) > 1:
        raise ValueError(
            f"{path} was not recognized: its keys do not show which trainer it is for; give --from {'|'.join(FORMATS)}"
        )
    return FORMATS[best[0]]


def check_known(path: Path, values: dict[str, Any], kind: Format) -> None:
    """Raise ValueError for a key that the trainer does not have, naming the nearest one it has."""
    for key in values:
        if not kind.knows(key):
            near = _nearest(key, kind)
            raise ValueError(f"{path}: {kind.title} has no key {key}{f'; the nearest is {near}' if near else ''}")


def _nearest(key: str, kind: Format) -> str | None:
    """The key with the same effect under another common name, else the one spelled most alike; None: none is near."""
    last = key.rpartition(".")[2]
    for name, rule in kind.keys.items():
        if rule.ours in OTHER_NAMES.get(last, ()):
            return name
    names = [name.removesuffix(".*") for name in kind.keys]
    ends = {name.rpartition(".")[2]: name for name in names}
    alike = difflib.get_close_matches(last, ends, n=1, cutoff=0.6)
    return ends[alike[0]] if alike else next(iter(difflib.get_close_matches(key, names, n=1, cutoff=0.6)), None)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """{"train.max_steps": 3} -> {"train": {"max_steps": 3}}."""
    out: dict[str, Any] = {}
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (out.setdefault(section, {}) if section else out)[name] = value
    return out


def as_yaml(path: Path, kind: Format, settings: dict[str, Any], converted: Converted, commands: list[str]) -> str:
    """The config: a header with its origin, commands and keys left out; then the settings by section, with comments."""
    lines = [
        f"# Converted from {path.name}, a config of {kind.title}. Train with the last of these commands; the others",
        "# prepare the data once. docs/coming-from.md describes the differences between the trainers.",
        *(f"#   {command}" for command in commands),
    ]
    if converted.left_out:
        lines += ["# Left out:", *(f"#   {line}" for line in converted.left_out)]
    section = ""
    for key, value in sorted(settings.items(), key=lambda item: "." in item[0]):
        before, _, name = key.rpartition(".")
        if before != section:
            section = before
            lines.append(f"{section}:")
        indent = "  " if section else ""
        lines += [f"{indent}# {note}" for note in converted.notes.get(key, [])]
        shown = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True, sort_keys=False)
        lines.append(f"{indent}{name}: {shown.strip().removesuffix('...').strip()}")
    return "\n".join(lines) + "\n"
