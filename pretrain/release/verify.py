"""Verifies a release: every revision against its manifest, the chain of manifests, and whether its files agree.

A folder is read entirely. A hub is verified by its own hashes of the files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import yaml

from lit_eval.run_facts import SETTINGS
from lit_files.reading import read_bytes
from pretrain.args import flat
from pretrain.release.content import content_faults
from pretrain.release.manifest import (
    MAIN,
    MANIFEST,
    RUN,
    File,
    Manifest,
    describe_file,
    files_in,
    read_manifest,
    sha256_of,
)
from pretrain.release.revision import Link
from pretrain.resume import MEANING, MECHANICS


class Revision(Protocol):
    """A revision as it is found. `content` gives a folder with its files, or None if they are not at hand."""

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
        aliases: further names, and the revision each stands for.
        whole: False for a single revision, whose chain cannot be checked.
        clashes: names that are a tag and a branch of different commits.
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
        verdict = f"{len(self.faults)} faults" if self.faults else "no fault"
        head = [] if self.head is None else [f"head: {self.head}"]
        return [*map(str, self.faults), *self.notes, *head, f"{self.where}: {len(self.revisions)} revisions, {verdict}"]


@dataclass(frozen=True)
class FolderRevision:
    """A revision's folder."""

    name: str
    folder: Path

    def paths(self) -> set[str]:
        return set(files_in(self.folder))

    def difference(self, path: str, expected: File) -> str | None:
        found = describe_file(self.folder / path)
        if found.bytes != expected.bytes:
            return f"it has {found.bytes} bytes; the manifest says {expected.bytes}"
        return None if found.sha256 == expected.sha256 else "its SHA-256 is not that of the manifest"

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
        raise ValueError(f"--verify {path} is no release: none of its folders holds a {MANIFEST}")
    aliases = {p.name: os.readlink(p) for p in path.iterdir() if p.is_symlink()}
    return Opened(str(path), [FolderRevision(p.name, p) for p in entries if not p.is_symlink()], aliases)


def verify(opened: Opened, *, head: str | None = None) -> Report:
    """Check a release.

    Args:
        head: the SHA-256 that the last manifest must have.
    """
    report = Report(opened.where, [revision.name for revision in opened.revisions])
    links: dict[str, Link] = {}
    for revision in opened.revisions:
        if (link := read_revision(revision, report)) is not None:
            links[revision.name] = link
            check_files(revision, link.manifest, report)
    primary = [links[n] for n in links if links[n].manifest.revision == n or not opened.whole]
    primary.sort(key=lambda link: link.manifest.step)
    check_names(opened, links, primary, report)
    if opened.whole:
        check_chain(primary, report)
    check_weights(primary, report)
    check_settings([(links[r.name].manifest, r) for r in opened.revisions if r.name in links], report)
    check_contents(opened.revisions, links, report)
    if primary:
        report.head = primary[-1].sha256
    if head is not None and head != report.head:
        report.add(primary[-1].manifest.revision if primary else MAIN, MANIFEST, f"the head is not {head}")
    if not opened.whole:
        report.notes.append("a single revision: its place in the chain was not checked")
    return report


def read_revision(revision: Revision, report: Report) -> Link | None:
    """The manifest of a revision; None, and a fault, if it cannot be read."""
    try:
        content = revision.read(MANIFEST)
        return Link(read_manifest(content, MANIFEST), sha256_of(content))
    except FileNotFoundError:
        report.add(revision.name, MANIFEST, "it is missing")
    except ValueError as error:
        report.add(revision.name, MANIFEST, str(error).removeprefix(f"{MANIFEST} ").removeprefix("is damaged: "))
    return None


def check_files(revision: Revision, manifest: Manifest, report: Report) -> None:
    """Every file of the manifest is there with its content, and no other."""
    paths = revision.paths()
    for path, expected in manifest.files.items():
        if path not in paths:
            report.add(revision.name, path, "it is missing")
            continue
        try:
            difference = revision.difference(path, expected)
        except (ValueError, OSError) as error:
            difference = str(error)
        if difference is not None:
            report.add(revision.name, path, difference)
    for path in sorted(paths - manifest.files.keys()):
        report.add(revision.name, path, "it is not in the manifest")


