"""docs/architecture.md and docs/code_walks.md match the code: the diagram, and every file and name on the pages."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "docs" / "architecture.md", ROOT / "docs" / "code_walks.md"]


def names_in(path: Path) -> set[str]:
    """Functions, classes, methods (`Class.method`) and assigned names at the top level of a file."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def faults(text: str) -> list[str]:
    """Files and names on the page that do not exist in the code."""
    gone = [p for p in re.findall(r"`([\w/]+\.(?:py|md|sh))`", text) if "/" in p and not (ROOT / p).exists()]
    for name, path in re.findall(r"`([\w.]+)`\s+\(`([\w/]+\.py)`\)", text):
        if (ROOT / path).exists() and name not in names_in(ROOT / path):
            gone.append(f"{name} ({path})")
    return gone


def test_diagram_matches_the_code() -> None:
    done = subprocess.run([sys.executable, str(ROOT / "docs" / "draw_architecture.py"), "--check"], cwd=ROOT)
    assert done.returncode == 0


def test_files_and_names_on_the_pages_exist() -> None:
    assert [fault for page in PAGES for fault in faults(page.read_text(encoding="utf-8"))] == []


def test_a_removed_name_is_found() -> None:
    where = "\n(`pretrain/loop.py`)"
    text = f"`no_such`{where}, `pretrain/nothing.py`, `fit`{where}, `Run.fault`{where}"
    assert faults(text) == ["pretrain/nothing.py", "no_such (pretrain/loop.py)", "Run.fault (pretrain/loop.py)"]
