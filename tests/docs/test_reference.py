"""docs/reference/ is up to date with the code that it is written from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent


def test_reference_is_current() -> None:
    command = [sys.executable, str(ROOT / "docs" / "write_reference.py"), "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
