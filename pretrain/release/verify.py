"""Verifies a release: every revision against its manifest, the chain of manifests, and its files against each other.

All files of a release in a folder are read. A release on a hub is verified by the hub's own hashes of its files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from lit_eval.run_facts import parse_settings
from lit_files.checksum import file_sha256
from lit_files.progress import track
from lit_files.reading import first_line, read_bytes, regular
from lit_files.run_files import SETTINGS
from pretrain.args import flat
from pretrain.release.content import Scanned, content_faults
from pretrain.release.manifest import (
    MAIN,
    MANIFEST,
    RUN,
    File,
    Link,
    Manifest,
    counted,
    files_in,
    parse_link,
)
from pretrain.resume import changes_meaning


class Revision(Protocol):
    """A revision to verify. `content` yields a folder with its files, or None if they were not downloaded."""

    @property
    def name(self) -> str: ...

    def paths(self) -> set[str]: ...

    def difference(self, path: str, expected: File) -> str | None: ...

    def read(self, path: str) -> bytes: ...

    def content(self) -> AbstractContextManager[Path | None]: ...


@dataclass
class Opened:
    """A release to verify.

    Attributes:
        aliases: further names, each with its revision.
        whole: False for a single revision, whose chain cannot be checked.
        clashes: names of both a tag and a branch, at different commits.
    """

    where: str
    revisions: list[Revision]
    aliases: dict[str, str]
    whole: bool = True
    clashes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Fault:
    revision: str
    path: str | None
    text: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.revision, self.path, self.text) if part)


@dataclass
class Report:
    """The result of a verification; `head` is the SHA-256 of the last manifest, None without any."""

    where: str
    revisions: list[str] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    head: str | None = None

    def add(self, revision: str, path: str | None, text: str) -> None:
        fault = Fault(revision, path, text)
        if fault not in self.faults:
            self.faults.append(fault)

    def lines(self) -> list[str]:
        verdict = counted(len(self.faults), "fault") if self.faults else "no fault"
        head = [] if self.head is None else [f"head: {self.head}"]
        summary = f"{self.where}: {counted(len(self.revisions), 'revision')}, {verdict}"
        return [*map(str, self.faults), *self.notes, *head, summary]


def size_difference(size: int, expected: File) -> str | None:
    """How a file's size differs from the manifest's; None if it does not."""
    return None if size == expected.bytes else f"it has {size} bytes; the manifest says {expected.bytes}"


@dataclass(frozen=True)
class FolderRevision:
    """A revision's folder."""

    name: str
    folder: Path

    def paths(self) -> set[str]:
        return set(files_in(self.folder))

    def difference(self, path: str, expected: File) -> str | None:
        file = regular(self.folder / path)
        if (text := size_difference(file.stat().st_size, expected)) is not None:
            return text
        return None if file_sha256(file) == expected.sha256 else "its SHA-256 differs from the manifest's"

    def read(self, path: str) -> bytes:
        return read_bytes(self.folder / path)

    def content(self) -> AbstractContextManager[Path | None]:
        return nullcontext(self.folder)


def open_folder(path: Path) -> Opened:
    """Open a release's folder, or a single revision's. Raises FileNotFoundError or ValueError if it is neither."""
    if not path.is_dir():
        raise FileNotFoundError(f"--verify {path}: no such folder")
    if (path / MANIFEST).is_file():
        return Opened(str(path), [FolderRevision(path.resolve().name, path)], {}, whole=False)
    entries = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not any((p / MANIFEST).is_file() for p in entries):
        raise ValueError(f"--verify {path} is not a release: none of its folders has a {MANIFEST}")
    aliases = {p.name: os.readlink(p) for p in path.iterdir() if p.is_symlink()}
    return Opened(str(path), [FolderRevision(p.name, p) for p in entries if not p.is_symlink()], aliases)


