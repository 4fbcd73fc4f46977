"""lit_files.publish: a process killed at any rename, link, sync or write leaves the complete old or new content."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lit_files.publish import (
    build_folder,
    create_json,
    publish,
    replace_file,
    replace_folder,
    scratch_folder,
    write_json,
    write_text,
)

OLD, NEW = "old" * 1000, "new" * 2000
KILLED = 86
CALLS = ("rename", "link", "fsync")


def write_file(path: Path) -> None:
    with replace_file(path) as temporary:
        temporary.write_text(NEW)


def publish_file(path: Path) -> None:
    other = path.with_name("other")
    other.write_text(NEW)
    publish(other, path)


def build(path: Path, replace: bool) -> None:
    with build_folder(path, replace=replace) as temporary:
        (temporary / "inner").mkdir()
        for name in ("a", "inner/b"):
            (temporary / name).write_text(NEW)


def replace_by_folder(path: Path) -> None:
    other = path.with_name("other")
    (other / "inner").mkdir(parents=True, exist_ok=True)
    for name in ("a", "inner/b"):
        (other / name).write_text(NEW)
    replace_folder(other, path)


ACTIONS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "write_text": (lambda path: write_text(path, NEW), "file"),
    "write_json": (lambda path: write_json(path, NEW), "file"),
    "replace_file": (write_file, "file"),
    "publish": (publish_file, "file"),
    "create_json": (lambda path: create_json(path, NEW), "nothing"),
    "build_folder": (lambda path: build(path, replace=False), "nothing"),
    "build_folder, replacing": (lambda path: build(path, replace=True), "folder"),
    "replace_folder": (replace_by_folder, "folder"),
}


def make(path: Path, old: str) -> None:
    if old == "file":
        path.write_text(OLD)
    elif old == "folder":
        path.mkdir()
        (path / "a").write_text(OLD)


def content(path: Path) -> Any:
    """A file's text, a folder's files by name, or None if the path does not exist."""
    if path.is_dir():
        return {str(p.relative_to(path)): p.read_text() for p in path.rglob("*") if p.is_file()}
    return path.read_text() if path.exists() else None


def in_child(work: Callable[[], Any]) -> int:
    """Run in a forked process; returns its exit status, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def killed_at(number: int, work: Callable[[], Any]) -> int:
    """Run in a forked process that exits just before its `number`-th call of one of CALLS."""

    def run() -> None:
        calls = iter(range(1, 1000))

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> None:
                if next(calls) == number:
                    os._exit(KILLED)
                real(*arguments)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        work()

    return in_child(run)


def killed_in_write(size: int, work: Callable[[], Any]) -> int:
    """Run in a forked process that the kernel kills when it writes beyond `size` bytes of a file."""

    def run() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()

    return in_child(run)


@pytest.mark.parametrize("name", ACTIONS)
def test_a_kill_leaves_either_the_old_or_the_new_content(name: str, tmp_path: Path) -> None:
    action, old = ACTIONS[name]
    make(tmp_path / "old", old)
    before = content(tmp_path / "old")
    action(tmp_path / "whole")
    after = content(tmp_path / "whole")
    assert after not in (None, before)

    def trial(number: int, kill: Callable[[Callable[[], Any]], int]) -> int:
        path = tmp_path / str(number) / "x"
        path.parent.mkdir()
        make(path, old)
        status = kill(lambda: action(path))
        found = content(path)
        if found is None and old == "folder":  # killed between its two renames
            found = content(path.with_name(".x.replaced"))
        assert found in (before, after)
        if found == before:
            action(path)  # not affected by leftovers of the killed process
        assert content(path) == after
        return status

    number = 1
    while trial(number, lambda work: killed_at(number, work)) == KILLED:  # noqa: B023
        number += 1
    assert number >= 3, "a rename and a sync of its folder"
    for size in (0, 1, len(NEW) // 2, len(NEW) - 1):
        assert trial(number + 1 + size, lambda work: killed_in_write(size, work)) == -signal.SIGXFSZ  # noqa: B023


@pytest.mark.parametrize("name", ACTIONS)
def test_content_is_synced_before_the_rename_and_the_folder_after(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So a power loss, too, leaves either the old or the new content."""
    action, old = ACTIONS[name]
    path = tmp_path / "x"
    make(path, old)
    synced: list[str] = []
    unsynced: set[Path] = set()  # folders with a new name in them
    fsync, rename, link = os.fsync, os.rename, os.link

    def on_fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        unsynced.discard(Path(synced[-1]))
        fsync(descriptor)

    def on_name(call: Callable[[Path, Path], None]) -> Callable[[Path, Path], None]:
        def named(source: Path, target: Path) -> None:
            if target == path and name not in ("publish", "replace_folder"):  # its callers have synced it
                assert {str(p) for p in (source, *source.rglob("*"))} <= {*synced, *aliases}
            call(source, target)
            unsynced.add(target.parent)
            aliases.add(str(target))

        return named

    aliases: set[str] = set()  # synced under an earlier name
    monkeypatch.setattr(os, "fsync", on_fsync)
    monkeypatch.setattr(os, "rename", on_name(rename))
    monkeypatch.setattr(os, "link", on_name(link))
    action(path)
    assert not unsynced and content(path) is not None


def test_an_error_leaves_the_old_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the block or the last rename raises, the old folder is restored, and no temporary one remains."""
    path = tmp_path / "x"
    make(path, "folder")
    rename = os.rename

    def fail(source: Path, target: Path) -> None:
        if target == path and not str(source).endswith(".replaced"):
            raise OSError("no rename")
        rename(source, target)

    with pytest.raises(KeyboardInterrupt), build_folder(path, replace=True):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="no rename"):
        build(path, replace=True)
    monkeypatch.undo()
    with pytest.raises(OSError, match="not empty"):
        build(path, replace=False)
    assert content(path) == {"a": OLD} and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_leftovers_of_dead_processes_are_removed_and_those_of_live_ones_kept(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def build_and_die() -> None:
        with build_folder(path) as temporary:
            (temporary / "a").write_text(NEW)
            os._exit(KILLED)

    assert in_child(build_and_die) == KILLED
    assert len(list(tmp_path.iterdir())) == 1 and content(path) is None
    with build_folder(path) as mine:
        assert list(tmp_path.iterdir()) == [mine]
        assert in_child(lambda: build(path, replace=False)) == 0, "another process builds the same meanwhile"
        assert mine.exists() and content(path) == {"a": NEW, "inner/b": NEW}
        shutil.rmtree(path)
    assert list(tmp_path.iterdir()) == [path]


def test_intermediate_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "x"

    def work_and_die() -> None:
        with scratch_folder(path) as first, scratch_folder(path) as second:  # one does not take the other's
            assert first.is_dir() and second.is_dir() and first != second
            (first / "a").write_text(NEW)
            os._exit(KILLED)

    assert in_child(work_and_die) == KILLED and len(list(tmp_path.iterdir())) == 2
    with scratch_folder(path) as folder:
        assert list(tmp_path.iterdir()) == [folder]
    assert not list(tmp_path.iterdir())
