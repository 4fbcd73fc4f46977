"""Files that would run code when unpickled, opened in every way that opens a checkpoint or a model: none runs."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import runpy
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from running import MODEL, ROOT, flags, train
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save

from lit_files.checksum import file_sha256
from lit_model.hf.families import config_to_hf
from lit_model.load import Checkpoint
from pretrain import fabric_train

CHECKPOINT = "iter-00000004-ckpt.pth"

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@dataclass
class Payload:
    """Creates the marker file when unpickled."""

    marker: Path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture(scope="module")
def sharded_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("malicious") / "run"
    train(*flags(data, run, save__state_dict_type="sharded", train__max_steps=4))
    return run


def plant_file(checkpoint: Path, payload: Payload) -> Callable[[], object]:
    """(a) next to the tensors in a .pth."""
    original = Checkpoint(checkpoint)
    content = {"model": dict(original.model_tensors()), "optimizer": {}, "meta": json.dumps(original.meta)}
    shutil.rmtree(checkpoint)
    torch.save({**content, "more": payload}, checkpoint)
    return lambda: torch.load(checkpoint, weights_only=False)


def plant_metadata(checkpoint: Path, payload: Payload) -> Callable[[], object]:
    """(b) in the planner data of DCP's metadata."""
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = payload
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return lambda: pickle.loads((checkpoint / ".metadata").read_bytes())


def rewrite(checkpoint: Path, more: dict[str, object]) -> dict[str, object]:
    """Rewrite the folder with DCP, with something added; returns its content."""
    original = Checkpoint(checkpoint)
    content = {**{name: original.tensor(name) for name in original.names()}, **more}
    for file in [*checkpoint.glob("*.distcp"), checkpoint / ".metadata"]:
        file.unlink()
    dcp_save(content, storage_writer=FileSystemWriter(checkpoint), no_dist=True)
    return content


def plant_bytes(checkpoint: Path, payload: Payload) -> Callable[[], object]:
    """(c) as an item that is not a tensor."""
    content = rewrite(checkpoint, {"optimizer.more": payload})
    return lambda: dcp_load(content, storage_reader=FileSystemReader(checkpoint), no_dist=True)


def plant_slice(checkpoint: Path, payload: Payload) -> Callable[[], object]:
    """(c) as a tensor's archive, long enough for it, which the metadata points to."""
    rewrite(checkpoint, {})
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    index = next(i for i in metadata.storage_data if i.fqn == "model.transformer.wte.weight")
    place = metadata.storage_data[index]
    file, archive = checkpoint / place.relative_path, io.BytesIO()
    torch.save([payload, b"x" * place.length], archive)
    metadata.storage_data[index] = dataclasses.replace(
        place, offset=file.stat().st_size, length=len(archive.getvalue())
    )
    file.write_bytes(file.read_bytes() + archive.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    return lambda: torch.load(io.BytesIO(archive.getvalue()), weights_only=False)


def plant_legacy(checkpoint: Path, payload: Payload) -> Callable[[], object]:
    """(d) in the weights of a Hugging Face folder without safetensors."""
    config = Checkpoint(checkpoint).model_config
    shutil.rmtree(checkpoint)
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(config_to_hf(config)))
    torch.save({"model.embed_tokens.weight": payload}, checkpoint / "pytorch_model.bin")
    return lambda: torch.load(checkpoint / "pytorch_model.bin", weights_only=False)


PLANTS = {
    "file": plant_file,
    "metadata": plant_metadata,
    "bytes": plant_bytes,
    "slice": plant_slice,
    "legacy": plant_legacy,
}


@pytest.fixture(scope="module", params=PLANTS)
def planted(request: pytest.FixtureRequest, sharded_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder whose checkpoint has a payload that is known to fire, and matching checksums."""
    run = tmp_path_factory.mktemp("planted") / "run"
    shutil.copytree(sharded_run, run)
    checkpoint, marker = run / CHECKPOINT, run.parent / "marker"
    fire = PLANTS[request.param](checkpoint, Payload(marker))
    if (checkpoint / "meta.json").exists():
        meta = json.loads((checkpoint / "meta.json").read_text())
        files = [f for f in checkpoint.iterdir() if f.name != "meta.json"]
        meta["checksums"] = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files}
        (checkpoint / "meta.json").write_text(json.dumps(meta))
    assert not marker.exists()
    fire()
    assert marker.is_dir(), "the payload does not fire without protection: the test would prove nothing"
    marker.rmdir()
    return run


def refused(run: Path, status: object, errors: str) -> None:
    assert not (run.parent / "marker").exists(), "the payload ran"
    assert status == 2 and "error: " in errors and "Traceback" not in errors, errors
    assert "iter-00000004-ckpt.pth" in errors, "the message does not name the checkpoint"
    assert "weights_only" not in errors, "the message repeats torch's advice to open it anyway"


def test_resume(planted: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"save__state_dict_type": "sharded", "train__max_steps": 8, "resume_allow": "train.max_steps"}
    given = flags(data, planted, resume="latest", **settings)
    if (planted / CHECKPOINT / "meta.json").exists():  # refused late in set-up, so in a separate process
        done = train(*given, check=False)
        assert done.returncode and not (planted.parent / "marker").exists(), "the payload ran"
        refused(planted, done.returncode, done.stderr)
    else:
        refused(planted, fabric_train.main(given), capsys.readouterr().err)


def test_init_from(planted: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = flags(data, tmp_path / "run", init_from=planted / CHECKPOINT, **dict.fromkeys(MODEL))
    refused(planted, fabric_train.main(given), capsys.readouterr().err)


@pytest.mark.parametrize("name", ["convert_to_hf", "convert_checkpoint", "generate"])
def test_scripts(
    planted: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, output = planted / CHECKPOINT, tmp_path / "out"
    arguments = {
        "convert_to_hf": ["--checkpoint", checkpoint, "--output", output],
        "convert_checkpoint": [checkpoint, output, "--to", "full" if checkpoint.is_dir() else "sharded"],
        "generate": ["--model", checkpoint, "--prompt_ids", "5,6", "--max_new_tokens", "1"],
    }[name]
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    refused(planted, left.value.code, capsys.readouterr().err)
    assert not list(tmp_path.iterdir()), "leftovers"
