"""The commands of every step, as a user types them: `make smoke`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from every_step import every_step


@pytest.mark.slow
@pytest.mark.smoke
def test_from_text_to_a_generated_text(tmp_path: Path) -> None:
    def run(*command: object) -> str:
        line = [sys.executable, *map(str, command)]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    every_step(run, tmp_path, more=False)
