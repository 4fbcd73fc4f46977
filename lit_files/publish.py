"""Durable files: sync a file or folder, and publish new content under its final name, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import glob
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from lit_files.platform import FOLDER_LOCKS, lock, open_folder, rename, sync


def sync_file(file: Path | IO[Any]) -> None:
    """Make a file's content, or a folder's entries, durable. An open file is flushed first."""
    if isinstance(file, Path):
        sync(file)
    else:
        file.flush()
        os.fsync(file.fileno())


def sync_tree(folder: Path) -> None:
    """Make everything in a folder durable. A file that was synced before costs little."""
    for parent, _, names in os.walk(folder, topdown=False):
        for name in names:
            sync_file(Path(parent, name))
        sync_file(Path(parent))


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder, whose content is synced, to its final name, and make the name durable.

    An existing file is replaced. A folder can only replace an empty one (OSError otherwise); see `replace_folder`.
    """
    rename(temporary, path)
    sync_file(path.parent)


def replace_folder(temporary: Path, path: Path) -> None:
    """Publish a finished folder, whose content is synced, in place of the folder `path` if there is one.

    This takes two renames: a process killed between them leaves the old folder whole as `.NAME.replaced`. After an
    error the old folder is back under its name.
    """
    aside = path.with_name(f".{path.name}.replaced")
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(path, aside)
    try:
        publish(temporary, path)
    except BaseException:
        if aside.exists() and not path.exists():
            with contextlib.suppress(OSError):
                os.rename(aside, path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def link_or_copy(source: Path, target: Path) -> bool:
    """Create the file `target` as a hard link to `source`, or as a copy where that is not possible.

    Symbolic links are followed. The new name is not yet durable. Returns whether it is a link.
    """
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; if the block ends well, sync the file it wrote there and publish it.

    After an exception the temporary file is removed and `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync_file(temporary)
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def build_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a new, empty folder beside `path`; if the block ends well, sync everything in it and publish it.

    An existing folder is replaced if `replace`, as by `replace_folder`; else it must be empty (OSError). After an
    exception the temporary folder is removed and `path` is as before. What a killed process left is removed by the next
    one that builds the same folder.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    _remove_leftovers(path)
    shutil.rmtree(temporary, ignore_errors=True)
    holder = _hold(temporary)
    try:
        yield temporary
        sync_tree(temporary)
        if replace:
            replace_folder(temporary, path)
        else:
            publish(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    finally:
        _release(holder)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Yield a new, empty folder beside `path` for intermediate files, removed at the end of the block.

    What a killed process left is removed by the next one that calls this or `build_folder` for the same path.
    """
    _remove_leftovers(path)
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"))
    holder = _hold(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        _release(holder)


def _hold(folder: Path) -> int | None:
    """Create a folder and lock it as long as the returned descriptor is open, so that it is no leftover.

    None where folders cannot be locked: leftovers are not removed there.
    """
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        if not FOLDER_LOCKS:
            return None
        descriptor = open_folder(folder)
        with contextlib.suppress(OSError):  # a file system without flock: nothing is removed there either
            lock(descriptor)
        if folder.exists():  # else it was taken for a leftover before it was locked
            return descriptor
        os.close(descriptor)


def _release(holder: int | None) -> None:
    if holder is not None:
        os.close(holder)


def _remove_leftovers(path: Path) -> None:
    """Remove temporary folders for `path` whose process no longer lives."""
    for folder in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(OSError):  # in use, on a file system without flock, or gone by now
            descriptor = open_folder(folder)
            try:
                lock(descriptor, wait=False)
                shutil.rmtree(folder)
            finally:
                os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically and durably."""
    with replace_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file atomically and durably."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False))


WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


def create_json(path: Path, content: Any) -> bool:
    """Write a JSON file that must not exist yet: of several processes that call this at once, on any hosts, one gets
    True, and the file is whole from the first moment."""
    mine = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        write_json(mine, content)
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        if path.exists():
            return False
        os.rename(mine, path)  # without hard links two processes may both get True
    finally:
        mine.unlink(missing_ok=True)
    sync_file(path.parent)
    return True
