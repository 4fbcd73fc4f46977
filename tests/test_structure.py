"""The import rules of the house, read from the syntax trees; and planted violations, each of which must be found.

- lit_model and lit_data import none of our packages but themselves; lit_eval imports these two; pretrain all three;
  scripts and benchmarks anything; nobody imports scripts or benchmarks.
- No import cycle; no import of an own package inside a function.
- No file named utils, helpers, common or misc. No module beside a script that shadows the standard library.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "lit_model": {"lit_model"},
    "lit_data": {"lit_data"},
    "lit_eval": {"lit_eval", "lit_model", "lit_data"},
    "pretrain": {"pretrain", "lit_eval", "lit_model", "lit_data"},
    "scripts": {"scripts", "pretrain", "lit_eval", "lit_model", "lit_data"},
    "benchmarks": {"benchmarks", "pretrain", "lit_eval", "lit_model", "lit_data"},
}
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
RUN_BY_PATH = ("pretrain", "scripts", "benchmarks")


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int, bool]]:
    """(module, line, inside a function) of every import; `from a import b` gives a and a.b. Relative: resolved."""

    def walk(node: ast.AST, inside: bool) -> Iterator[tuple[str, int, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, inside
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    above = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*above, base] if base else above)
                yield base, child.lineno, inside
                for alias in child.names:
                    yield f"{base}.{alias.name}", child.lineno, inside
            else:
                function = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
                yield from walk(child, inside or function)

    yield from walk(tree, False)


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """A cycle of modules, first and last the same; empty where there is none."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for target in sorted(edges[module]):
            cycle = visit(target, [*path, module])
            if cycle:
                return cycle
        done.add(module)
        return []

    for start in sorted(edges):
        cycle = visit(start, [])
        if cycle:
            return cycle
    return []


def violations(root: Path) -> list[str]:
    """Every breach of the rules under `root`, one sentence each."""
    found: list[str] = []
    files = {f: f.relative_to(root) for p in ALLOWED for f in sorted((root / p).rglob("*.py"))}
    names: dict[Path, str] = {}
    for file, relative in files.items():
        parts = relative.with_suffix("").parts
        names[file] = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    modules = set(names.values())
    edges: dict[str, set[str]] = {module: set() for module in modules}

    for file, relative in files.items():
        own = relative.parts[0]
        if file.stem in NAMELESS or any(part in NAMELESS for part in relative.parts):
            found.append(f"{relative}: its name does not say what it is for")
        if own in RUN_BY_PATH and len(relative.parts) == 2 and file.stem in sys.stdlib_module_names:
            found.append(f"{relative}: shadows the standard library's {file.stem}")
        package = names[file] if file.name == "__init__.py" else names[file].rpartition(".")[0]
        previous = ""
        for module, line, inside in imports(ast.parse(file.read_text(encoding="utf-8")), package):
            top = module.split(".")[0]
            if top not in ALLOWED:
                continue
            if top not in ALLOWED[own]:
                found.append(f"{relative}:{line}: {own} imports {module}")
            if inside and not module.startswith(f"{previous}."):
                found.append(f"{relative}:{line}: import of {module} inside a function")
            previous = module  # of `from a import b`, a alone is reported
            if module in modules and module != names[file]:
                edges[names[file]].add(module)
    cycle = find_cycle(edges)
    if cycle:
        found.append(f"import cycle: {' -> '.join(cycle)}")
    return found


def test_rules_hold() -> None:
    assert violations(ROOT) == []


def test_the_tree_was_read() -> None:
    for package in ("lit_model", "lit_data", "lit_eval", "pretrain", "scripts"):
        assert list((ROOT / package).rglob("*.py")), package


def test_tests_do_not_shadow_packages() -> None:
    """A tests/pretrain/__init__.py would hide the real package."""
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ({"lit_model/a.py": "import lit_data.b", "lit_data/b.py": ""}, "lit_model imports lit_data.b"),
        ({"lit_data/a.py": "from lit_model import config"}, "lit_data imports lit_model"),
        ({"lit_eval/a.py": "from pretrain.loop import fit"}, "lit_eval imports pretrain.loop"),
        ({"pretrain/a.py": "import scripts.b"}, "pretrain imports scripts.b"),
        ({"benchmarks/a.py": "from scripts import b"}, "benchmarks imports scripts"),
        ({"lit_data/a.py": "def f():\n    from lit_data import b"}, "inside a function"),
        ({"lit_data/a.py": "class A:\n    async def f(self):\n        import lit_data.b"}, "inside a function"),
        ({"lit_data/a.py": "if True:\n    from .b import x", "lit_data/b.py": "import lit_data.a"}, "import cycle"),
        (
            {
                "lit_data/a.py": "from lit_data import b",
                "lit_data/b.py": "from . import c",
                "lit_data/c.py": "from .a import x",
            },
            "import cycle",
        ),
        ({"lit_model/hf/utils.py": ""}, "does not say what it is for"),
        ({"lit_model/helpers/a.py": ""}, "does not say what it is for"),
        ({"pretrain/signal.py": ""}, "shadows the standard library's signal"),
        ({"scripts/statistics.py": ""}, "shadows the standard library's statistics"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, planted: dict[str, str], complaint: str) -> None:
    for name, source in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert any(complaint in v for v in violations(tmp_path)), violations(tmp_path)


def test_what_is_allowed_is_not_reported(tmp_path: Path) -> None:
    allowed = {
        "lit_model/a.py": "import torch\ndef f():\n    import flash_attn",
        "lit_model/b.py": "from lit_model import a\nfrom lit_model.a import f",
        "lit_data/signal.py": "import signal",  # not run by path: nothing is shadowed
        "lit_eval/a.py": "import lit_model.a, lit_data.signal",
        "pretrain/a.py": "import lit_eval.a",
        "scripts/b.py": "from pretrain.a import x",
    }
    for name, source in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert violations(tmp_path) == []
