"""Windows and macOS, by static means and stand-ins: no machine of theirs is needed, and none has run this.

- Every module imports without the modules and names that Windows lacks; only lit_files/platform.py asks for the system.
- The single-process way (tokenizer, preparation, training, resume, evaluation, conversion, generation) runs without
  them, where open files cannot be removed or renamed.
- mypy finds no name that a system lacks.
- On Linux the command of a pipeline ends with the pipeline, however that ends.
"""

from __future__ import annotations

import ast
import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from every_step import every_step
from other_systems import PACKAGES, ROOT, all_modules, modules_of

OTHER = ROOT / "tests" / "harness" / "other_systems.py"
ASKS = {"sys.platform", "os.name", "platform.system", "platform.win32_ver", "platform.mac_ver"}
EXEMPT = {"lit_files/platform.py", "scripts/install.py"}  # install.py runs before anything is installed


def run_as(system: str, *command: object, folder: Path = ROOT) -> str:
    done = subprocess.run(
        [sys.executable, OTHER, system, *map(str, command)], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_module_imports_as_on_windows() -> None:
    assert len(list(all_modules())) > 200
    run_as("win32", "--import")


def test_platform_imports_as_on_macos() -> None:
    """The other modules do not depend on the system, as the next test shows."""
    run_as("darwin", "--import", "lit_files.platform", "lit_files.lock", "lit_files.publish", "lit_files.mapping")


def test_one_module_differs_by_system() -> None:
    """No other module asks for the system, or names in a function what Windows or macOS lack."""
    systems = {system: modules_of(system) for system in ("win32", "darwin")}
    found = []
    for file in sorted(f for package in PACKAGES for f in (ROOT / package).rglob("*.py")):
        name = file.relative_to(ROOT).as_posix()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if name not in EXEMPT else ():
            if not (isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)):
                continue
            lacking = [s for s, known in systems.items() if (m := known.get(node.value.id)) and m._lacks(node.attr)]
            if lacking or ast.unparse(node) in ASKS:
                found.append(f"{name}: {ast.unparse(node)}")
    assert set(found) == {"pretrain/preflight/doctor.py: platform.system"}  # for its first line


def test_the_workflow_calls_our_scripts_on_every_system() -> None:
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "test.yml").read_text(encoding="utf-8"))["jobs"]
    matrix = jobs["test"]["strategy"]["matrix"]
    assert [name.partition("-")[0] for name in matrix["system"]] == ["ubuntu", "macos", "windows"]
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"]
    called = {word for s in jobs["test"]["steps"] for word in s.get("run", "").split() if word.startswith("scripts/")}
    assert "scripts/run_tests.py" in called and all((ROOT / script).is_file() for script in called)


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_a_command_ends_with_its_pipeline(tmp_path: Path) -> None:
    command = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    code = f"import sys; from pretrain.pipeline.steps import call; call([sys.executable, '-c', {command!r}])"
    pipeline = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL)
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert pipeline.poll() is None
        time.sleep(0.02)
    child = int((tmp_path / "pid").read_text())
    pipeline.send_signal(signal.SIGKILL)
    pipeline.wait()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{child}/stat").exists() and Path(f"/proc/{child}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the command runs on without its pipeline"
        time.sleep(0.02)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_from_text_to_a_generated_text(system: str, tmp_path: Path) -> None:
    every_step(functools.partial(run_as, system, folder=tmp_path), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("system", ["win32", "darwin"])
def test_types_for_the_system(system: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--platform", system, "--cache-dir", f".mypy_cache/{system}", *PACKAGES],
        cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
