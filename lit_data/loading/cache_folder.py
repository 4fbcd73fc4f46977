"""A node's cache folder, shared under one byte budget by processes that may be killed at any moment.

    CACHE/0123456789abcdef-16777216/00000-000003.bin           chunk 3 of shard 0: 16 MiB of its .bin
    CACHE/0123456789abcdef-16777216/00000-000004.bin.ID.part   a chunk that holder ID is copying
    CACHE/holder-BUDGET-ID/00000-000003.bin                    a second link: holder ID needs the chunk

A holder is one open `ShardCache` of any process; those of all ranks and jobs on a node share the folder. It is safe
against SIGKILL at any moment because:

- A chunk gets its name when its bytes are complete and synced, so every named chunk is complete, even after a power
  loss. (A checksum would cost each reader a pass over the chunk; syncing is free in /dev/shm, and elsewhere only moves
  writes forward.)
- A holder's folder is locked (flock) while its process is alive. A folder that can be locked belongs to a dead process:
  the next survey by any holder removes its links and unfinished copies. (A forked child also keeps the lock until it
  exits.)
- A holder links each chunk before reading it: a chunk with a single link is unused and may be evicted, least recently
  released first (linking and unlinking set the file's ctime). Mapped chunks are always linked.
- Files are counted, claimed, named and evicted under one lock on the folder itself. A claimed copy has its full size
  before a byte is written, so that the sum of sizes never exceeds the budget.

The budget is shared:

- Each holder states a budget for the entire folder; the smallest among live holders applies to all. When a smaller one
  arrives, unused chunks are evicted at once and chunks in use stay until released; nothing is added before everything
  fits.
- A holder that finds no room marks itself as waiting; then nobody takes more than an equal share with the waiting ones.
  A chunk with n holders counts 1/n for each.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lit_files.platform import FOLDER_LOCKS, lock, open_folder, unlock
from lit_files.publish import sync_file

HUNGRY_SECONDS = 2.0
FILES_PER_CLAIM = 256  # a survey costs about 3 us per file: claim one more file for each so many present

_SHARED = re.compile(r"[0-9a-f]{16}-\d+")
_HOLDER = re.compile(r"holder-(\d+)-([0-9a-f]{32})")
_PART = re.compile(r"(.+)\.([0-9a-f]{32})\.part")


@dataclass
class _Contents:
    """The folder's content as surveyed by a holder, under the lock."""

    limit: int  # bytes: the smallest budget of live holders
    holders: int = 1
    hungry: int = 0  # other holders waiting for room
    total: int = 0  # bytes of all files
    files: int = 0
    chunks: dict[str, os.stat_result] = field(default_factory=dict)  # of this dataset
    claimed: set[str] = field(default_factory=set)  # of this dataset, being copied
    idle: dict[str, tuple[int, int]] = field(default_factory=dict)  # path -> (ctime, bytes) of unused files


