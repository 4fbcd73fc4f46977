"""Releases: publishing a run to a folder and to a stand-in for a hub, and verifying them."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_stand_in import BINARY, TOKEN, Blob, HubStandIn, Repository
from running import flags, script, script_error, train_in_process

from lit_data.record.content import scan_record
from lit_eval.metrics_file import Metrics
from lit_eval.run_facts import parse_settings
from lit_files.publish import link_or_copy
from lit_files.reading import first_line
from lit_model.load import Checkpoint, load_tensors
from pretrain.release import hub as hub_module
from pretrain.release.content import config_faults, loss_faults
from pretrain.release.hub import Hub, HubRelease
from pretrain.release.manifest import MANIFEST, read_manifest
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
    return script_error("publish.py", *arguments)


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
        "step1: model.safetensors: its SHA-256 differs from the manifest's",
        "step1: model.safetensors: the weights' checksum differs from the manifest's",
    ]
    done = script("publish.py", "--verify", copy, "--head", "0" * 64)
    assert done.returncode == 1 and f"step3: release.json: the head is not {'0' * 64}" in done.stdout


def test_files_that_are_not_regular_are_found(copy: Path) -> None:
    (copy / "step1" / "README.md").unlink()
    os.mkfifo(copy / "step1" / "README.md")
    (copy / "step1" / "more").symlink_to(copy / "step2")
    found = faults(copy)
    assert found[0].startswith("step1: README.md: ") and found[0].endswith("is a named pipe, not a regular file")
    assert found[1] == "step1: more: it is not in the manifest"


def test_a_revision_without_a_record_is_found(copy: Path) -> None:
    alter_manifest(copy / "step2" / MANIFEST, record=[])
    (fault, *_) = faults(copy / "step2")
    assert fault == "step2: release.json: its record does not cover steps 0 to 1: [0]"


def alter_manifest(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"changes": [{"step": "2", "differences": {}}]}, "changes[0].step is"),
        ({"changes": [{"step": 2, "differences": []}]}, "changes[0].differences is"),
        ({"revision": "../step2"}, "'../step2' cannot be the name of a revision"),
        ({"aliases": ["/tmp/x"]}, "'/tmp/x' cannot be"),
        ({"aliases": ["main"]}, "'main' cannot be"),
        ({"aliases": ["a\n"]}, "cannot be"),
    ],
)
def test_damaged_manifest(fields: dict[str, Any], message: str, copy: Path) -> None:
    path = copy / "step2" / MANIFEST
    alter_manifest(path, **fields)
    with pytest.raises(ValueError, match="is damaged") as raised:
        read_manifest(path.read_bytes(), path)
    assert message in str(raised.value)


def test_config_of_another_model_is_found(copy: Path) -> None:
    """Also keys that were added or removed."""
    path, checkpoint = copy / "step2" / "config.json", Checkpoint(copy / "step2/run/iter-00000002-ckpt.pth")
    assert list(config_faults(copy / "step2", checkpoint)) == []
    content = json.loads(path.read_text())
    del content["use_cache"]
    path.write_text(json.dumps(content | {"rope_scaling": {"factor": 2.0}, "vocab_size": 9}))
    found = [text.partition(";")[0] for _, text in config_faults(copy / "step2", checkpoint)]
    assert found == ["rope_scaling is {'factor': 2.0}", "use_cache is missing", "vocab_size is 9"]


def test_losses_of_every_interval_are_compared(run: Path) -> None:
    """NaN equals NaN only, and a step without a logged loss is left out."""
    scan = scan_record(run, 0, 3)
    steps = np.arange(1.0, 4.0)

    def found(losses: list[float], recorded: list[float]) -> list[str]:
        scan.losses[:] = recorded
        written = {"train_loss": np.asarray([True, True, losses[2] != 0.0])}
        return list(loss_faults(Metrics({"step": steps, "train_loss": np.asarray(losses)}, written), scan))

    nan = float("nan")
    assert found([4.0, nan, 3.0], [4.0, nan, 3.0]) == found([4.0, 3.0, 0.0], [4.0, 3.0, 2.0]) == []
    assert found([4.0, nan, 3.0], [4.0, 3.5, 3.0]) == ["the loss of step 2 is not that of the record"]
    assert found([4.0, 3.5, 3.0], [4.0, nan, 3.0]) == ["the loss of step 2 is not that of the record"]
    assert found([4.1, 3.5, 3.0], [4.0, 3.5, 3.0]) == ["the loss of step 1 is not that of the record"]


def test_untrusted_values(run: Path, tmp_path: Path) -> None:
    """A manifest's step costs no memory, settings cannot expand, every error has a text, a link is followed."""
    with pytest.raises(ValueError, match="the record has no rows of step 3"):
        scan_record(run, 0, 1 << 60)
    with pytest.raises(ValueError, match="config.yaml is damaged: it is not YAML of settings .it has an alias"):
        parse_settings(b"a: &a [1, 2]\nb: [*a, *a]\n", "config.yaml")
    assert first_line(ValueError()) == "ValueError"
    (tmp_path / "file").write_text("content")
    (tmp_path / "link").symlink_to("file")
    link_or_copy(tmp_path / "link", tmp_path / "new")
    assert not (tmp_path / "new").is_symlink() and (tmp_path / "new").samefile(tmp_path / "file")


