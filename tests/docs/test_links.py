"""Every relative link in a Markdown file of the repository leads to a file, and its anchor to a heading there."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
NOT_OURS = ("runs", "build", "dist", "site")
FENCE = re.compile(r"^([ ]*```+).*?^\1[ ]*$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"|^\[[^]]+\]: +(\S+)", re.MULTILINE)


def pages(root: Path) -> list[Path]:
    folders = (p for p in root.iterdir() if p.is_dir() and p.name[0] != "." and p.name not in NOT_OURS)
    return sorted([*root.glob("*.md"), *(page for folder in folders for page in folder.rglob("*.md"))])


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors that GitHub gives the headings of a page; the site's are the same (mkdocs.yml)."""
    found: list[str] = []
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", text, re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        name = re.sub(r"[^\w\- ]", "", shown.lower()).replace(" ", "-")
        found.append(f"{name}-{found.count(name)}" if name in found else name)
    return frozenset([*found, *re.findall(r"<a (?:id|name)=\"([^\"]+)\"", text)])


def broken(root: Path) -> list[str]:
    faults = []
    for page in pages(root):
        text = re.sub(r"`[^`\n]+`", "", FENCE.sub("", page.read_text(encoding="utf-8")))
        for link in filter(None, (first for groups in LINK.findall(text) for first in groups)):
            if re.match(r"[a-z]+:", link):
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            if link.startswith("/") or not target.is_relative_to(root) or not target.exists():
                faults.append(f"{page.relative_to(root)}: {link}: no such file")
            elif anchor and (target.suffix != ".md" or anchor not in anchors(target)):
                faults.append(f"{page.relative_to(root)}: {link}: no such heading")
    return faults


def test_links_and_anchors() -> None:
    assert len(pages(ROOT)) > 40
    assert broken(ROOT) == []


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("b.md", None),
        ("b.md#a--b", None),
        ("b.md#a-b-c_d", None),
        ("b.md#a-b-c_d-1", None),
        ("#here", None),
        ("../a.py", None),
        ("https://example.org/x", None),
        ("c.md", "no such file"),
        ("../../x.md", "no such file"),
        ("/docs/b.md", "no such file"),
        ("b.md#a-b", "no such heading"),
        ("b.md#not-a-heading", "no such heading"),
        ("../a.py#L1", "no such heading"),
    ],
)
def test_a_broken_link_is_found(link: str, fault: str | None, tmp_path: Path) -> None:
    tmp_path = tmp_path.resolve()
    (tmp_path / "docs").mkdir()
    (tmp_path / "a.py").touch()
    (tmp_path / "docs" / "b.md").write_text(
        "# A / B\n## A, b `c_d`?\n```\n# Not a heading\n[x](no.md)\n```\n## A b c_d\n"
    )
    (tmp_path / "docs" / "a.md").write_text(f"# Here\n`[x](no.md)` [x]({link})\n")
    expected = [] if fault is None else [f"docs/a.md: {link}: {fault}"]
    assert broken(tmp_path) == expected
