"""Releases: publishing a run to a folder, and verifying it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from running import flags, script, train_in_process

from lit_model.load import load_tensors
from pretrain.release.verify import open_folder, verify


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with a checkpoint after each second."""
    folder = tmp_path_factory.mktemp("release") / "run"
    settings = {"train__max_steps": 6, "save__every_steps": 2, "eval__every_steps": 4, "model__n_layer": 1}
    train_in_process(flags(data, folder, **settings))
    return folder


@pytest.fixture(scope="module")
def release(run: Path) -> Path:
    folder = run.parent / "release"
    done = script("publish.py", run, "--to", folder, "--license", "apache-2.0")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def copy(release: Path, tmp_path: Path) -> Path:
    """A copy to plant faults in, without hard links between revisions."""
    return Path(shutil.copytree(release, tmp_path / "release", symlinks=True))


def faults(folder: Path) -> list[str]:
    return [str(fault) for fault in verify(open_folder(folder)).faults]


def test_release_is_whole_and_opens(run: Path, release: Path) -> None:
    done = script("publish.py", "--verify", release)
    assert done.returncode == 0, done.stdout
    assert "3 revisions, no fault" in done.stdout
    assert sorted(p.name for p in release.iterdir()) == ["main", "step2", "step4", "step6"]
    for step in (2, 4, 6):
        _, published = load_tensors(release / f"step{step}")
        _, trained = load_tensors(run / f"iter-{step:08d}-ckpt.pth")
        assert all(torch.equal(published[name], trained[name]) for name in trained)
    traced = script("trace_data.py", "verify", release / "step4" / "run")
    assert (traced.returncode, "4 steps checked" in traced.stdout) == (0, True), traced.stdout
    card = (release / "step4" / "README.md").read_text()
    assert "license: apache-2.0" in card and "| Tokens seen | 1,024 |" in card


def test_repeated_publication_changes_nothing(run: Path, release: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in release.rglob("*")}
    assert script("publish.py", run, "--to", release).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in release.rglob("*")} == before


def test_exchanged_weights_are_found(copy: Path) -> None:
    shutil.copy(copy / "step6" / "model.safetensors", copy / "step2" / "model.safetensors")
    assert faults(copy) == [
        "step2: model.safetensors: its SHA-256 is not that of the manifest",
        "step2: model.safetensors: the weights are not those that the manifest names",
    ]
