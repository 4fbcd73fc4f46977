"""The import rules, checked on the syntax trees; and planted violations, each of which must be found.

- lit_files imports none of our packages and all others may import it; lit_model and lit_data import no other package of
  ours; lit_eval imports these two as well; pretrain all four; scripts and benchmarks anything; nobody imports scripts
  or benchmarks.
- No import cycle; no import of one of our packages inside a function, except in `main` of an entry point (a script or
  fabric_train.py), which imports its work after it has parsed its arguments: --help and a mistake in them take no
  seconds (tests/scripts/test_start_up.py).
- No file named utils, helpers, common or misc. No module next to a script that shadows the standard library.
- Module-level imports in lit_model are limited to torch, safetensors and the standard library.
- Lightning Fabric is imported through pretrain/fabric.py only, which avoids its unnecessary imports at start-up.
- No __init__.py in tests. No tracked text file names a package registry's host or a folder of one machine.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "lit_files": {"lit_files"},
    "lit_model": {"lit_model", "lit_files"},
    "lit_data": {"lit_data", "lit_files"},
    "lit_eval": {"lit_eval", "lit_files", "lit_model", "lit_data"},
    "pretrain": {"pretrain", "lit_files", "lit_eval", "lit_model", "lit_data"},
    "scripts": {"scripts", "lit_files", "pretrain", "lit_eval", "lit_model", "lit_data"},
    "benchmarks": {"benchmarks", "lit_files", "pretrain", "lit_eval", "lit_model", "lit_data"},
}
# Third-party packages that a package may import at module level; optional ones are imported inside functions.
FOREIGN = {"lit_model": {"torch", "safetensors"}}
# Split into pieces so that this file passes its own test.
REGISTRY_HOSTS = (
    r"pypi\." + "org",
    "python" + "hosted",
    r"download\.py" + r"torch\.org",
    r"npm" + r"js\.(?:org|com)",
    r"(?:conda\.)?ana" + r"conda\.(?:org|com)",
    r"crates\." + "io",
    r"deb\.deb" + r"ian\.org",
    r"proxy\.golang\." + "org",
)
MACHINE_FOLDERS = ("work", "root")
UNWANTED_TEXT = re.compile(
    "|".join(REGISTRY_HOSTS) + "|" + "|".join(rf"(?<![\w.\-$}}/])/{folder}/" for folder in MACHINE_FOLDERS),
    re.IGNORECASE,
)
NOT_TRACKED = {".git", ".venv", "runs", "build", "dist", "__pycache__", ".hypothesis"}
NAMELESS = {"utils", "util", "helpers", "helper", "common", "misc"}
RUN_BY_PATH = ("pretrain", "scripts", "benchmarks")


def imports(tree: ast.AST, package: str) -> Iterator[tuple[str, int, str]]:
    """(module, line, outermost function or "") of every import; `from a import b` gives a and a.b. Relative: resolved.
    A method counts as `.`."""

    def walk(node: ast.AST, inside: str) -> Iterator[tuple[str, int, str]]:
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
                name = ""
                if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
                    name = child.name if node is tree and isinstance(child, ast.FunctionDef) else "."
                yield from walk(child, inside or name)

    yield from walk(tree, "")


def find_cycle(edges: dict[str, set[str]]) -> list[str]:
    """A cycle of modules, first and last the same; empty if there is none."""
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
    """Every violation of the rules under `root`, one sentence each."""
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
                if top in ("lightning", "lightning_fabric") and relative.as_posix() != "pretrain/fabric.py":
                    found.append(f"{relative}:{line}: {module} comes by pretrain/fabric.py")
                foreign = top not in sys.stdlib_module_names and top not in FOREIGN.get(own, {top})
                if foreign and not inside and not module.startswith(f"{previous}."):
                    found.append(f"{relative}:{line}: {own} imports {module} at its top")
                previous = module
                continue
            if top not in ALLOWED[own]:
                found.append(f"{relative}:{line}: {own} imports {module}")
            entry = own == "scripts" or relative.as_posix() == "pretrain/fabric_train.py"
            if inside and not (entry and inside == "main") and not module.startswith(f"{previous}."):
                found.append(f"{relative}:{line}: import of {module} inside a function")
            previous = module  # of `from a import b`, a alone is reported
            if module in modules and module != names[file]:
                edges[names[file]].add(module)
    cycle = find_cycle(edges)
    if cycle:
        found.append(f"import cycle: {' -> '.join(cycle)}")
    for file in sorted((root / "tests").rglob("__init__.py")):
        found.append(f"{file.relative_to(root)}: hides the real package of that name")
    return found


def tracked_files(root: Path) -> list[Path]:
    """Files that git tracks or would add; outside a checkout, all files except build output and caches."""
    if (root / ".git").exists():
        command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        names = subprocess.run(command, cwd=root, stdout=subprocess.PIPE, check=True, text=True).stdout
        return [root / name for name in sorted(set(names.split("\0")) - {""}) if (root / name).is_file()]
    files: list[Path] = []
    for folder, below, names_here in os.walk(root):
        below[:] = [b for b in below if b not in NOT_TRACKED and not b.endswith(("_cache", ".egg-info"))]
        files += [Path(folder) / name for name in names_here]
    return sorted(files)


def unwanted_text(root: Path) -> list[str]:
    """Lines of tracked text files that name a registry's host or a folder of one machine."""
    found = []
    for file in tracked_files(root):
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:  # not a text file
            continue
        for number, line in enumerate(lines, start=1):
            match = UNWANTED_TEXT.search(line)
            if match:
                found.append(f"{file.relative_to(root)}:{number}: {match.group()}")
    return found


