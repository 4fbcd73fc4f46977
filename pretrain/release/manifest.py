"""`release.json`: the manifest of a published revision, which names the manifest before it by its SHA-256.

A revision is a Hugging Face folder with this file in it, and `run/`: a run folder cut at the revision's checkpoint, as
training writes it. A release is a chain of revisions; the SHA-256 of its last manifest, the head, determines all of it.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lit_data.record.content import RecordContent
from lit_files.checksum import file_sha256, git_blob_id
from lit_files.reading import build, parse_json, read_bytes, regular
from pretrain.args import flat
from pretrain.resume import SettingsChange, changes_meaning

MANIFEST = "release.json"
RUN = "run"  # the folder of a revision that is a run folder
MAIN = "main"  # the name of the last revision
ADDED = (".gitattributes", ".cache")  # by a hub, and by a download from it
FORMAT = 1
GIT_BYTES = 16 << 20
"""Files up to this size have their git blob id in the manifest. A hub keeps larger ones by their SHA-256."""
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")  # of a revision: also a folder's name and a tag


@dataclass(frozen=True)
class File:
    """A file of a revision: its size, SHA-256, and the id that git gives it unless it is large."""

    bytes: int
    sha256: str
    git_blob: str | None = None


@dataclass(frozen=True)
class Previous:
    """The revision before, and the SHA-256 of its manifest's bytes."""

    revision: str
    step: int
    sha256: str


@dataclass(frozen=True)
class Weights:
    """The exported tensors.

    Attributes:
        sha256: `lit_model.checksum.weights_checksum` over all of them. It follows from the checkpoint too, so that the
            training state proves which step they belong to.
    """

    tensors: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Schema of release.json.

    Attributes:
        revision: its name.
        aliases: further names of it, such as those of other word budgets that the same checkpoint reached.
        step: optimizer steps completed.
        tokens, words: seen in training; None if unknown.
        training_state: whether run/ holds the checkpoint with its optimizer; else a checkpoint without tensors.
        settings: SHA-256 of the settings that change the meaning of the run.
        changes: resumes of the run that changed some of these, as a checkpoint lists them.
        model: SHA-256 of the model's config.
        data: fingerprint of each training dataset.
        tokenizer: its fingerprint; None if the data names none.
        record: the record's content between consecutive revisions, from step 0 to `step`.
        files: every file but this one, by its path.
        previous: None for the first revision.
    """

    format: int
    revision: str
    aliases: list[str]
    step: int
    tokens: int | None
    words: int | None
    training_state: bool
    weights: Weights
    settings: str
    changes: list[SettingsChange]
    model: str
    data: list[str]
    tokenizer: str | None
    record: list[RecordContent]
    previous: Previous | None
    files: dict[str, File] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        return (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode()


@dataclass(frozen=True)
class Link:
    """A revision in the chain: its manifest, and the SHA-256 of the manifest's bytes."""

    manifest: Manifest
    sha256: str

    @property
    def previous(self) -> Previous:
        """The entry for it in the next manifest."""
        return Previous(self.manifest.revision, self.manifest.step, self.sha256)


def read_manifest(content: bytes, source: str | Path) -> Manifest:
    """Read a manifest. Raises ValueError naming `source` for damage, another format, and names or paths that could
    leave the release's folder."""
    value = parse_json(content, source)
    if isinstance(value, dict) and value.get("format") != FORMAT:
        raise ValueError(f"{source} has format {value.get('format')!r}; this version reads format {FORMAT}")
    manifest = build(Manifest, value, source)
    for path in manifest.files:
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or str(pure) != path or "\\" in path:
            raise ValueError(f"{source} is damaged: it names the file {path!r:.80}")
    for name in (manifest.revision, *manifest.aliases):
        if name == MAIN or not NAME.fullmatch(name):
            raise ValueError(f"{source} is damaged: {name!r:.80} cannot be the name of a revision")
    return manifest


def read_link(folder: Path) -> Link:
    """The manifest in a revision's folder. Raises FileNotFoundError or ValueError that names it."""
    return parse_link(read_bytes(folder / MANIFEST), folder / MANIFEST)


def parse_link(content: bytes, source: str | Path) -> Link:
    """A manifest from its bytes. Raises ValueError that names `source`."""
    return Link(read_manifest(content, source), sha256_of(content))


def in_chain(links: Iterable[Link], where: object) -> list[Link]:
    """Links in the order of their steps. Raises ValueError where a manifest does not name the one before it."""
    ordered = sorted(links, key=lambda link: link.manifest.step)
    before = None
    for link in ordered:
        if link.manifest.previous != (before.previous if before else None):
            expected = f"the manifest of {before.manifest.revision}" if before else "no manifest"
            raise ValueError(
                f"{where}: {link.manifest.revision} must name {expected} as the one before it; "
                f"publish.py --verify {where} reports each fault"
            )
        before = link
    return ordered


def counted(number: int, noun: str) -> str:
    """`3 revisions`, `1 revision`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return sha256_of(json.dumps(value, sort_keys=True).encode())


def settings_digest(config: dict[str, Any]) -> str:
    """SHA-256 of the settings that a resume must not change, of a checkpoint's config."""
    return digest({key: value for key, value in flat(config).items() if changes_meaning(key)})


def files_in(folder: Path) -> Iterator[str]:
    """The paths of a revision's files, sorted, except its manifest and the files that a hub or a download adds.

    A symbolic link counts as a file, also one to a folder.
    """
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.is_symlink() or not p.is_dir()]
    yield from sorted(p.as_posix() for p in found if p.parts[0] not in ADDED and p.as_posix() != MANIFEST)


def describe_file(path: Path) -> File:
    """Read a file's size and hashes. Raises ValueError if it is not a regular file."""
    size = regular(path).stat().st_size
    return File(size, file_sha256(path), git_blob_id(read_bytes(path)) if size <= GIT_BYTES else None)