class CacheFolder:
    """A holder's view of a cache folder: the files it holds, under the budget it shares with other holders.

    Args:
        kind: name of the sub-folder; holders with the same kind share its files.
        budget_bytes: budget for the entire folder.

    Raises ValueError if the folder cannot be used or its file system is smaller than the budget.
    """

    def __init__(self, folder: str | Path, kind: str, budget_bytes: int) -> None:
        self.folder, self.budget_bytes = Path(folder), budget_bytes
        self.shared = self.folder / kind
        self.id = uuid.uuid4().hex
        self.own = self.folder / f"holder-{budget_bytes}-{self.id}"
        self.held: set[str] = set()
        self._descriptors: list[int] = []
        if not FOLDER_LOCKS:
            raise ValueError(f"--data.cache_dir {self.folder} is not supported on Windows: leave it out")
        try:
            self.shared.mkdir(parents=True, exist_ok=True)
            most = shutil.disk_usage(self.folder).total
            self._folder_lock = self._open(self.folder)
            with self._locked():
                self.own.mkdir()
                lock(self._open(self.own))  # held until the process exits
        except OSError as error:
            self._close_descriptors()
            raise ValueError(
                f"--data.cache_dir {self.folder}: {error.strerror} ({error.filename or self.folder}); name a folder in "
                "the memory (/dev/shm) or on a disk of the node, that this user may write to"
            ) from error
        if most < budget_bytes:
            self.close()
            raise ValueError(
                f"--data.cache_gb {budget_bytes / 1e9:g} exceeds the {most / 1e9:.3f} GB "
                f"of the file system of --data.cache_dir {self.folder}; lower it"
            )
        self.hold(())

    def _open(self, folder: Path) -> int:
        self._descriptors.append(open_folder(folder))
        return self._descriptors[-1]

    def _close_descriptors(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._descriptors = []

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        lock(self._folder_lock)
        try:
            yield
        finally:
            unlock(self._folder_lock)

    def hold(self, wanted: Sequence[tuple[str, int]]) -> tuple[list[str], list[str]]:
        """Link the wanted files that are present, and claim room for some missing ones, most urgent first.

        Stops at the first file without room, or when enough is claimed, so that later files don't take the room of
        earlier ones. Files being copied by others are skipped. First evicts unused files beyond the budget.

        Args:
            wanted: names and sizes in bytes, none of them held.

        Returns:
            The names now held, and the names claimed: the caller must `write` and then `publish` or `drop` these.
        """
        held: list[str] = []
        claimed: list[str] = []
        with self._locked():
            contents = self._survey()
            self._sort_idle(contents, [name for name, _ in wanted])
            self._make_room(contents, 0)
            share = self._free_share(contents)
            for name, size in wanted:
                facts = contents.chunks.get(name)
                if facts is not None and facts.st_size != size:
                    self._evict(contents, str(self.shared / name), facts.st_size)  # truncated by another program
                    facts = None
                if facts is None and name in contents.claimed:
                    continue
                if facts is None or facts.st_nlink == 1:  # else it takes no room: another holder uses it too
                    if share < size and (self.held or held or claimed):
                        break
                    share -= size
                if facts is not None:
                    os.link(self.shared / name, self.own / name)
                    contents.idle.pop(str(self.shared / name), None)
                    held.append(name)
                    continue
                if len(claimed) > contents.files // FILES_PER_CLAIM:
                    break
                if not self._make_room(contents, size):
                    (self.own / "hungry").touch()
                    break
                with open(self._part(name), "wb") as f:
                    f.truncate(size)
                contents.total += size
                claimed.append(name)
            self.held.update(held)
        return held, claimed

    def _sort_idle(self, contents: _Contents, wanted: list[str]) -> None:
        """Sort evictable files in eviction order: least recently released first, then wanted ones by latest need."""
        turn = {str(self.shared / name): -i for i, name in enumerate(wanted)}
        order = sorted(contents.idle, key=lambda path: (path in turn, turn.get(path, contents.idle[path][0])))
        contents.idle = {path: contents.idle[path] for path in order}

    def _make_room(self, contents: _Contents, size: int) -> bool:
        """Evict unused files until `size` more bytes fit; False if they can't."""
        while contents.total + size > contents.limit and contents.idle:
            path = next(iter(contents.idle))
            self._evict(contents, path, contents.idle[path][1])
        return contents.total + size <= contents.limit

    def _evict(self, contents: _Contents, path: str, size: int) -> None:
        os.unlink(path)
        contents.idle.pop(path, None)
        if os.path.dirname(path) == str(self.shared):
            del contents.chunks[os.path.basename(path)]
        contents.total -= size

    def _free_share(self, contents: _Contents) -> float:
        """Bytes this holder may still take: unlimited unless another holder is waiting for room."""
        if not contents.hungry:
            return math.inf
        mine = [contents.chunks[name] for name in self.held if name in contents.chunks]
        return contents.limit / (1 + contents.hungry) - sum(f.st_size / max(1, f.st_nlink - 1) for f in mine)

    def _survey(self) -> _Contents:
        """Count all files, and clean up after dead holders."""
        contents = _Contents(self.budget_bytes)
        living = {self.id}
        with os.scandir(self.folder) as entries:
            folders = list(entries)
        for entry in folders:
            if (match := _HOLDER.fullmatch(entry.name)) is None or match[2] == self.id:
                continue
            if _is_dead(entry.path):
                shutil.rmtree(entry.path)
                continue
            living.add(match[2])
            contents.limit = min(contents.limit, int(match[1]))
            with contextlib.suppress(FileNotFoundError):
                contents.hungry += time.time() - os.stat(f"{entry.path}/hungry").st_mtime < HUNGRY_SECONDS
        contents.holders = len(living)
        for folder in folders:
            if _SHARED.fullmatch(folder.name) is None:
                continue
            same = folder.name == self.shared.name
            with os.scandir(folder.path) as entries:
                for entry in entries:
                    match = _PART.fullmatch(entry.name)
                    if match is not None and match[2] not in living:
                        os.unlink(entry.path)
                        continue
                    facts = entry.stat(follow_symlinks=False)
                    contents.total += facts.st_size
                    contents.files += 1
                    if match is not None:
                        if same:
                            contents.claimed.add(match[1])
                        continue
                    if facts.st_nlink == 1:
                        contents.idle[entry.path] = facts.st_ctime_ns, facts.st_size
                    if same:
                        contents.chunks[entry.name] = facts
        return contents

    def _part(self, name: str) -> Path:
        return self.shared / f"{name}.{self.id}.part"

    def write(self, name: str, offset: int, data: bytes) -> None:
        """Write bytes of a claimed file."""
        with open(self._part(name), "r+b", buffering=0) as f:
            f.seek(offset)
            done = 0
            while done < len(data):
                done += f.write(data[done:])

    def publish(self, name: str) -> None:
        """Give a completed claimed file its name; it is then held."""
        part = self._part(name)
        sync_file(part)
        with self._locked():
            os.link(part, self.own / name)
            os.rename(part, self.shared / name)
        self.held.add(name)

    def drop(self, name: str) -> None:
        """Give up a claimed file."""
        self._part(name).unlink(missing_ok=True)

    def release(self, name: str) -> None:
        """Release a file; it stays until its room is needed."""
        self.held.discard(name)
        (self.own / name).unlink()

    def close(self, keep: bool = True) -> None:
        """Release everything; without `keep` the last holder to leave removes all files."""
        if not self._descriptors:
            return
        with contextlib.suppress(FileNotFoundError), self._locked():  # the folder may be gone
            for part in self.shared.glob(f"*.{self.id}.part"):
                part.unlink()
            shutil.rmtree(self.own)
            if not keep and (contents := self._survey()).holders == 1:
                for path in contents.idle:
                    os.unlink(path)
        self.held.clear()
        self._close_descriptors()


def _is_dead(holder: str) -> bool:
    descriptor = open_folder(holder)
    try:
        lock(descriptor, wait=False)
    except BlockingIOError:
        return False
    else:
        return True
    finally:
        os.close(descriptor)