def published_without_change(hub: HubStandIn, run: Path) -> None:
    """Publish again, and check that nothing is sent."""
    sent = len(hub.requests)
    done = script("publish.py", run, *TO_HUB)
    assert done.returncode == 0, done.stderr
    assert not [request for request in hub.requests[sent:] if request.startswith(("POST", "PUT"))]


def test_hub(run: Path, hub: HubStandIn, release: Path) -> None:
    """Published in spite of rate limits and what a killed call left, each large file sent once; verified by hashes."""
    left = run / ".publishing" / "datapoints" / "steps-00000000-00000001.parquet"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"a record from before the run was rewound")
    limited = iter([429, None, 503] + [None] * 10**6)
    hub.refuse = lambda method, path: next(limited) if hub.large else None
    done = script("publish.py", run, *TO_HUB, "--training_state", "none")
    assert done.returncode == 0, done.stderr
    hub.refuse = lambda method, path: None
    repository = hub.repositories["me/model"]
    assert repository.private and set(repository.tags) == {"step1", "step2", "step3"}
    assert set(hub.uploads.values()) == set(hub.committed.values()) == {1}
    assert not (run / ".publishing").exists()
    published_without_change(hub, run)
    done = script("publish.py", "--verify", "me/model")
    assert (done.returncode, "3 revisions, no fault" in done.stdout) == (0, True), done.stdout
    files = repository.commits[repository.tags["step1"]]
    files["model.safetensors"] = repository.commits[repository.branches["main"]]["model.safetensors"]
    done = script("publish.py", "--verify", "me/model")
    assert (done.returncode, "step1: model.safetensors: its hash differs" in done.stdout) == (1, True), done.stdout


