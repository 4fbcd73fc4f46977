"""Resolves inputs to files, in a fixed order, and splits a list of files into parts."""

from __future__ import annotations

import glob
import itertools
import os
import re
import sys
from bisect import bisect_left
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from lit_data.corpus.hf_source import HubShard, parse_hub_dataset

TEXT_SUFFIXES = (".txt", ".train", ".dev", ".test")  # one document per file
LINE_SUFFIXES = (".jsonl", ".json", ".jsonlines")  # one document per line
COMPRESSED = (".gz", ".zst", ".zstd")
PARQUET = ".parquet"
SUFFIXES = (*(s + c for s in (*TEXT_SUFFIXES, *LINE_SUFFIXES) for c in ("", *COMPRESSED)), PARQUET)
LARGE_TEXT_BYTES = 1_000_000
TRAIN_NAMES = ("train", "training")
HELD_OUT_NAMES = ("dev", "devel", "val", "valid", "validation", "test", "eval", "evaluation", "heldout")
SUPPORTED = f"{', '.join((*TEXT_SUFFIXES, *LINE_SUFFIXES))} (each also with {', '.join(COMPRESSED)}), {PARQUET}"


@dataclass
class ReadErrors:
    """Collects skipped input: the number of faults and the first few, and files of other kinds in folders.

    `warnings` are about the inputs themselves.
    """

    count: int = 0
    first: list[str] = field(default_factory=list)
    ignored_files: int = 0
    ignored_first: list[str] = field(default_factory=list)
    keep: int = 5
    warnings: list[str] = field(default_factory=list)

    def add(self, message: str) -> None:
        self.count += 1
        if len(self.first) < self.keep:
            self.first.append(message)

    def print_warnings(self) -> None:
        """Print the first few warnings about the inputs, before any long work."""
        for warning in self.warnings[: self.keep]:
            print(f"warning: {warning}", file=sys.stderr, flush=True)
        if len(self.warnings) > self.keep:
            print(
                f"warning: and {len(self.warnings) - self.keep} more warnings like these", file=sys.stderr, flush=True
            )

    def ignore(self, file: Path) -> None:
        self.ignored_files += 1
        if len(self.ignored_first) < self.keep:
            self.ignored_first.append(str(file))


@dataclass(frozen=True)
class TextFile:
    """A file to read, or a shard of a Hugging Face dataset.

    Attributes:
        path: of the file; `hf:NAME@CONFIG:SPLIT` for a dataset, with `#SHARD` if it has several.
        relative: path relative to the input it was found under; documents without an id are named after it.
        suffix: one of those above, including compression; empty for a dataset.
        hub: the shard, if it is one.
    """

    path: Path
    relative: str
    suffix: str
    hub: HubShard | None = None

    @property
    def compression(self) -> str:
        """`gz`, `zst`, `zstd`, or nothing."""
        return next((c[1:] for c in COMPRESSED if self.suffix.endswith(c)), "")

    @property
    def kind(self) -> str:
        """The suffix without that of the compression."""
        return self.suffix.removesuffix(f".{self.compression}")

    @property
    def identity(self) -> Hashable:
        """Equal for two paths of one file, also through symbolic and hard links."""
        if self.hub is not None:
            return str(self.path)
        try:
            facts = os.stat(self.path)
        except OSError:  # reading it will raise the error
            return os.path.realpath(self.path)
        return facts.st_dev, facts.st_ino


def suffix_of(path: Path) -> str | None:
    """The supported suffix a file name ends with, or None."""
    name = path.name.lower()
    return next((s for s in SUFFIXES if name.endswith(s)), None)


