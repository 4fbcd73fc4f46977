"""The pages of docs/: short, and every message that a guide quotes is one that the code prints."""

from __future__ import annotations

import ast
import functools
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST_LINES = 200
PACKAGES = ("cluster", "lit_data", "lit_eval", "lit_files", "lit_model", "pretrain", "scripts")
# Of torch, the operating system and NCCL.
OTHERS = (
    "OutOfMemoryError: CUDA out of memory",
    "No space left on device",
    "Disk quota exceeded",
    "unhandled cuda error",
)


def test_no_page_is_long() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    lines = {page.relative_to(ROOT): len(page.read_text(encoding="utf-8").splitlines()) for page in pages}
    assert {page: n for page, n in lines.items() if n > MOST_LINES} == {}


@functools.cache
def printed_texts() -> str:
    """All texts in the code, one a line; \\0 for each value in a text."""
    found = []
    for path in (path for package in PACKAGES for path in sorted((ROOT / package).rglob("*"))):
        if path.suffix == ".py":
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(v.value) if isinstance(v, ast.Constant) else "\0" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
        elif path.suffix in (".sh", ".sbatch"):
            found.append(path.read_text(encoding="utf-8"))
    return "\n".join(found)


def quoted(page: str) -> list[str]:
    """The messages in the first column of the tables of problems, without the placeholders of values."""
    pieces, inside = [], False
    for line in page.splitlines():
        first = line.split(" | ")[0]
        inside = line.startswith("|") and (inside or first in ("| message", "| you see"))
        for message in re.findall(r"`([^`]* [^`]*)`", first) if inside else ():
            pieces += [p.strip() for p in re.split(r"\.\.\.|\b(?:[NMK]|NAME|DIR|FILE|HOST|RUN)\b", message)]
    return [piece for piece in pieces if len(piece) > 3 and not piece.startswith("--")]


def test_quoted_messages_are_printed() -> None:
    texts = printed_texts()
    guides = sorted((ROOT / "docs" / "guides").glob("*.md"))
    pieces = {piece: guide.name for guide in guides for piece in quoted(guide.read_text(encoding="utf-8"))}
    assert len(pieces) > 80
    assert {p: name for p, name in pieces.items() if p not in texts and not any(o in p for o in OTHERS)} == {}


def test_a_message_that_is_not_printed_is_found() -> None:
    page = "| message | do |\n|---|---|\n| `rank N has a cold`, `--flag N` | tea |\n\n`not in the table`\n"
    assert quoted(page) == ["rank", "has a cold"] and "has a cold" not in printed_texts()


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="needs git and its checkout")
def test_git_ignores_the_folders_that_the_guides_write() -> None:
    pages = [ROOT / "README.md", ROOT / "docs" / "commands.md", *(ROOT / "docs" / "guides").glob("*.md")]
    flags = r"--(?:output|out_dir|to|hf|html|png)[ =]([a-z_]+/|[\w-]+\.(?:pth|gguf|html|png))"
    written = {name for page in pages for name in re.findall(flags, page.read_text(encoding="utf-8"))}
    line = ["git", "check-ignore", "--no-index", "--stdin"]
    ignored = subprocess.run(line, input="\n".join(written), capture_output=True, text=True, cwd=ROOT, check=False)
    assert {"data/", "hf/", "tokenizer/", "runs/"} <= written == set(ignored.stdout.split())
