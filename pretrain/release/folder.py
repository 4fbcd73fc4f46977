"""A release in a folder: one folder a revision, and links `main` and other aliases to them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_files.publish import build_folder, sync_file
from lit_files.reading import read_bytes
from pretrain.release.manifest import MAIN, MANIFEST, read_manifest, sha256_of
from pretrain.release.revision import Link


def read_link(folder: Path) -> Link:
    """The manifest in a revision's folder. Raises FileNotFoundError or ValueError that names it."""
    content = read_bytes(folder / MANIFEST)
    return Link(read_manifest(content, folder / MANIFEST), sha256_of(content))


def in_chain(links: list[Link], where: object) -> list[Link]:
    """Links in the order of their steps. Raises ValueError where a manifest does not name the one before it."""
    links = sorted(links, key=lambda link: link.manifest.step)
    before = None
    for link in links:
        if link.manifest.previous != (before.previous if before else None):
            raise ValueError(
                f"{where}: the manifest of {link.manifest.revision} does not follow that of "
                f"{before.manifest.revision if before else 'no revision'}; see publish.py --verify {where}"
            )
        before = link
    return links


class FolderRelease:
    """Publishes revisions to a folder, which is created. Raises ValueError if it holds anything but revisions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--to {folder} is a file; give a folder")
        strange = [p.name for p in (folder.iterdir() if folder.exists() else ()) if not self._is_revision(p)]
        if strange:
            raise ValueError(
                f"--to {folder} holds {min(strange)}, which is no revision of a release; give a new folder"
            )

    @staticmethod
    def _is_revision(path: Path) -> bool:
        return path.name.startswith(".") or (path / MANIFEST).is_file()

    def __str__(self) -> str:
        return str(self.folder)

    def chain(self) -> list[Link]:
        """The published revisions, oldest first. Raises ValueError for a broken chain."""
        if not self.folder.exists():
            return []
        names = [p for p in self.folder.iterdir() if not p.name.startswith(".") and not p.is_symlink()]
        return in_chain([read_link(path) for path in names], self.folder)

    def earlier_record(self, before: Link | None) -> Path | None:
        """Where the record of a published revision is."""
        return self.folder / before.manifest.revision / "run" / "datapoints" if before else None

    @contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """An empty folder to write a revision to; published whole if the block ends well."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with build_folder(self.folder / name) as temporary:
            yield temporary

    def settle(self, chain: list[Link]) -> None:
        """Let `main` and the aliases name their revisions."""
        for link in chain:
            for alias in link.manifest.aliases:
                self._point(alias, link.manifest.revision)
        if chain:
            self._point(MAIN, chain[-1].manifest.revision)

    def _point(self, alias: str, revision: str) -> None:
        link, temporary = self.folder / alias, self.folder / f".{alias}.tmp"
        if link.is_symlink() and os.readlink(link) == revision:
            return
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(revision)
        os.replace(temporary, link)
        sync_file(self.folder)
