"""Generate the import diagram of docs/architecture.md from the code.

    python docs/draw_architecture.py          # rewrites the diagram in docs/architecture.md
    python docs/draw_architecture.py --check  # status 1 if the diagram does not match the code

A box is a folder; the files at the root of `pretrain` form two boxes. An arrow A -> B means that a file in A imports
one in B. Arrows implied by others (A -> C by A -> B -> C) are omitted.
"""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "architecture.md"
PACKAGES = ("scripts", "pretrain", "lit_eval", "lit_model", "lit_data", "lit_files")
# In pretrain: used by every run.
MAIN_PATH = ("fabric_train", "train", "build", "data", "resume", "run", "run_folder", "overview", "loop")
BEGIN, END = "```mermaid\n", "```\n"


def box_of(module: str) -> str | None:
    """The box of one of our modules: its folder, dotted; None for a third-party module."""
    parts = module.split(".")
    if parts[0] not in PACKAGES:
        return None
    if parts[0] == "pretrain" and len(parts) > 1 and ROOT.joinpath("pretrain", f"{parts[1]}.py").exists():
        return "pretrain.main path" if parts[1] in MAIN_PATH else "pretrain.components"
    while len(parts) > 1 and not ROOT.joinpath(*parts).is_dir():
        parts.pop()
    return ".".join(parts)


def find_edges() -> dict[str, set[str]]:
    """Box -> boxes that its files import, excluding itself."""
    edges: dict[str, set[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            if path.name == "__init__.py":
                continue
            here = box_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
            assert here is not None
            targets = edges.setdefault(here, set())
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [f"{node.module}.{alias.name}" for alias in node.names]
                elif isinstance(node, ast.Import):
                    names = [alias.name for alias in node.names]
                else:
                    continue
                targets |= {box for name in names if (box := box_of(name)) is not None and box != here}
    return edges


def reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    """All boxes that `start` imports, directly or indirectly."""
    found: set[str] = set()
    waiting = list(edges[start])
    while waiting:
        box = waiting.pop()
        if box not in found:
            found.add(box)
            waiting += edges[box]
    return found


def reduced(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges without those implied by others. Boxes that import each other keep theirs."""
    below = {box: reachable(box, edges) for box in edges}

    def follows(box: str, target: str) -> bool:
        others = [m for m in edges[box] if m != target and target in below[m] and box not in below[m]]
        # Among boxes that import each other, the first keeps its arrow.
        return any(m not in below[target] or m < target for m in others)

    return {box: {t for t in targets if not follows(box, t)} for box, targets in edges.items()}


def draw() -> str:
    """The diagram as mermaid text."""
    edges = reduced(find_edges())
    ids = {box: re.sub(r"\W", "_", box) for box in edges}
    lines = ["flowchart TD"]
    for package in PACKAGES:
        lines.append(f"  subgraph {package}_ [{package}]")
        for box in sorted(box for box in edges if box.split(".")[0] == package):
            lines.append(f'    {ids[box]}["{box.partition(".")[2] or box}"]')
        lines.append("  end")
    lines += [f"  {ids[box]} --> {ids[target]}" for box in sorted(edges) for target in sorted(edges[box])]
    return "\n".join(lines) + "\n"


def main() -> int:
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    new = draw()
    if "--check" in sys.argv[1:]:
        if old != new:
            print("docs/architecture.md: run python docs/draw_architecture.py", file=sys.stderr)
        return int(old != new)
    PAGE.write_text(before + BEGIN + new + END + after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