def list_files(inputs: Iterable[str | Path | TextFile], errors: ReadErrors | None = None) -> list[TextFile]:
    """List the files of inputs, in the given order; those of a folder or pattern sorted.

    Each file is listed once, under its first name; the others are noted in `errors.warnings`.

    An input is a file, a folder, a pattern such as `corpus/**/*.jsonl.zst` (an existing path is never treated as one),
    `hf:NAME[@CONFIG][:SPLIT]`, or a TextFile, which is kept. Links are followed, each folder once; hidden files are
    skipped; files of other kinds in a folder are noted in `errors`.

    Raises:
        FileNotFoundError: no such path, or nothing matches a pattern.
        ValueError: an unknown suffix, a folder without text, a dataset that can't be opened.
    """
    errors = errors if errors is not None else ReadErrors()
    files: list[TextFile] = []
    for given in inputs:
        if isinstance(given, TextFile):
            files.append(given)
            continue
        dataset = parse_hub_dataset(str(given))
        path = Path(given)
        if dataset is not None:
            files.extend(TextFile(Path(s.name), s.name.removeprefix("hf:"), "", s) for s in dataset.shards())
        elif path.is_dir():
            files.extend(_require_text(_files_below(path, errors), path))
        elif path.exists():
            suffix = suffix_of(path)
            if suffix is None:
                raise ValueError(f"{path} is of an unknown type; text is read from {SUPPORTED}, and folders of these")
            files.append(TextFile(path, path.name, suffix))
        elif glob.has_magic(str(given)):
            files.extend(_require_text(_files_matching(str(given), errors), given))
        else:
            raise FileNotFoundError(f"{path} does not exist")
    for file in files:
        try:
            str(file.path).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"the file name {str(file.path)!r} is not valid UTF-8; rename the file") from None
    return _each_once(files, errors)


def check_output_is_outside(output: Path, inputs: Iterable[str], flag: str = "--output") -> None:
    """Raise ValueError if the output is inside an input folder, where the next call would read it as text."""
    for folder in inputs:
        if Path(folder).is_dir() and output.resolve().is_relative_to(Path(folder).resolve()):
            raise ValueError(
                f"{flag} {output} is inside the input folder {folder}, where the next call would read it as text: "
                "choose a folder outside it"
            )


def _each_once(files: Sequence[TextFile], errors: ReadErrors) -> list[TextFile]:
    kept: dict[Hashable, TextFile] = {}
    for file in files:
        first = kept.setdefault(file.identity, file)
        if first is not file:
            how = "is given twice" if first.path == file.path else f"is the same file as {first.path}"
            errors.warnings.append(f"{file.path} {how}; it is read once")
    return list(kept.values())


def train_and_held_out(files: Sequence[TextFile]) -> tuple[TextFile, TextFile] | None:
    """The first .train file and the first .dev or .test file, if there are both."""
    train = next((f for f in files if f.kind == ".train"), None)
    held_out = next((f for f in files if f.kind in (".dev", ".test")), None)
    return None if train is None or held_out is None else (train, held_out)


def mixed_split_names(files: Sequence[TextFile]) -> list[tuple[str, str]]:
    """Sibling folders or files named after training and held-out splits: (training, held-out)."""
    splits: dict[tuple[str, ...], dict[bool, str]] = {}  # by parent folder, files and folders separately
    for file in files:
        parts = file.path.parts if file.hub is None else ()
        for i, part in enumerate(parts):
            is_file = i == len(parts) - 1
            is_train = _is_train(part[: -len(file.suffix)] if is_file else part)
            if is_train is not None:
                key = (*parts[:i], "/") if is_file else parts[:i]
                splits.setdefault(key, {}).setdefault(is_train, str(Path(*parts[: i + 1])))
    return [(names[True], names[False]) for names in splits.values() if len(names) == 2]


def large_plain_text(files: Sequence[TextFile]) -> list[str]:
    """A warning if large plain-text files would be one document each."""
    sizes = [(f.path, f.path.stat().st_size) for f in files if f.kind in TEXT_SUFFIXES and f.path.exists()]
    large = [(path, size) for path, size in sizes if size > LARGE_TEXT_BYTES]
    if not large:
        return []
    more = f", and so are {len(large) - 1} more plain-text files over 1 MB" if len(large) > 1 else ""
    return [
        f"{large[0][0]} ({large[0][1] / 1e6:.1f} MB) is read as one document{more}; --split_documents line, "
        "blank_line or a separator splits it, --split_documents file keeps it as one"
    ]


