"""The tests that draw random models of every family, with three times as many examples."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from running import ROOT

FILES = sorted(path for path in Path(__file__).parent.glob("test_*.py") if "import examples\n" in path.read_text())
FILES += sorted(Path(__file__).parent.glob("test_hf_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_many_examples(path: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--hypothesis-profile=many", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
