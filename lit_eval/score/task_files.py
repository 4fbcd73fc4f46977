"""Task files: JSON lines, one item each, whose fields determine its kind; and folders of them.

| kind | fields |
|---|---|
| `pairs` | `sentence_good`, `sentence_bad` (BLiMP) |
| `choice` | `context` or `question`, `choices`, `label` or `answer` |
| `cloze` | `text` with a blank `___`, `options`, `label` or `answer` |
| `last_word` | `text` (LAMBADA) |

A label is a number from 0, the text of a choice, or its letter (A is 0). `delimiter` of an item is the text before a
sentence of a pair and between a context and its choice; by default a space, as in lm-evaluation-harness. GROUPS are
optional. Other fields are ignored.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lit_data.corpus.streams import DamagedError, chunks_of, lines_of
from lit_eval.spacing import evenly_spaced
from lit_files.reading import check_unicode, regular

Kind = Literal["pairs", "choice", "cloze", "last_word"]
BLANK = "___"
SUFFIXES = (".jsonl", ".json", ".jsonlines")
COMPRESSED = (".gz", ".zst", ".zstd")
GROUPS = {
    "phenomenon": ("phenomenon", "linguistics_term"),
    "paradigm": ("UID", "paradigm"),
    "field": ("field",),
    "category": ("category", "subject"),
}
"""The name of a grouping, and the fields that may hold an item's group."""


@dataclass(frozen=True)
class Item:
    """One item.

    Attributes:
        candidates: (context, continuation) of each; the model chooses the most probable continuation.
        label: number of the right candidate.
        choices: the text of each candidate whose length normalises its score.
        groups: the item's group by grouping: {"phenomenon": "anaphor_agreement"}.
    """

    candidates: tuple[tuple[str, str], ...]
    label: int
    choices: tuple[str, ...]
    groups: dict[str, str]


@dataclass(frozen=True)
class Task:
    """Items of one kind.

    Attributes:
        file: absolute path of the file or folder; for a task that comes with the code, its module.
        sha256: of the content of the file or files.
    """

    name: str
    kind: Kind
    items: list[Item]
    file: str
    sha256: str

    def evenly_spaced(self, n: int) -> Task:
        """The task with `n` of its items, evenly spaced; all of them if it has fewer."""
        return dataclasses.replace(self, items=list(evenly_spaced(self.items, n)))


def is_task_file(path: Path) -> bool:
    """Whether the name is that of a task file."""
    name = path.name.lower()
    name = next((name.removesuffix(c) for c in COMPRESSED if name.endswith(c)), name)
    return name.endswith(SUFFIXES) and not name.startswith(".")


def read_task(path: str | Path) -> Task:
    """Read a task file, or all task files of a folder as one task, whose items are then grouped by `file`.

    Every line is checked. Raises ValueError naming the file, the line and the fault, FileNotFoundError.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no task file or folder {path}")
    files = [path]
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.is_file() and is_task_file(p))
        if not files:
            raise ValueError(f"{path} holds no task file ({', '.join(SUFFIXES)})")
    digest = hashlib.sha256()
    items: list[Item] = []
    kinds: dict[Kind, Path] = {}
    for file in files:
        kind, found = _read_file(file, digest, file != path)
        kinds.setdefault(kind, file)
        items += found
    if len(kinds) > 1:
        (one, first), (other, second) = list(kinds.items())[:2]
        raise ValueError(
            f"{path} holds items of several kinds, {one} in {first} and {other} in {second}: name its files one by one"
        )
    return Task(_stem(path), next(iter(kinds)), items, str(path.resolve()), digest.hexdigest())


def task_of_records(records: Sequence[dict[str, Any]], name: str, origin: str) -> Task:
    """A task of records with the fields of a line of a task file.

    Args:
        origin: what `Task.file` says.

    Raises ValueError naming the record and the fault.
    """
    kind: Kind | None = None
    items = []
    for number, record in enumerate(records, start=1):
        try:
            kind, item = _read_item(record, kind)
        except ValueError as error:
            raise ValueError(f"{origin}, item {number}: {error}") from error
        items.append(item)
    if kind is None:
        raise ValueError(f"{origin} has no item")
    digest = hashlib.sha256(json.dumps(list(records), ensure_ascii=False, sort_keys=True).encode())
    return Task(name, kind, items, origin, digest.hexdigest())


def _stem(path: Path) -> str:
    return path.name if path.is_dir() else path.name.split(".")[0] or path.name


def _read_file(file: Path, digest: Any, grouped: bool) -> tuple[Kind, list[Item]]:
    kind: Kind | None = None
    items: list[Item] = []
    for number, record in records_of(file, digest):
        try:
            kind, item = _read_item(record, kind, {"file": _stem(file)} if grouped else {})
        except ValueError as error:
            raise ValueError(f"{file}, line {number}: {error}") from error
        items.append(item)
    if kind is None:
        raise ValueError(f"{file} is empty: a task file has one JSON object a line")
    return kind, items


def _read_item(record: dict[str, Any], before: Kind | None, groups: dict[str, str] | None = None) -> tuple[Kind, Item]:
    """The kind of an item, which must be that of those before it, and the item."""
    kind = kind_of(record)
    if before is not None and kind != before:
        raise ValueError(f"an item of kind {kind}, and those before it are {before}")
    return kind, _READ[kind](record, groups or {})


def records_of(file: Path, digest: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of each line that is not blank; the file's bytes are added to the digest."""
    suffix = next((c for c in COMPRESSED if file.name.lower().endswith(c)), "")
    try:
        for number, line in enumerate(lines_of(chunks_of(regular(file), suffix.removeprefix("."))), start=1):
            assert line is not None
            digest.update(line + b"\n")
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                record = json.loads(text) if text.strip() else None
            except UnicodeDecodeError as error:
                raise ValueError(f"{file}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from error
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{file}, line {number}: not JSON ({error})") from error
            if not text.strip():
                continue
            if not isinstance(record, dict):
                raise ValueError(f"{file}, line {number}: expected a JSON object")
            yield number, record
    except DamagedError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror or error}") from error