def test_changes_on_a_hub(
    run: Path, release: Path, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another card on main is kept; another revision there and a moved tag are refused; an outage is no fault."""
    repository = hub.repositories["me/model"] = Repository(private=True)
    for name in ("step1", "step2", "step3"):
        paths = [path for path in (release / name).rglob("*") if path.is_file()]
        contents = {path.relative_to(release / name).as_posix(): path.read_bytes() for path in paths}
        files = {path: Blob(content, path.endswith(BINARY)) for path, content in contents.items()}
        repository.tags[name] = repository.commit(files)
    repository.commit(files | {"README.md": Blob(b"Edited.", False)})
    published_without_change(hub, run)
    published = HubRelease(Hub("me/model"), tmp_path / "staging")
    assert len(published.chain()) == 3
    with (
        pytest.raises(ValueError, match="--repo me/model: somebody else changed main before step2 was committed"),
        published.new_revision("step2") as folder,
    ):
        shutil.copytree(release / "step2", folder, dirs_exist_ok=True)
    repository.tags["step3"] = repository.tags["step2"]
    assert "--repo me/model: the tag step3 is at commit" in error(run, *TO_HUB)
    hub.refuse = lambda method, path: 503 if "/resolve/" in path else None
    done = script("publish.py", "--verify", "me/model")
    assert (done.returncode, "run the command again" in done.stderr) == (2, True), (done.stdout, done.stderr)
    hub.refuse = lambda method, path: None
    monkeypatch.setattr(hub_module, "MAX_TEXT_BYTES", 100)
    assert "release.json has" in (text := error("--verify", "me/model")) and "at most 100 are read" in text


def test_options_of_a_published_release(run: Path, release: Path, hub: HubStandIn, tmp_path: Path) -> None:
    """Options that a published card or manifest contradicts are refused by name; omitted ones are taken from there."""
    text = error(run, "--to", release, "--license", "mit")
    assert f"--license mit: {release} was published with --license apache-2.0" in text and "new place" in text
    assert (
        "--repo me/model: " in (text := error(run, "--to", release, "--repo", "me/model")) and "with no --repo" in text
    )
    text = error(run, "--to", release, "--training_state", "none")
    assert "--training_state none: " in text and "with the training state of step1" in text
    older, grown = Path(shutil.copytree(run, tmp_path / "older")), tmp_path / "grown"
    (older / "iter-00000003-ckpt.pth").unlink()
    done = script("publish.py", older, "--to", grown)
    assert done.returncode == 0 and "states no licence" in done.stdout and "--license" in done.stdout
    assert "was published with no --license" in error(older, "--to", grown, "--license", "mit")
    shutil.rmtree(grown)
    mine = ("--license", "mit", "--repo", "me/mine", "--training_state", "last")
    assert "states no licence" not in script("publish.py", older, "--to", grown, *mine).stdout
    assert "without the training state of step1" in error(run, "--to", grown, "--training_state", "all")
    done = script("publish.py", run, "--to", grown, "--training_state", "last")
    assert done.returncode == 0, done.stderr
    card = (grown / "step3" / "README.md").read_text()
    assert "license: mit" in card and "--verify me/mine" in card
    repository = hub.repositories["me/model"] = Repository(private=True)
    repository.commit({})
    assert "--public: me/model exists and is private" in error(run, *TO_HUB, "--public")


def test_bad_input(run: Path, release: Path, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert f"is not a run folder: give the --out_dir of a training run; did you mean {run}?" in error(
        run.parent, "--to", tmp_path / "out"
    )
    assert f"--to {run} holds" in error(run, "--to", run)
    assert "is not a release" in error("--verify", run)
    assert "no such folder" in error("--verify", tmp_path / "nowhere")
    assert "needs --license" in error(run, *TO_HUB[:-2])
    assert "needs --repo" in error(run, "--to", "hub", "--license", "mit")
    for option, value, message in (
        ("--repo", "foo", "--repo foo must be NAMESPACE/NAME"),
        ("--license", "bla bla", "--license 'bla bla' must be an identifier of the Hugging Face hub"),
        ("--license", "Apache-2.0", "such as apache-2.0"),
    ):
        assert message in error(run, option, value) and message in error(run, option, value, "--to", tmp_path / "out")
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
    assert "--repo me/model: " in (text := error(run, *TO_HUB))
    assert "denies access (HTTP 401): log in with" in text and "a token with write access" in text
    assert "denies access" in (text := error("--verify", "me/model")) and "a token with read access" in text
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "me/model is not on" in error("--verify", "me/model")
    assert not hub.repositories
    other = hub.repositories["me/model"] = Repository(private=True)
    other.commit({"config.json": Blob(b"{}", False)})
    assert "exists with other content (config.json at main): give a new name" in error(run, *TO_HUB)
    assert list(other.tags) == [] and len(other.commits) == 1
    hub.close()
    assert "cannot be reached" in error(run, *TO_HUB)
