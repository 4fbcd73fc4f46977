"""Write docs/reference/ from the code: a page for each section of the trainer's settings, and pages for the scripts.

    python docs/write_reference.py          # after changing a flag, its help, or a script's description
    python docs/write_reference.py --check  # status 1 if a page does not match the code

The texts are those of --help: the attribute docstrings of the dataclasses, and the parsers of the scripts.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import itertools
import runpy
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from pretrain.args import RunArgs
from pretrain.cli.command_line import ScriptParser
from pretrain.cli.fields import REQUIRED, Flag, flags_of, is_section, without_none

FOLDER = ROOT / "docs" / "reference"
MAX_LINES = 200
GENERATED = "<!-- Written by docs/write_reference.py: change the docstrings in the code instead. -->\n\n"
# The unit of a setting, by its name or by the last word of it.
UNITS = {
    "data.synthetic.tokens": "words", "train.block_size": "tokens", "original_block_size": "tokens",
    "save.keep_every": "steps", "save.keep_last": "checkpoints", "profile.start": "steps", "save.at_words": "words",
    "guard.spike_rows": "log rows", "guard.spike_window": "log rows", "guard.max_rollbacks": "",
    "model.vocab_size": "ids", "data.synthetic.vocab_size": "ids", "model.sliding_window": "tokens",
    "model.attention_chunk_size": "tokens",
    "steps": "steps", "tokens": "tokens", "samples": "rows", "rows": "rows", "blocks": "blocks", "words": "words",
    "epochs": "epochs", "items": "items", "characters": "characters", "seconds": "s", "s": "s", "minutes": "min",
    "gb": "GB", "mb": "MB", "gib": "GiB",
}  # fmt: skip
PLAIN = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path"}
SCRIPTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "scripts-start": (
        "Scripts: whole pipelines, and before a run",
        ("quickstart", "babylm", "plan_run", "doctor", "convert_config", "quickstart_corpus"),
    ),
    "scripts-data": (
        "Scripts: text and tokens",
        ("prepare_data", "train_tokenizer", "import_tokens", "inspect_dataset", "count_words", "make_synthetic"),
    ),
    "scripts-runs": (
        "Scripts: checkpoints and teachers",
        ("inspect_checkpoint", "average_checkpoints", "cache_teacher"),
    ),
    "scripts-record": (
        "Scripts: the record of a run, and releases",
        ("trace_data", "replay", "publish"),
    ),
    "scripts-convert": (
        "Scripts: conversion",
        (
            *("convert_to_hf", "verify_hf", "convert_from_hf", "convert_checkpoint", "convert_legacy"),
            *("convert_to_gguf", "export_onnx", "quantize"),
        ),
    ),
    "scripts-evaluate": (
        "Scripts: evaluation, generation and reports",
        ("evaluate", "generate", "compare", "report", "serve"),
    ),
    "scripts-develop": (
        "Scripts: installation and development",
        ("install", "run_tests", "run_checks", "write_requirements"),
    ),
}


def cell(text: str) -> str:
    parts = text.replace("|", "\\|").split("`")  # every second one is code
    return "`".join(part if i % 2 else part.replace("<", "&lt;") for i, part in enumerate(parts)) or "–"


def row(*cells: str) -> str:
    return f"| {' | '.join(map(cell, cells))} |\n"


def table(*columns: str) -> str:
    return row(*columns) + f"|{'---|' * len(columns)}\n"


def type_of(kind: Any) -> str:
    """A type in words: `int | None` -> integer."""
    members = without_none(kind)
    if len(members) > 1:
        return ", or ".join(map(type_of, members))
    kind, origin = members[0], get_origin(members[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in get_args(kind))
    if origin in (list, tuple):
        return f"list of {type_of(get_args(kind)[0]).replace(', or ', ' or ')}"
    if origin is dict:
        return f"{{NAME: {type_of(get_args(kind)[1])}}}"
    if is_section(kind):
        return "{" + ", ".join(field.name for field in dataclasses.fields(kind)) + "}"
    return PLAIN.get(kind, "JSON")


def default_of(flag: Flag) -> str:
    if flag.default is REQUIRED:
        return "required"
    if flag.default is None or flag.default in ([], (), {}):
        return ""
    return f"`{str(flag.default).lower() if isinstance(flag.default, bool) else flag.default}`"


def entries_of(kind: Any) -> type | None:
    """The dataclass of the entries of a list, or of an optional group of settings."""
    for member in without_none(kind):
        inner = get_args(member)[0] if get_origin(member) is list else member
        if is_section(inner):
            return inner  # type: ignore[no-any-return]
    return None


def rows_of(flags: list[Flag], dashes: str) -> Iterator[str]:
    for flag in flags:
        unit = UNITS.get(flag.name, UNITS.get(flag.name.rpartition(".")[2].rpartition("_")[2], ""))
        yield row(f"`{dashes}{flag.name}`", type_of(flag.kind), unit, default_of(flag), flag.help)


def settings_page(name: str, about: str, flags: list[Flag]) -> str:
    text = f"# {name}\n\n{GENERATED}{about}\n\n"
    columns = ("type", "unit", "default", "meaning")
    text += table("flag", *columns) + "".join(rows_of(flags, "--"))
    for flag in flags:
        if (entries := entries_of(flag.kind)) is not None:
            text += f"\n`--{flag.name}`: {(entries.__doc__ or '').partition(chr(10))[0]}\n\n"
            text += table("key", *columns) + "".join(rows_of(list(flags_of(entries)), ""))
    return text


def settings_pages() -> dict[str, tuple[str, str]]:
    """Page name -> (its line in the index, its text)."""
    hints = get_type_hints(RunArgs)
    flags = list(flags_of(RunArgs))
    sections = [field.name for field in dataclasses.fields(RunArgs) if is_section(hints[field.name])]
    about = "Settings of a run that belong to no section: at the top level of a YAML config."
    without = [flag for flag in flags if flag.name.partition(".")[0] not in sections]
    pages = {"run": ("devices, precision, resuming, initialization", settings_page("The run", about, without))}
    for section in sections:
        title = (hints[section].__doc__ or "").partition("\n")[0]
        about = f"{title} In a YAML config, below the key `{section}`."
        own = [flag for flag in flags if flag.name.startswith(f"{section}.")]
        pages[section] = (title.rstrip("."), settings_page(f"--{section}.*", about, own))
    return pages


class Captured(Exception):
    """Raised by a script's parser instead of parsing."""


