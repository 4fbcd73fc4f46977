"""A release in a folder: one folder per revision; `main` and other aliases are symbolic links."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lit_files.publish import build_folder, sync_file
from lit_files.reading import read_bytes
from lit_files.run_files import DATAPOINTS
from pretrain.release.manifest import MAIN, MANIFEST, RUN, Link, in_chain, read_link


class FolderRelease:
    """Publishes revisions to a folder, which is created. Raises ValueError if it holds anything but revisions."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"--to {folder} is a file; give a folder")
        strange = [p.name for p in (folder.iterdir() if folder.exists() else ()) if not self._is_revision(p)]
        if strange:
            raise ValueError(
                f"--to {folder} holds {min(strange)}, which is not a revision of a release; give a new folder"
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
        return in_chain(map(read_link, names), self.folder)

    def card(self, link: Link) -> str:
        """The model card of a published revision."""
        return read_bytes(self.folder / link.manifest.revision / "README.md").decode(errors="replace")

    def earlier_record(self, before: Link | None) -> Path | None:
        """The record's folder in a published revision."""
        return self.folder / before.manifest.revision / RUN / DATAPOINTS if before else None

    @contextmanager
    def new_revision(self, name: str) -> Iterator[Path]:
        """Yield an empty folder for a revision's files; publish it if the block ends without an exception."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with build_folder(self.folder / name) as temporary:
            yield temporary

    def update_names(self, chain: list[Link]) -> None:
        """Link `main` and the aliases to their revisions."""
        for link in chain:
            for alias in link.manifest.aliases:
                self._link(alias, link.manifest.revision)
        if chain:
            self._link(MAIN, chain[-1].manifest.revision)

    def close(self) -> None:
        """A folder leaves nothing to clean up."""

    def _link(self, alias: str, revision: str) -> None:
        link, temporary = self.folder / alias, self.folder / f".{alias}.tmp"
        if link.is_symlink() and os.readlink(link) == revision:
            return
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(revision)
        os.replace(temporary, link)
        sync_file(self.folder)
