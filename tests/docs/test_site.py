"""`mkdocs build --strict` makes the site, which asks no other host for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


class Loaded(HTMLParser):
    """The addresses that a page loads: scripts, style sheets, images, fonts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.add(values.get("href", ""))
        self.found.add(values.get("src", ""))


@pytest.mark.slow
def test_the_site_is_built_and_complete_in_itself(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("material")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    pages = list(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))
    for page in pages:
        loaded = Loaded()
        loaded.feed(page.read_text(encoding="utf-8"))
        assert not [address for address in loaded.found if re.match(r"(https?:)?//", address)], page
        assert 'class="mermaid"' not in page.read_text(encoding="utf-8"), page
    # A link out of docs/ leads to a page with the file; so does one from there.
    assert (tmp_path / "repository" / "CONTRIBUTING" / "index.html").is_file()
    assert list((tmp_path / "repository" / "benchmarks" / "results").glob("*/index.html"))