def parser_of(script: Path) -> argparse.ArgumentParser:
    """The parser that a script builds."""

    def capture(self: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        raise Captured(self)

    patches = (
        mock.patch.object(ScriptParser, "parse_known_args", capture),
        mock.patch.object(argparse.ArgumentParser, "parse_known_args", capture),
        mock.patch.object(signal, "signal"),
        mock.patch.object(sys, "argv", [str(script)]),
        mock.patch.object(sys, "path", list(sys.path)),
        mock.patch.object(sys, "excepthook"),
    )
    for patch in patches:
        patch.start()
    try:
        runpy.run_path(str(script), run_name="__main__")
    except Captured as captured:
        parser: argparse.ArgumentParser = captured.args[0]
        return parser
    finally:
        for patch in patches:
            patch.stop()
    raise AssertionError(f"{script} parses no arguments")


def description(text: str, level: str) -> str:
    """A script's docstring as Markdown: indented lines, and those that begin with `python`, are commands."""
    blocks = []
    lines = text.strip().splitlines()
    for is_code, some in itertools.groupby(lines, lambda line: line.startswith(("  ", "python "))):
        block = textwrap.dedent("\n".join(some)).strip("\n")
        if block:
            blocks.append(f"```\n{block}\n```" if is_code else block)
    return f"{level}\n\n" + "\n\n".join(blocks) + "\n"


def value_of(action: argparse.Action) -> str:
    if action.nargs == 0:
        return ""
    if action.choices is not None:
        shown = ", ".join(f"`{choice}`" for choice in action.choices)
    else:
        metavar = action.metavar or (action.dest.upper() if action.option_strings else action.dest)
        shown = metavar if isinstance(metavar, str) else " ".join(metavar)
    return f"{shown} ..." if action.nargs in ("*", "+") else shown


def help_of(action: argparse.Action) -> str:
    text = (action.help or "").replace("%%", "%")
    return f"{text} (required)" if action.required and action.option_strings else text


def groups_of(parser: argparse.ArgumentParser) -> Iterator[str]:
    """A table for each group of flags with a title of its own; the first holds the others."""
    groups: dict[str, list[argparse.Action]] = {"": []}
    for group in parser._action_groups:
        own = group.title if group.title not in ("positional arguments", "options") else ""
        for action in group._group_actions:
            if not isinstance(action, argparse._HelpAction | argparse._SubParsersAction):
                groups.setdefault(own or "", []).append(action)
    for title, actions in groups.items():
        if actions:
            names = (", ".join(action.option_strings) or value_of(action) for action in actions)
            rows = zip(names, actions, strict=True)
            head = f"\n{title[0].upper()}{title[1:]}:\n" if title else ""
            yield f"{head}\n{table('flag', 'value', 'meaning')}" + "".join(
                row(f"`{name}`", value_of(action) if action.option_strings else "", help_of(action))
                for name, action in rows
            )


def script_section(name: str) -> str:
    path = ROOT / "scripts" / f"{name}.py"
    doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")), clean=False) or ""
    text = description(doc, f"## {name}.py")
    if "ArgumentParser(" not in (source := path.read_text(encoding="utf-8")) and "ScriptParser(" not in source:
        return text
    parser = parser_of(path)
    if parser.epilog:
        text += f"\n{' '.join(parser.epilog.split())}\n"
    text += "".join(groups_of(parser))
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            for command, sub in action.choices.items():
                text += f"\n### {name}.py {command}\n\n{helps[command][0].upper()}{helps[command][1:]}.\n"
                text += "".join(groups_of(sub))
    return text


def script_pages() -> dict[str, tuple[str, str]]:
    listed = {name for _, names in SCRIPTS.values() for name in names}
    there = {path.stem for path in (ROOT / "scripts").glob("*.py")}
    if listed != there:
        raise SystemExit(f"SCRIPTS in docs/write_reference.py and scripts/ differ: {', '.join(sorted(listed ^ there))}")
    return {
        page: (", ".join(names), f"# {title}\n\n{GENERATED}" + "\n".join(map(script_section, names)))
        for page, (title, names) in SCRIPTS.items()
    }


def pages() -> dict[str, str]:
    """File name -> text of each page."""
    settings, scripts = settings_pages(), script_pages()
    index = f"# Reference\n\n{GENERATED}"
    index += "The settings of `pretrain/fabric_train.py`, as flags and as keys of a YAML config (`--config`):\n\n"
    index += table("section", "settings")
    index += "".join(row(f"[{name}]({name}.md)", line) for name, (line, _) in settings.items())
    index += "\nThe scripts, each with its flags:\n\n" + table("page", "scripts")
    index += "".join(row(f"[{SCRIPTS[name][0][9:]}]({name}.md)", line) for name, (line, _) in scripts.items())
    texts = {name: text for name, (_, text) in {**settings, **scripts}.items()}
    return {f"{name}.md": text for name, text in {"index": index, **texts}.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 if a page is out of date")
    check = parser.parse_args().check
    made = pages()
    for name, text in made.items():
        if len(text.splitlines()) > MAX_LINES:
            print(f"docs/reference/{name} has {len(text.splitlines())} lines; split its group, at most {MAX_LINES}")
            return 1
    old = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.md")}
    differ = sorted(name for name in {*made, *old} if made.get(name) != old.get(name))
    if check:
        if differ:
            print(f"docs/reference/ is out of date ({', '.join(differ)}): run python docs/write_reference.py")
        return 1 if differ else 0
    FOLDER.mkdir(exist_ok=True)
    for name in differ:
        if name in made:
            (FOLDER / name).write_text(made[name], encoding="utf-8")
        else:
            (FOLDER / name).unlink()
    print(f"docs/reference: {len(made)} pages, {len(differ)} changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
