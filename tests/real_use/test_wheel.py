"""The wheel holds exactly our packages, and a run works from it, outside of the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from running import ROOT

PACKAGES = ("lit_files", "lit_model", "lit_data", "lit_eval", "pretrain")


@pytest.mark.slow
def test_wheel(tmp_path: Path) -> None:
    source, site = tmp_path / "source", tmp_path / "site"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    pip = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", tmp_path, source]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("llammlein-*.whl")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == {name for name in tracked.split("\0") if name.startswith(tuple(f"{p}/" for p in PACKAGES))}

    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    command = [sys.executable, "-m", "pretrain.fabric_train", "--config", ROOT / "configs" / "debug.yaml"]
    more = ["--train.max_steps", "2", "--optim.warmup_steps", "1", "--out_dir", tmp_path / "run"]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    where = subprocess.run(
        [sys.executable, "-c", "import pretrain; print(pretrain.__path__[0])"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert where.strip() == str(site / "pretrain")
    done = subprocess.run([*command, *more], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "iter-00000002-ckpt.pth").exists()