def verify(opened: Opened, *, head: str | None = None) -> Report:
    """Check a release.

    Args:
        head: the SHA-256 that the last manifest must have.
    """
    report = Report(opened.where, [revision.name for revision in opened.revisions])
    links: dict[str, Link] = {}
    for revision in track(opened.revisions, "checksums", "revisions"):
        if (link := read_revision(revision, report)) is not None:
            links[revision.name] = link
            check_files(revision, link.manifest, report)
    primary = [links[n] for n in links if links[n].manifest.revision == n or not opened.whole]
    primary.sort(key=lambda link: link.manifest.step)
    check_names(opened, links, primary, report)
    if opened.whole:
        check_chain(primary, report)
    for name, link in links.items():
        check_record_steps(name, link.manifest, report)
    settings = check_settings([(links[r.name].manifest, r) for r in opened.revisions if r.name in links], report)
    check_weights(primary, settings, report)
    check_contents(opened.revisions, links, report)
    if primary:
        report.head = primary[-1].sha256
    if head is not None and head != report.head:
        report.add(primary[-1].manifest.revision if primary else MAIN, MANIFEST, f"the head is not {head}")
    if not opened.whole:
        report.notes.append("a single revision: the chain was not checked")
    return report


def read_revision(revision: Revision, report: Report) -> Link | None:
    """The manifest of a revision; None, and a fault, if it cannot be read."""
    try:
        return parse_link(revision.read(MANIFEST), MANIFEST)
    except FileNotFoundError:
        report.add(revision.name, MANIFEST, "it is missing")
    except (ValueError, OSError) as error:
        report.add(revision.name, MANIFEST, first_line(error).removeprefix(f"{MANIFEST} ").removeprefix("is damaged: "))
    return None


def check_files(revision: Revision, manifest: Manifest, report: Report) -> None:
    """The revision has every file of its manifest, with the same content, and no other file."""
    paths = revision.paths()
    for path, expected in manifest.files.items():
        if path not in paths:
            report.add(revision.name, path, "it is missing")
            continue
        try:
            difference = revision.difference(path, expected)
        except (ValueError, OSError) as error:
            difference = first_line(error)
        if difference is not None:
            report.add(revision.name, path, difference)
    for path in sorted(paths - manifest.files.keys()):
        report.add(revision.name, path, "it is not in the manifest")


def check_names(opened: Opened, links: dict[str, Link], primary: list[Link], report: Report) -> None:
    """Each revision has its own name, and each alias, `main` above all, names the right revision."""
    if not opened.whole:
        return
    for name in opened.clashes:
        report.add(name, None, "a tag and a branch of this name are at different commits")
    own = {link.manifest.revision: link for link in primary}
    last = primary[-1] if primary else None
    expected = {alias: link for link in primary for alias in link.manifest.aliases}
    if last is not None:
        expected[MAIN] = last
    for name, link in links.items():
        if name not in own and (name not in expected or link.sha256 != expected[name].sha256):
            step = link.manifest.step
            report.add(name, MANIFEST, f"it is the manifest of {link.manifest.revision} (step {step})")
    for alias, link in expected.items():
        target = opened.aliases.get(alias, link.manifest.revision if alias in links else None)
        if target is None:
            report.add(alias, None, f"it is missing; it must be an alias of {link.manifest.revision}")
        elif target != link.manifest.revision:
            report.add(alias, None, f"it is an alias of {target}; it must be one of {link.manifest.revision}")
    for alias in sorted(opened.aliases.keys() - expected.keys()):
        report.add(alias, None, "no manifest names this alias")


def check_chain(primary: list[Link], report: Report) -> None:
    """Each manifest names the one before it, and continues its record."""
    before: Link | None = None
    for link in primary:
        manifest = link.manifest
        name = manifest.revision
        if manifest.previous != (before.previous if before else None):
            report.add(name, MANIFEST, chain_fault(manifest, before))
        record_before = before.manifest.record if before else []
        if manifest.record[: len(record_before)] != record_before:
            report.add(name, MANIFEST, f"its record does not continue that of {before and before.manifest.revision}")
        if len(manifest.record) != len(record_before) + 1:
            report.add(name, MANIFEST, "its record does not add exactly one interval to the revision before")
        before = link


def chain_fault(manifest: Manifest, before: Link | None) -> str:
    """How a manifest's entry for the revision before it differs from that revision."""
    named = manifest.previous
    if named is None:
        return f"it names no revision before it; {before and before.manifest.revision} precedes it"
    if before is None or named.revision != before.manifest.revision:
        found = "no revision" if before is None else before.manifest.revision
        return f"it names {named.revision} as the revision before it, which is missing; {found} precedes it"
    return f"it names {named.sha256} as the manifest of {named.revision}, whose hash is {before.sha256}"


