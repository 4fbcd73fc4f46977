"""The job of a preparation (settings, input files, tokenizer) and its working folder."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_data.corpus.files import (
    ReadErrors,
    TextFile,
    compressed_copies,
    list_files,
    mixed_split_names,
    part_of_files,
    train_and_held_out,
)
from lit_data.corpus.readers import check_metadata
from lit_data.corpus.separators import check_separator
from lit_data.prepare.settings import Settings
from lit_data.tokenizers.tokenizer import Tokenizer, open_tokenizer
from lit_files.publish import create_json
from lit_files.reading import read_dataclass

JOB_FILE = "plan.json"
VERSION = 2  # version 1 had no word counts


@dataclass
class Job:
    """Settings, input files and the opened tokenizer.

    Attributes:
        files: training inputs, then validation inputs.
        n_train: number of training files.
    """

    settings: Settings
    files: list[TextFile]
    n_train: int
    tokenizer: Tokenizer
    errors: ReadErrors = field(default_factory=ReadErrors)

    @classmethod
    def make(cls, settings: Settings) -> Job:
        """List the files and open the tokenizer. Raises FileNotFoundError or ValueError."""
        errors = ReadErrors()
        train = list_files(settings.input, errors)
        val = list_files(settings.val_input, errors) if settings.val_input is not None else []
        own = {f.identity for f in train}
        for file in val:
            if file.identity in own:
                raise ValueError(
                    f"{file.path} is in both --input and --val_input; validation text must not be trained on: exclude "
                    "it from --input"
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
        errors.warnings += check_separator(train, val, settings.split_documents)
        check_metadata(train + val, settings.metadata)
        tokenizer = open_tokenizer(settings.tokenizer, settings.eos_token)
        if settings.bos:
            tokenizer.need_bos()
        if settings.special_tokens == "parse":
            tokenizer.check_parses()
        job = cls(settings, train + val, len(train), tokenizer, errors)
        job.part_files(0)
        return job

    def part_files(self, part: int) -> list[tuple[int, TextFile]]:
        """The files of a part, as (index among all files, file)."""
        if not 0 <= part < self.settings.parts:
            raise ValueError(f"--part {part}: the parts are numbered from 0 to {self.settings.parts - 1}")
        before = sum(len(part_of_files(self.files, p, self.settings.parts)) for p in range(part))
        return list(enumerate(part_of_files(self.files, part, self.settings.parts), before))

    def to_dict(self) -> dict[str, Any]:
        """Everything two runs must agree on to work on the same preparation (JSON)."""
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
        f"{flag} includes {train.path} and {held_out.path}: training and held-out text would end up in one dataset. "
        f"Separate them, for example with --input '{folder}/**/*.train*' --val_input '{folder}/**/*{held_out.kind}*', "
        "or give --allow_mixed_splits if that is intended"
    )


def _facts(file: TextFile) -> list[Any]:
    if file.hub is not None:
        return [str(file.path)]
    stat = file.path.stat()
    return [str(file.path), stat.st_size, stat.st_mtime_ns]


def open_work(work: Path, job: Job, fresh: bool) -> bool:
    """Open the working folder of a job; create it if missing. Returns whether it existed.

    Raises:
        ValueError: the folder belongs to another job; the message names the differences.
    """
    path = work / JOB_FILE
    wanted = job.to_dict()
    if not path.is_file():
        work.mkdir(parents=True, exist_ok=True)
        if create_json(path, wanted):  # tasks of several parts start at the same time, on several machines
            return False
    there = read_job(path)
    differs = differences(there, wanted)
    if differs and not fresh:
        raise ValueError(
            f"{work} holds an unfinished preparation with other settings: {'; '.join(differs)}. Give the same "
            "settings to resume it, or --fresh to discard it"
        )
    return True


@dataclass(frozen=True)
class _JobFile:
    """Schema of plan.json, see `Job.to_dict`."""

    version: int
    settings: dict[str, Any]
    tokenizer: str
    files: list[list[Any]]


def read_job(path: Path) -> dict[str, Any]:
    """Read plan.json. Raises ValueError naming the file if it is damaged."""
    return dataclasses.asdict(read_dataclass(_JobFile, path))


def differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Describe the differences between two jobs (`Job.to_dict`)."""
    found = []
    if there["version"] != here["version"]:
        found.append(f"version {there['version']}, now {here['version']}")
    # Files written before a setting existed imply its default.
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
