"""Durable files: sync a file or folder, and publish new content under its final name, whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def sync_file(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished file or folder, whose content is synced, to its final name, and make the name durable.

    A file that has the name is replaced. A folder may take the place of an empty one only (OSError otherwise).
    """
    os.replace(temporary, path)
    sync_file(path.parent)


@contextlib.contextmanager
def replace_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; if the block ends well, sync what it wrote there and publish it.

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
    write_json(mine, content)
    try:
        os.link(mine, path)
    except FileExistsError:
        return False
    except OSError as error:  # without hard links two may both get True
        if error.errno not in WITHOUT_LINKS:
            raise
        if path.exists():
            return False
        os.replace(mine, path)
    finally:
        mine.unlink(missing_ok=True)
    sync_file(path.parent)
    return True