def check_record_steps(name: str, manifest: Manifest, report: Report) -> None:
    """The record covers every step from 0 to the revision's, and has as many tokens as were seen."""
    bounds = [0, *(part.end_step for part in manifest.record)]
    if [part.first_step for part in manifest.record] != bounds[:-1] or bounds[-1] != manifest.step:
        report.add(name, MANIFEST, f"its record does not cover steps 0 to {manifest.step - 1}: {bounds}")
    tokens = sum(part.tokens for part in manifest.record)
    if manifest.tokens is not None and tokens != manifest.tokens:
        report.add(name, MANIFEST, f"its record has {tokens} tokens; {manifest.tokens} were seen")


def check_weights(primary: list[Link], settings: dict[str, dict[str, object]], report: Report) -> None:
    """Revisions with training between them have different weights. `settings`: of each revision by its name, flat."""
    seen: dict[str, Manifest] = {}
    for manifest in (link.manifest for link in primary):
        other = seen.setdefault(manifest.weights.sha256, manifest)
        trained = sum(part.applied_steps for part in manifest.record if part.first_step >= other.step)
        if (
            other is not manifest
            and trained
            and not only_idle_step(other, manifest, settings.get(manifest.revision, {}))
        ):
            text = f"the same weights as {other.revision}, despite {counted(trained, 'training step')} in between"
            report.add(manifest.revision, "model.safetensors", text)
            report.add(other.revision, "model.safetensors", f"the same weights as {manifest.revision}")


def only_idle_step(before: Manifest, after: Manifest, settings: dict[str, object]) -> bool:
    """Whether only the last step of the run lies between two revisions, at a learning rate that has decayed to 0."""
    decays_to_zero = settings.get("optim.lr_min") == 0 and settings.get("optim.schedule") != "constant"
    return decays_to_zero and after.step - before.step == 1 and settings.get("train.max_steps") in (None, after.step)


def check_settings(revisions: Iterable[tuple[Manifest, Revision]], report: Report) -> dict[str, dict[str, object]]:
    """Settings, data and model stay the same, except for changes that a resume recorded.

    Returns the settings of each revision, flat.
    """
    found: dict[str, dict[str, object]] = {}
    before: tuple[Manifest, dict[str, object]] | None = None
    for manifest, revision in sorted(revisions, key=lambda pair: pair[0].step):
        try:
            settings = flat(parse_settings(revision.read(f"{RUN}/{SETTINGS}"), SETTINGS))
        except (ValueError, OSError, RecursionError) as error:
            report.add(revision.name, f"{RUN}/{SETTINGS}", f"it cannot be read: {first_line(error)}")
            continue
        found[revision.name] = settings
        if before is not None:
            for text in changed_settings(before[0], before[1], manifest, settings):
                report.add(revision.name, f"{RUN}/{SETTINGS}", text)
        before = manifest, settings
    return found


def changed_settings(
    old: Manifest, old_settings: dict[str, object], new: Manifest, settings: dict[str, object]
) -> Iterator[str]:
    """The settings that changed between two revisions without a record of it."""
    allowed = {key for change in new.changes for key in change.differences}
    for key in sorted(settings.keys() & old_settings.keys()):
        if changes_meaning(key) and settings[key] != old_settings[key] and key not in allowed:
            there = f"{old_settings[key]!r:.60} in {old.revision}"
            yield f"{key} is {settings[key]!r:.60}, but {there}; no resume recorded this change"
    for what, one, other in (("data", old.data, new.data), ("model", old.model, new.model)):
        if one != other and not any(key.startswith(what) for key in allowed):
            yield f"the {what} differs from that of {old.revision}; no resume recorded this change"


def check_contents(revisions: Iterable[Revision], links: dict[str, Link], report: Report) -> None:
    """The files of each revision in a folder belong together, also where they differ from the manifest."""
    scanned: Scanned = {}
    unseen = []
    for revision in track(list(revisions), "contents", "revisions"):
        if revision.name not in links:
            continue
        manifest = links[revision.name].manifest
        with revision.content() as folder:
            if folder is None:
                unseen.append(revision.name)
                continue
            if not isinstance(revision, FolderRevision):
                check_files(FolderRevision(revision.name, folder), manifest, report)
            for path, text in content_faults(folder, manifest, scanned):
                report.add(revision.name, path, text)
    if unseen:
        report.notes.append("checked by the hub's hashes only; --download also checks the files' content")
