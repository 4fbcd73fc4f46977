"""Releases: publishing a run to a folder and to a stand-in for a hub, and verifying them."""

from __future__ import annotations

import fcntl
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hub_stand_in import TOKEN, HubStandIn
from running import flags, script, train_in_process

from lit_model.load import load_tensors
from pretrain.release.verify import open_folder, verify


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of three steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("release") / "run"
    settings = {"train__max_steps": 3, "save__every_steps": 1, "data__val": None, "model__n_layer": 1}
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


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubStandIn]:
    """A stand-in that huggingface_hub uses, with a token that may write."""
    constants = pytest.importorskip("huggingface_hub.constants")
    stand_in = HubStandIn()
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    for name, value in {"HF_ENDPOINT": stand_in.url, "HF_TOKEN": TOKEN}.items():
        monkeypatch.setenv(name, value)
    for name, value in {
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_PROGRESS_BARS": True,
    }.items():
        monkeypatch.setattr(constants, name, value)
    yield stand_in
    stand_in.close()


def faults(folder: Path) -> list[str]:
    return [str(fault) for fault in verify(open_folder(folder)).faults]


def error(*arguments: object) -> str:
    """The error of a command that must fail, in one line."""
    done = script("publish.py", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: "), (done.returncode, done.stdout, done.stderr)
    assert len(done.stderr.splitlines()) == 1, done.stderr
    return done.stderr


TO_HUB = ("--to", "hub", "--repo", "me/model", "--license", "apache-2.0")


def test_release_is_whole_and_opens(run: Path, release: Path) -> None:
    done = script("publish.py", "--verify", release)
    assert done.returncode == 0, done.stdout
    assert "3 revisions, no fault" in done.stdout
    assert sorted(p.name for p in release.iterdir()) == ["main", "step1", "step2", "step3"]
    for step in (1, 2, 3):
        _, published = load_tensors(release / f"step{step}")
        _, trained = load_tensors(run / f"iter-{step:08d}-ckpt.pth")
        assert all(torch.equal(published[name], trained[name]) for name in trained)
    traced = script("trace_data.py", "verify", release / "step2" / "run")
    assert (traced.returncode, "2 steps checked" in traced.stdout) == (0, True), traced.stdout
    card = (release / "step2" / "README.md").read_text()
    assert "license: apache-2.0" in card and "| Tokens seen | 512 |" in card
    before = {path: path.stat().st_mtime_ns for path in release.rglob("*")}
    assert script("publish.py", run, "--to", release).returncode == 0
    assert {path: path.stat().st_mtime_ns for path in release.rglob("*")} == before


def test_exchanged_weights_and_another_head_are_found(copy: Path) -> None:
    shutil.copy(copy / "step3" / "model.safetensors", copy / "step1" / "model.safetensors")
    assert faults(copy) == [
        "step1: model.safetensors: its SHA-256 is not that of the manifest",
        "step1: model.safetensors: the weights are not those that the manifest names",
    ]
    done = script("publish.py", "--verify", copy, "--head", "0" * 64)
    assert done.returncode == 1 and f"step3: release.json: the head is not {'0' * 64}" in done.stdout


def test_hub(run: Path, hub: HubStandIn, release: Path) -> None:
    """Published in spite of rate limits, each large file sent once; verified by hashes; a fault is named."""
    limited = iter([429, None, 503] + [None] * 10**6)
    hub.refuse = lambda method, path: next(limited) if hub.large else None
    done = script("publish.py", run, *TO_HUB, "--training_state", "none")
    assert done.returncode == 0, done.stderr
    hub.refuse = lambda method, path: None
    repository = hub.repositories["me/model"]
    assert repository.private and set(repository.tags) == {"step1", "step2", "step3"}
    assert set(hub.uploads.values()) == set(hub.committed.values()) == {1}
    sent = len(hub.requests)
    assert script("publish.py", run, *TO_HUB).returncode == 0
    assert not [request for request in hub.requests[sent:] if request.startswith(("POST", "PUT"))]
    done = script("publish.py", "--verify", "me/model")
    assert (done.returncode, "3 revisions, no fault" in done.stdout) == (0, True), done.stdout
    files = repository.commits[repository.tags["step1"]]
    files["model.safetensors"] = repository.commits[repository.branches["main"]]["model.safetensors"]
    done = script("publish.py", "--verify", "me/model")
    assert (done.returncode, "step1: model.safetensors: its hash is not" in done.stdout) == (1, True), done.stdout


def test_bad_input(run: Path, release: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "is not a run folder" in error(tmp_path, "--to", tmp_path / "out")
    assert f"--to {run} holds" in error(run, "--to", run)
    assert "is no release" in error("--verify", run)
    assert "no such folder" in error("--verify", tmp_path / "nowhere")
    assert "needs --license" in error(run, *TO_HUB[:-2])
    assert "needs --repo" in error(run, "--to", "hub", "--license", "mit")
    with open(run / ".lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "the run is still training" in error(run, "--to", tmp_path / "out")
    other = shutil.copytree(run, tmp_path / "other")
    record = other / "datapoints"
    for path in record.glob("*.parquet"):
        path.rename(path.with_name(path.name.replace("00000003", "00000002")))
    assert "iter-00000003-ckpt.pth has no record" in error(other, "--to", tmp_path / "out")
    shutil.rmtree(record)
    assert "has no datapoint record" in error(other, "--to", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_of_a_hub(run: Path, hub: HubStandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "refuses access to me/model (HTTP 401): log in with" in error(run, *TO_HUB)
    assert "refuses access" in error("--verify", "me/model")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "me/model is not on" in error("--verify", "me/model")
    assert not hub.repositories
    hub.close()
    assert "cannot be reached" in error(run, *TO_HUB)