def kind_of(record: dict[str, Any]) -> Kind:
    """The kind of an item, by its fields. Raises ValueError if they are those of none."""
    if "sentence_good" in record or "sentence_bad" in record:
        return "pairs"
    if "options" in record:
        return "cloze"
    if "choices" in record:
        return "choice"
    if "text" in record:
        return "last_word"
    raise ValueError(
        f"no known kind of item has the fields {', '.join(map(repr, record)) or '(none)'}: expected sentence_good and "
        "sentence_bad; context, choices and label; text, options and label; or text"
    )


def _pair(record: dict[str, Any], groups: dict[str, str]) -> Item:
    good, bad = (string_field(record, name) for name in ("sentence_good", "sentence_bad"))
    if good == bad:
        raise ValueError("sentence_good and sentence_bad are the same")
    before = _delimiter(record)
    return Item((("", before + good), ("", before + bad)), 0, (good, bad), _groups(record, groups))


def _choice(record: dict[str, Any], groups: dict[str, str]) -> Item:
    if "context" in record and "question" in record:
        raise ValueError("both 'context' and 'question': write all that precedes a choice into 'context'")
    context = string_field(record, "context" if "context" in record else "question", empty=True)
    choices = string_fields(record, "choices")
    between = _delimiter(record)
    candidates = tuple((context, between + choice) for choice in choices)
    return Item(candidates, _label(record, choices), choices, _groups(record, groups))


def _cloze(record: dict[str, Any], groups: dict[str, str]) -> Item:
    before, blank, behind = string_field(record, "text").partition(BLANK)
    if not blank or BLANK in behind.lstrip("_"):
        raise ValueError(f"'text' needs one blank {BLANK}")
    behind = behind.lstrip("_")  # a longer blank
    options = string_fields(record, "options")
    candidates = tuple((before, option + behind) for option in options)
    return Item(candidates, _label(record, options), options, _groups(record, groups))


def _last_word(record: dict[str, Any], groups: dict[str, str]) -> Item:
    # As in lambada_openai of lm-evaluation-harness.
    context, _, word = string_field(record, "text").rpartition(" ")
    if not context.strip() or not word.strip():
        raise ValueError("'text' needs at least two words, and no space at its end: the last word is to be predicted")
    return Item(((context, " " + word),), 0, (word,), _groups(record, groups))


_READ: dict[Kind, Callable[[dict[str, Any], dict[str, str]], Item]] = {
    "pairs": _pair,
    "choice": _choice,
    "cloze": _cloze,
    "last_word": _last_word,
}


def string_field(record: dict[str, Any], name: str, empty: bool = False) -> str:
    if name not in record:
        raise ValueError(f"the field {name!r} is missing")
    value = record[name]
    if not isinstance(value, str):
        raise ValueError(f"{name!r} is {_shown(value)}; it must be a string")
    if not value.strip() and not empty:
        raise ValueError(f"{name!r} is empty")
    try:
        return check_unicode(value)
    except ValueError as error:
        raise ValueError(f"{name!r}: {error}") from None


def string_fields(record: dict[str, Any], name: str) -> tuple[str, ...]:
    values = record.get(name)
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{name!r} is {_shown(values)}; it must be a list of at least two strings")
    return tuple(string_field({f"{name}[{i}]": value}, f"{name}[{i}]") for i, value in enumerate(values))


def _label(record: dict[str, Any], choices: tuple[str, ...]) -> int:
    name = "label" if "label" in record else "answer"
    if name not in record:
        raise ValueError("the field 'label' (or 'answer') is missing")
    value = record[name]
    if isinstance(value, str):
        if value in choices:
            return choices.index(value)
        letter = ord(value.upper()) - ord("A") if len(value) == 1 else -1
        if 0 <= letter < len(choices):
            return letter
    elif isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(choices):
        return value
    raise ValueError(
        f"{name!r} is {_shown(value)}; it must be one of the {len(choices)} choices: its text, its number from 0 to "
        f"{len(choices) - 1}, or its letter"
    )


def _delimiter(record: dict[str, Any]) -> str:
    return string_field(record, "delimiter", empty=True) if "delimiter" in record else " "


def _groups(record: dict[str, Any], given: dict[str, str]) -> dict[str, str]:
    groups = dict(given)
    for by, fields in GROUPS.items():
        value = next((record[name] for name in fields if record.get(name) is not None), None)
        if value is not None:
            groups[by] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return groups


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