def test_rules_hold() -> None:
    assert violations(ROOT) == []


def test_the_source_tree_was_read() -> None:
    for package in ("lit_files", "lit_model", "lit_data", "lit_eval", "pretrain", "scripts"):
        assert list((ROOT / package).rglob("*.py")), package


def test_no_registry_and_no_folder_of_one_machine_is_named() -> None:
    assert unwanted_text(ROOT) == []


def test_tracked_files_are_found() -> None:
    names = {f.relative_to(ROOT).as_posix() for f in tracked_files(ROOT)}
    assert {"pyproject.toml", "llammlein.def", ".gitignore", "cluster/train.sbatch"} <= names
    assert not [n for n in names if n.startswith((".venv/", "runs/", ".git/"))]


@pytest.mark.parametrize(
    ("planted", "complaint"),
    [
        ({"lit_model/a.py": "import lit_data.b", "lit_data/b.py": ""}, "lit_model imports lit_data.b"),
        ({"lit_data/a.py": "from lit_model import config"}, "lit_data imports lit_model"),
        ({"lit_eval/a.py": "from pretrain.loop import fit"}, "lit_eval imports pretrain.loop"),
        ({"pretrain/a.py": "import scripts.b"}, "pretrain imports scripts.b"),
        ({"benchmarks/a.py": "from scripts import b"}, "benchmarks imports scripts"),
        ({"lit_data/a.py": "def f():\n    from lit_data import b"}, "inside a function"),
        ({"lit_data/a.py": "def main():\n    from lit_data import b"}, "inside a function"),
        ({"scripts/a.py": "def work():\n    from lit_data import b"}, "inside a function"),
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
        ({"lit_model/a.py": "import numpy as np"}, "lit_model imports numpy at its top"),
        ({"lit_model/a.py": "from flash_attn import f"}, "lit_model imports flash_attn at its top"),
        ({"lit_eval/a.py": "import scripts"}, "lit_eval imports scripts"),
        ({"lit_data/common.py": ""}, "does not say what it is for"),
        ({"tests/pretrain/__init__.py": ""}, "hides the real package"),
        ({"pretrain/a.py": "from lightning_fabric import Fabric"}, "comes by pretrain/fabric.py"),
        ({"pretrain/signal.py": ""}, "shadows the standard library's signal"),
        ({"scripts/statistics.py": ""}, "shadows the standard library's statistics"),
    ],
)
def test_planted_violation_is_found(tmp_path: Path, planted: dict[str, str], complaint: str) -> None:
    for name, source in planted.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert any(complaint in v for v in violations(tmp_path)), violations(tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "pip install --index-url https://" + "pypi" + ".org/simple torch",
        "https://" + "download.py" + "torch.org/whl/cpu",
        "cd /" + "work/main",
        'PYTHON = "/' + 'root/python"',
    ],
)
@pytest.mark.parametrize("in_git", [True, False])
def test_planted_text_is_found(tmp_path: Path, line: str, in_git: bool) -> None:
    if in_git:
        subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
        (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text(f"harmless\n{line}\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "log.txt").write_text(line)
    (tmp_path / "weights.bin").write_bytes(b"\xff\xfe" + line.encode())
    assert [f.rpartition(":")[0] for f in unwanted_text(tmp_path)] == ["docs/a.md:2"]


def test_harmless_text_is_not_found(tmp_path: Path) -> None:
    harmless = "at work/life\n$HOME/" + "work/data\nsee https://example.org/" + "root/page\nthe registry of models\n"
    (tmp_path / "a.md").write_text(harmless)
    assert unwanted_text(tmp_path) == []


def test_allowed_imports_are_not_reported(tmp_path: Path) -> None:
    allowed = {
        "lit_model/a.py": "import torch\ndef f():\n    import flash_attn",
        "lit_model/b.py": "from lit_model import a\nfrom lit_model.a import f",
        "lit_data/signal.py": "import signal",  # not run by path: nothing is shadowed
        "lit_eval/a.py": "import lit_model.a, lit_data.signal",
        "pretrain/a.py": "import lit_eval.a",
        "scripts/b.py": "from pretrain.a import x\ndef main():\n    from lit_data import signal",
    }
    for name, source in allowed.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert violations(tmp_path) == []
