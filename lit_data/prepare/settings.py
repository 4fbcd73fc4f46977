"""What a preparation is to make: the settings that decide the result, the files they apply to, the working folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from lit_data.corpus.files import (
    ReadErrors,
    TextFile,
    compressed_copies,
    list_files,
    mixed_split_names,
    part_of_files,
    train_and_held_out,
)
from lit_data.corpus.readers import MAX_DOCUMENT_MB, SPLITS, SplitDocuments, check_metadata
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_files.publish import create_json
from lit_files.reading import read_record

PLAN = "plan.json"
VERSION = 2  # 1 had no words
RESERVED_COLUMNS = (
    "self", "ids", "id", "source", "place", "bytes", "n_bytes", "words", "n_words", "number", "start", "tokens",
    "length",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """All that decides what a preparation writes. The names are the flags of scripts/prepare_data.py.

    Attributes:
        input: files, folders, patterns and datasets, see `lit_data.corpus.files.list_files`.
        tokenizer: folder or file, see `lit_data.tokenizers.tokenizer.open_tokenizer`; `eos_token` names its end of
            document.
        bos: each document begins with the tokenizer's BOS.
        special_tokens: names of special tokens in a document are encoded as the `text` they are, or `parse`d: as
            their ids.
        val_fraction: share of the documents (in the mean) that goes to val: those whose hash of (seed, id) says so.
        val_input: inputs that make up val instead. Without either there is only train.
        allow_mixed_splits: .train files and .dev or .test files may make up one dataset.
        require_id: a document without the field `id_field` is a fault.
        metadata: fields of the documents to keep in `docs.parquet`.
        shard_tokens: size of a shard.
        cleaner: a profile of `lit_data.corpus.cleaners`, or module:function.
        filter: the user's own filters, module:function.
        min_characters, max_characters: documents outside are left out (after cleaning; max 0: no limit).
        language, min_language_probability: languages (ISO 639-1) to keep; none keeps all.
        max_token_word_ratio: documents with more tokens a word are left out; 0: no limit.
        dedup: paragraphs that occurred before are left out: found `exact`ly in two passes, or by a `bloom` filter in
            one, in which a few new ones look old.
        dedup_min_characters: shorter paragraphs are always kept.
        bloom_paragraphs, bloom_false_positives: number of paragraphs the filter is made for, and the share of new
            ones that it may take for old ones when it is full.
        near_dedup: documents whose estimated Jaccard similarity to an earlier kept one is at least this are left out;
            0: none.
        parts: the inputs are cut into so many ranges of whole files, prepared one by one and merged.
        name: shards are called NAME-00000.
        split_documents, max_document_mb: see `lit_data.corpus.readers.read_documents`.
    """

    input: tuple[str, ...]
    tokenizer: str
    eos_token: str | None = None
    bos: bool = False
    special_tokens: Literal["text", "parse"] = "text"
    val_fraction: float | None = None
    val_input: tuple[str, ...] | None = None
    seed: int = 0
    text_field: str = "text"
    id_field: str = "id"
    require_id: bool = False
    metadata: tuple[str, ...] = ()
    shard_tokens: int = 1 << 31
    cleaner: str | None = None
    filter: tuple[str, ...] = ()
    min_characters: int = 0
    max_characters: int = 0
    language: tuple[str, ...] = ()
    min_language_probability: float = 0.5
    max_token_word_ratio: float = 0.0
    dedup: Literal["none", "exact", "bloom"] = "none"
    dedup_min_characters: int = 20
    bloom_paragraphs: int = 0
    bloom_false_positives: float = 1e-6
    near_dedup: float = 0.0
    parts: int = 1
    name: str = "data"
    split_documents: SplitDocuments = "file"
    max_document_mb: int = MAX_DOCUMENT_MB
    allow_mixed_splits: bool = False

    def __post_init__(self) -> None:
        _check(self)

    @property
    def sides(self) -> tuple[str, ...]:
        """The datasets that are written."""
        return ("train",) if self.val_fraction is None and self.val_input is None else ("train", "val")

    @property
    def needs_hashes(self) -> bool:
        """Whether a first pass over all text is needed."""
        return self.dedup == "exact" or self.near_dedup > 0


def _check(s: Settings) -> None:
    if s.val_fraction is not None and s.val_input is not None:
        raise ValueError("--val_fraction and --val_input exclude each other; give one of them")
    if s.val_fraction is not None and not 0 < s.val_fraction < 1:
        raise ValueError(f"--val_fraction {s.val_fraction}: give a share between 0 and 1, such as 0.01")
    for flag, least in (
        ("shard_tokens", 1), ("parts", 1), ("min_characters", 0), ("max_characters", 0), ("dedup_min_characters", 0),
        ("max_token_word_ratio", 0), ("bloom_paragraphs", 0), ("max_document_mb", 1),
    ):  # fmt: skip
        if not getattr(s, flag) >= least:
            raise ValueError(f"--{flag} {getattr(s, flag)}: at least {least} is needed")
    for column in s.metadata:
        if column in RESERVED_COLUMNS:
            raise ValueError(f"--metadata {column}: the name is taken; these are: {', '.join(RESERVED_COLUMNS)}")
    if len(set(s.metadata)) != len(s.metadata):
        raise ValueError(f"--metadata {' '.join(s.metadata)}: a name is given twice")
    if s.split_documents not in SPLITS:
        raise ValueError(f"--split_documents {s.split_documents}: choose one of {', '.join(SPLITS)}")
    if not 0 <= s.min_language_probability <= 1:
        raise ValueError(f"--min_language_probability {s.min_language_probability}: give one between 0 and 1")
    if s.special_tokens not in ("text", "parse"):
        raise ValueError(f"--special_tokens {s.special_tokens}: choose text or parse")
    if s.dedup not in ("none", "exact", "bloom"):
        raise ValueError(f"--dedup {s.dedup}: choose none, exact or bloom")
    if not 0 <= s.near_dedup <= 1:
        raise ValueError(f"--near_dedup {s.near_dedup}: give a similarity between 0 (off) and 1")
    if s.dedup == "bloom":
        if s.parts > 1:
            raise ValueError(f"--dedup bloom needs one ordered pass; --parts {s.parts} needs --dedup exact")
        if s.bloom_paragraphs < 1:
            raise ValueError("--dedup bloom needs --bloom_paragraphs N, the number of paragraphs expected")
        if not 0 < s.bloom_false_positives < 0.5:
            raise ValueError(f"--bloom_false_positives {s.bloom_false_positives}: give a share between 0 and 0.5")


@dataclass
class Plan:
    """Settings, the files they apply to, and the opened tokenizer.

    Attributes:
        files: of the training inputs, then of the validation inputs.
        n_train: how many belong to the training inputs.
    """

    settings: Settings
    files: list[TextFile]
    n_train: int
    tokenizer: Tokenizer
    errors: ReadErrors = field(default_factory=ReadErrors)

    @classmethod
    def make(cls, settings: Settings) -> Plan:
        """List the files and open the tokenizer. Raises FileNotFoundError or ValueError for what is not there."""
        errors = ReadErrors()
        train = list_files(settings.input, errors)
        val = list_files(settings.val_input, errors) if settings.val_input is not None else []
        own = {f.identity for f in train}
        for file in val:
            if file.identity in own:
                raise ValueError(
                    f"{file.path} is given by --input and by --val_input; validation text must not be trained on: "
                    "leave it out of --input, by a pattern or by folders that don't hold it"
                )
        if not settings.allow_mixed_splits:
            _refuse_mixed_splits(train, "--input")
            _refuse_mixed_splits(val, "--val_input")
            errors.warnings += [
                f"{a} and {b} go into one dataset, as if both were training text; give the held-out one with "
                "--val_input, or leave it out"
                for a, b in mixed_split_names(train)
            ]
            errors.warnings += [f"{a} and {b} are both validation text" for a, b in mixed_split_names(val)]
        errors.warnings += compressed_copies(train + val)
        check_metadata(train + val, settings.metadata)
        tokenizer = open_tokenizer(settings.tokenizer, settings.eos_token)
        if settings.bos:
            tokenizer.need_bos()
        if settings.special_tokens == "parse":
            tokenizer.check_parses()
        plan = cls(settings, train + val, len(train), tokenizer, errors)
        plan.part_files(0)
        return plan

    def part_files(self, part: int) -> list[tuple[int, TextFile]]:
        """(number among all files, file) of a part."""
        if not 0 <= part < self.settings.parts:
            raise ValueError(f"--part {part}: the parts are numbered from 0 to {self.settings.parts - 1}")
        before = sum(len(part_of_files(self.files, p, self.settings.parts)) for p in range(part))
        return list(enumerate(part_of_files(self.files, part, self.settings.parts), before))

    def to_dict(self) -> dict[str, Any]:
        """What two runs must share to be parts of one preparation (JSON)."""
        return {
            "version": VERSION,
            "settings": json.loads(json.dumps(dataclasses.asdict(self.settings))),
            "tokenizer": self.tokenizer.fingerprint,
            "files": [_facts(f) for f in self.files],
        }


def _refuse_mixed_splits(files: Sequence[TextFile], flag: str) -> None:
    found = train_and_held_out(files)
    if found is None:
        return
    train, held_out = found
    folders = [f.path.parent for f in found]
    folder = folders[0] if folders[0] == folders[1] else os.path.commonpath(map(os.path.abspath, folders))
    raise ValueError(
        f"{flag} takes in {train.path} and {held_out.path}: training text and held-out text would be one dataset. Give "
        f"them apart, such as --input '{folder}/**/*.train*' --val_input '{folder}/**/*{held_out.kind}*', or give "
        "--allow_mixed_splits if it is meant"
    )


def _facts(file: TextFile) -> list[Any]:
    if file.hub is not None:
        return [str(file.path)]
    stat = file.path.stat()
    return [str(file.path), stat.st_size, stat.st_mtime_ns]


def open_work(work: Path, plan: Plan, fresh: bool) -> bool:
    """Make the working folder of a plan, or find it there. Returns whether there was one.

    Raises:
        ValueError: what is there belongs to another plan; the differences are named.
    """
    path = work / PLAN
    wanted = plan.to_dict()
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        if create_json(path, wanted):  # tasks of several parts begin at once, on several machines
            return False
    there = read_plan(path)
    differs = differences(there, wanted)
    if differs and not fresh:
        raise ValueError(
            f"{work} holds a preparation that was not finished, with other settings: {'; '.join(differs)}. Give the "
            "same to go on with it, or --fresh to discard it"
        )
    return True


@dataclass(frozen=True)
class Written:
    """plan.json, as `Plan.to_dict` gives it."""

    version: int
    settings: dict[str, Any]
    tokenizer: str
    files: list[list[Any]]


def read_plan(path: Path) -> dict[str, Any]:
    """plan.json. Raises ValueError that names it if it is damaged."""
    return dataclasses.asdict(read_record(Written, path))


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between two plans (`Plan.to_dict`), in words."""
    found = []
    if there["version"] != here["version"]:
        found.append(f"version {there['version']}, now {here['version']}")
    # A plan from before a setting was there meant its default.
    defaults = {f.name: f.default for f in dataclasses.fields(Settings) if f.default is not dataclasses.MISSING}
    defaults = json.loads(json.dumps(defaults))
    old, new = defaults | there["settings"], defaults | here["settings"]
    found += [
        f"--{k} {old.get(k)}, now {new.get(k)}" for k in sorted(old.keys() | new.keys()) if old.get(k) != new.get(k)
    ]
    if there["tokenizer"] != here["tokenizer"]:
        found.append("the tokenizer has changed")
    if there["files"] != here["files"]:
        changed = [f[0] for f in there["files"] if f not in here["files"]] or [
            f[0] for f in here["files"] if f not in there["files"]
        ]
        found.append(f"files have changed, such as {changed[0] if changed else 'their order'}")
    return found


def strings(values: Sequence[str | Path] | None) -> tuple[str, ...] | None:
    """Paths as text, for Settings."""
    return None if values is None else tuple(str(v) for v in values)
