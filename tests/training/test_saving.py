"""Saving alone, in one process: snapshots are not affected by training, a full disk, retention."""

from __future__ import annotations

import shutil
import subprocess
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from lit_files.checkpoint_name import list_checkpoints
from lit_model.dtensor import local
from lit_model.load import Checkpoint
from pretrain.args import SaveArgs
from pretrain.checkpoint.commit import CheckpointWriter, SaveError
from pretrain.checkpoint.load import load_state
from pretrain.checkpoint.saver import Saver

KINDS = ["full", "sharded"]


def state(seed: int, n: int = 1000) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model.a.weight": torch.randn(n, 10, generator=g),
        "model.b": torch.randn(7, generator=g),
        "optimizer.a.weight/exp_avg": torch.randn(n, 10, generator=g),
        "optimizer.all/step_count": torch.tensor(float(seed)),
    }


def saver(folder: Path, **args: Any) -> Saver:
    return Saver(folder, SaveArgs(**args), torch.device("cpu"), timeout=timedelta(seconds=60))


def same(path: Path, expected: dict[str, Tensor]) -> None:
    checkpoint = Checkpoint(path)
    assert sorted(checkpoint.names()) == sorted(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor), name


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("mounting a tmpfs takes root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("kind", KINDS)
def test_asynchronous_snapshot_is_bit_exact(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tensors change while they are being written; the values at the time of the call are written."""
    go_on = threading.Event()
    write = CheckpointWriter.write

    def held(self: CheckpointWriter, *arguments: Any) -> None:
        assert go_on.wait(60)
        write(self, *arguments)

    monkeypatch.setattr(CheckpointWriter, "write", held)
    writer = saver(tmp_path, state_dict_type=kind, asynchronous=True)
    tensors = state(1)
    expected = {k: v.clone() for k, v in tensors.items()}
    writer.save(1, tensors, {"step": 1})
    for tensor in tensors.values():
        tensor.add_(1)
    assert not list_checkpoints(tmp_path)
    go_on.set()
    second = {k: v.clone() for k, v in tensors.items()}
    writer.save(2, tensors, {"step": 2})  # waits for the first; reuses its buffers
    for tensor in tensors.values():
        tensor.zero_()
    writer.wait()
    same(tmp_path / "iter-00000001-ckpt.pth", expected)
    same(tmp_path / "iter-00000002-ckpt.pth", second)


def test_shards_reuse_the_same_staging_buffers(tmp_path: Path) -> None:
    """The second sharded asynchronous save failed on torch 2.11 (DCP's stager lost its types)."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        writer = saver(tmp_path, state_dict_type="sharded", asynchronous=True)
        tensors = state(1)
        for name in ("model.a.weight", "optimizer.a.weight/exp_avg"):
            tensors[name] = distribute_tensor(tensors[name], mesh, [Shard(0)])
        places: set[tuple[int, ...]] = set()
        for step in (1, 2, 3):
            expected = {k: (v.full_tensor() if isinstance(v, DTensor) else v).clone() for k, v in tensors.items()}
            staged = writer._buffers.copy(tensors)
            places.add(tuple(local(tensor).data_ptr() for tensor in staged.values()))
            assert all(isinstance(staged[k], DTensor) == isinstance(v, DTensor) for k, v in tensors.items())
            writer.save(step, tensors, {"step": step})
            for tensor in tensors.values():
                local(tensor).add_(1)
            writer.wait()
            same(tmp_path / f"iter-{step:08d}-ckpt.pth", expected)
        assert len(places) == 1
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("blind", [False, True], ids=["looks", "blind"])
def test_full_disk(
    small_disk: Path, kind: str, asynchronous: bool, blind: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two states fit, three don't; with and without the free-space check."""
    monkeypatch.setattr("pretrain.checkpoint.commit.SPARE_BYTES", 1 << 16)
    if blind:
        monkeypatch.setattr("pretrain.checkpoint.commit.check_free_space", lambda folder, n_bytes: None)
    writer = saver(small_disk, state_dict_type=kind, asynchronous=asynchronous)
    states = {step: state(step, n=10000) for step in (1, 2, 3)}
    for step in (1, 2):
        writer.save(step, states[step], {"step": step})
    with pytest.raises(SaveError, match="iter-00000003-ckpt.pth could not be written: rank 0") as error:
        writer.save(3, states[3], {"step": 3})
        writer.wait()
    assert ("No space left" if blind else "free some space") in str(error.value)
    assert [p.name for p in list_checkpoints(small_disk)] == ["iter-00000001-ckpt.pth", "iter-00000002-ckpt.pth"]
    same(small_disk / "iter-00000002-ckpt.pth", states[2])
    assert not list(small_disk.glob(".*")), "the partial checkpoint remains and occupies the space"

    skipping = saver(small_disk, state_dict_type=kind, asynchronous=asynchronous, on_error="skip")
    skipping.save(3, states[3], {"step": 3})
    skipping.wait()
    assert skipping.skipped == 1 and not skipping.failed
    first = small_disk / "iter-00000001-ckpt.pth"
    shutil.rmtree(first) if first.is_dir() else first.unlink()
    skipping.save(4, states[3], {"step": 4})
    skipping.wait()
    same(small_disk / "iter-00000004-ckpt.pth", states[3])


@pytest.mark.parametrize("kind", KINDS)
def test_failed_save_in_the_background_is_noticed(tmp_path: Path, kind: str) -> None:
    def broken_part() -> None:
        raise OSError("no part")

    writer = saver(tmp_path, state_dict_type=kind, asynchronous=True)
    writer.save(1, state(1), {"step": 1}, broken_part)
    with pytest.raises(SaveError, match="no part"):
        while not writer.failed:
            pass
        writer.wait()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_is_refused_when_loading(tmp_path: Path, kind: str) -> None:
    writer = saver(tmp_path, state_dict_type=kind)
    writer.save(5, state(5), {"step": 5})
    path = tmp_path / "iter-00000005-ckpt.pth"
    file = path if path.is_file() else path / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    needle = state(5)["model.a.weight"].numpy().tobytes()[:64]
    content[content.index(needle) + 3] ^= 1
    file.write_bytes(bytes(content))
    target = state(6)
    with pytest.raises(ValueError, match=r"iter-00000005-ckpt\.pth.*(model\.a\.weight|__0_0\.distcp)"):
        load_state(path, target)
    assert all(torch.equal(target[k], v) for k, v in state(6).items()), "a refused checkpoint changed the state"


def test_retention_never_deletes_the_newest(tmp_path: Path) -> None:
    writer = saver(tmp_path, keep_last=1, keep_every=4)
    for step in range(1, 10):
        writer.save(step, state(step, n=10), {"step": step})
        assert [int(p.name[5:13]) for p in list_checkpoints(tmp_path)] == [s for s in (4, 8) if s < step] + [step]