def check_names(opened: Opened, links: dict[str, Link], primary: list[Link], report: Report) -> None:
    """Each revision stands under its own name, and each alias, `main` above all, for the right one."""
    if not opened.whole:
        return
    for name in opened.clashes:
        report.add(name, None, "a tag and a branch of this name hold different commits")
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
            report.add(alias, None, f"it is missing; it stands for {link.manifest.revision}")
        elif target != link.manifest.revision:
            report.add(alias, None, f"it stands for {target}, not for {link.manifest.revision}")
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
            report.add(
                name, MANIFEST, f"its record is not a continuation of that of {before and before.manifest.revision}"
            )
        if len(manifest.record) != len(record_before) + 1:
            report.add(name, MANIFEST, "its record does not add the steps since the revision before")
        before = link
    for link in primary:
        check_record_steps(link.manifest, report)


def chain_fault(manifest: Manifest, before: Link | None) -> str:
    """How a manifest fails to name the one before it."""
    named = manifest.previous
    if named is None:
        return f"it begins a chain, but {before and before.manifest.revision} comes before it"
    if before is None or named.revision != before.manifest.revision:
        found = "none" if before is None else before.manifest.revision
        return f"the revision before it is {named.revision}, which is missing; found {found}"
    return f"it names {named.sha256} as the manifest of {named.revision}, which has {before.sha256}"


def check_record_steps(manifest: Manifest, report: Report) -> None:
    """The record runs from step 0 to the revision's, and has as many tokens as were seen."""
    bounds = [0, *(part.end_step for part in manifest.record)]
    if [part.first_step for part in manifest.record] != bounds[:-1] or bounds[-1] != manifest.step:
        report.add(manifest.revision, MANIFEST, f"its record does not cover steps 0 to {manifest.step - 1}: {bounds}")
    tokens = sum(part.tokens for part in manifest.record)
    if manifest.tokens is not None and tokens != manifest.tokens:
        report.add(manifest.revision, MANIFEST, f"its record has {tokens} tokens; {manifest.tokens} were seen")


def check_weights(primary: list[Link], report: Report) -> None:
    """Revisions with training between them have different weights."""
    seen: dict[str, Manifest] = {}
    for manifest in (link.manifest for link in primary):
        other = seen.setdefault(manifest.weights.sha256, manifest)
        trained = sum(part.applied_steps for part in manifest.record if part.first_step >= other.step)
        if other is not manifest and trained:
            text = f"the same weights as {other.revision}, though {trained} steps were trained in between"
            report.add(manifest.revision, "model.safetensors", text)
            report.add(other.revision, "model.safetensors", f"the same weights as {manifest.revision}")


def check_settings(revisions: Iterable[tuple[Manifest, Revision]], report: Report) -> None:
    """Settings, data, model and tokenizer stay the same, but for changes that a resume recorded."""
    before: tuple[Manifest, dict[str, object]] | None = None
    for manifest, revision in sorted(revisions, key=lambda pair: pair[0].step):
        try:
            settings = flat(yaml.safe_load(revision.read(f"{RUN}/{SETTINGS}")))
        except (ValueError, OSError, yaml.YAMLError, AttributeError, RecursionError) as error:
            report.add(revision.name, f"{RUN}/{SETTINGS}", f"it cannot be read: {str(error).splitlines()[0]}")
            continue
        if before is not None:
            for text in changed_settings(before[0], before[1], manifest, settings):
                report.add(revision.name, f"{RUN}/{SETTINGS}", text)
        before = manifest, settings


def changed_settings(
    old: Manifest, old_settings: dict[str, object], new: Manifest, settings: dict[str, object]
) -> Iterator[str]:
    """The settings that changed between two revisions without a record of it."""
    allowed = {key for change in new.changes for key in change.get("differences", {})}
    for key in sorted(settings.keys() & old_settings.keys()):
        meant = any(key == m or key.startswith(f"{m}.") for m in MEANING) and key not in MECHANICS
        if meant and settings[key] != old_settings[key] and key not in allowed:
            there = f"{old_settings[key]!r:.60} in {old.revision}"
            yield f"{key} is {settings[key]!r:.60}, but {there}; no resume changed it"
    for what, one, other in (("data", old.data, new.data), ("model", old.model, new.model)):
        if one != other and not any(key.startswith(what) for key in allowed):
            yield f"the {what} is not that of {old.revision}; no resume changed it"


def check_contents(revisions: Iterable[Revision], links: dict[str, Link], report: Report) -> None:
    """The files of each revision at hand belong together. A revision whose files changed is checked too."""
    scanned: set[tuple[str, ...]] = set()
    unseen = []
    for revision in revisions:
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
        report.notes.append("checked by the hub's hashes only; --download also checks what the files contain")