def compressed_copies(files: Sequence[TextFile]) -> list[str]:
    """A warning for files that differ only by a compression suffix."""
    first: dict[str, Path] = {}
    pairs = (
        (first.setdefault(str(f.path).removesuffix(f".{f.compression}"), f.path), f.path) for f in files if not f.hub
    )
    return [
        f"{a} and {b} differ in their compression only; if they are copies of each other, leave one out"
        for a, b in pairs
        if a is not b
    ]


def _is_train(name: str) -> bool | None:
    """Whether a name indicates a training split (True) or a held-out one (False); None for neither."""
    words = re.findall(r"[a-z]+", name.lower())
    for word in (words[:1] + words[-1:]) if words else ():
        if word in TRAIN_NAMES or word in HELD_OUT_NAMES:
            return word in TRAIN_NAMES
    return None


def sizes_of(files: Sequence[TextFile]) -> list[int]:
    """Bytes of each file; dataset shards, of unknown size, count as the average file."""
    known = [None if file.hub else file.path.stat().st_size for file in files]
    measured = [size for size in known if size is not None]
    average = max(1, sum(measured) // len(measured)) if measured else 1
    return [average if size is None else size for size in known]


def part_of_files(files: Sequence[TextFile], part: int, n_parts: int) -> list[TextFile]:
    """The `part`-th (0-based) of `n_parts` contiguous ranges of files, of about equal size in bytes.

    Depends only on the files' order and sizes; the parts in order cover all files, and none is empty. Dataset shards,
    of unknown size, count as the average file.

    Raises:
        ValueError: no such part, or fewer files than parts.
    """
    if not 0 <= part < n_parts:
        raise ValueError(f"part {part} of {n_parts}: parts are numbered from 0 to {n_parts - 1}")
    if len(files) < n_parts:
        raise ValueError(
            f"{len(files)} files cannot be split into {n_parts} parts: reduce --parts or split the text into more files"
        )
    ends = list(itertools.accumulate(sizes_of(files)))
    cuts = [0]
    for number in range(1, n_parts):
        wanted = ends[-1] * number / n_parts
        after = bisect_left(ends, wanted)  # the file that contains the cut, which moves to the nearer end of the file
        before_it = ends[after - 1] if after else 0
        nearest = after if wanted - before_it < ends[after] - wanted else after + 1
        cuts.append(min(max(nearest, cuts[-1] + 1), len(files) - (n_parts - number)))
    cuts.append(len(files))
    return list(files[cuts[part] : cuts[part + 1]])


def _require_text(found: list[TextFile], given: str | Path) -> list[TextFile]:
    if not found:
        raise ValueError(f"{given} holds no text: none of its files ends in {SUPPORTED}")
    return found


def _files_below(folder: Path, errors: ReadErrors) -> list[TextFile]:
    found: list[TextFile] = []
    seen = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders):  # so that of two paths to a folder always the same one is used
            real = os.path.realpath(os.path.join(root, name))
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
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


def _files_matching(pattern: str, errors: ReadErrors) -> list[TextFile]:
    """Files matching a pattern, each once, named relative to the last literal folder of the pattern."""
    matches = sorted(glob.glob(pattern, recursive=True))
    if not matches:
        raise FileNotFoundError(f"no file matches {pattern}")
    fixed = itertools.takewhile(lambda part: not glob.has_magic(part), PurePosixPath(pattern).parts)
    root = Path(*fixed)
    found: dict[str, TextFile] = {}  # by link target
    for match in map(Path, matches):
        suffix = suffix_of(match)
        if match.is_dir():
            below = _files_below(match, errors)
        elif suffix is None:
            errors.ignore(match)
            continue
        else:
            below = [TextFile(match, match.name, suffix)]
        for file in below:
            named = TextFile(file.path, os.path.relpath(file.path, root), file.suffix)
            found.setdefault(os.path.realpath(file.path), named)
    return sorted(found.values(), key=lambda f: f.relative)
