"""The direct reader of a sharded folder, compared with DCP's, and folders with damaged or false metadata."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from gloo_ranks import run_ranks
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from lit_files.checksum import file_sha256
from lit_model.checksum import tensor_checksum
from lit_model.load import FORMAT_VERSION, Checkpoint
from lit_model.sharded import ShardedTensors, load_into

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

# Two ranks: rows even and uneven, fewer rows than ranks, columns, both ways at once, replicated, and odd dtypes.
LAYOUT = {"rows": Shard(0), "uneven": Shard(0), "one_row": Shard(0), "columns": Shard(1), "replicated": Replicate()}


def save_sharded(rank: int, world_size: int, folder: str) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    whole = tensors()
    dcp_save(
        {n: distribute_tensor(t, mesh, [LAYOUT[n]]) if n in LAYOUT else t for n, t in whole.items()},
        storage_writer=FileSystemWriter(folder),
    )


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "rows": torch.randn(6, 5),
        "uneven": torch.randn(7, 3).bfloat16(),
        "one_row": torch.randn(1, 4),
        "columns": torch.randn(4, 6),
        "replicated": torch.randn(3, 3, 2),
        "plain": torch.arange(5),
        "number": torch.tensor(7.5, dtype=torch.float64),
        "empty": torch.zeros(0, 3),
        "transposed": torch.randn(4, 3).t(),
        "flags": torch.tensor([True, False]),
    }


@pytest.fixture(scope="module")
def by_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "checkpoint"
    run_ranks(save_sharded, 2, folder.with_suffix(".rendezvous"), str(folder))
    return folder


def test_reads_tensors_written_by_two_ranks(by_two_ranks: Path) -> None:
    reader = ShardedTensors(by_two_ranks)
    metadata = pickle.loads((by_two_ranks / ".metadata").read_bytes())
    assert len(metadata.state_dict_metadata["columns"].chunks) == 2, "no tensor is split: the test would prove nothing"
    expected = tensors()
    assert set(reader.names()) == set(expected)
    theirs = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    dcp_load(theirs, storage_reader=FileSystemReader(by_two_ranks), no_dist=True)
    for name, tensor in expected.items():
        ours = reader.tensor(name)
        assert ours.dtype == tensor.dtype and torch.equal(ours, tensor) and torch.equal(ours, theirs[name]), name
        like = reader.layout(name)
        assert (like.shape, like.dtype, like.device.type) == (tensor.shape, tensor.dtype, "meta")


def test_one_buffer_for_all(by_two_ranks: Path) -> None:
    reader = ShardedTensors(by_two_ranks)
    buffer = reader.buffer()
    for name, tensor in tensors().items():
        read = reader.tensor(name, buffer)
        assert torch.equal(read, tensor), name
        assert not tensor.numel() or read.data_ptr() == buffer.data_ptr()
    assert buffer.numel() == max(t.nbytes for t in tensors().values())


def test_loads_in_place_and_names_damage(by_two_ranks: Path, folder: Path) -> None:
    filled = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    load_into(by_two_ranks, filled, no_dist=True)
    assert all(torch.equal(filled[name], tensor) for name, tensor in tensors().items())
    content = (folder / "__0_0.distcp").read_bytes()
    for damaged in (b"", b"\0" * len(content), content[:-1]):
        (folder / "__0_0.distcp").write_bytes(damaged)
        with pytest.raises(ValueError, match="c is damaged"):
            load_into(folder, {"w": torch.zeros(4, 6)}, no_dist=True)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """`w`, float32 [4, 6], in one chunk."""
    dcp_save({"w": torch.randn(4, 6)}, storage_writer=FileSystemWriter(tmp_path / "c"), no_dist=True)
    return tmp_path / "c"


def place(metadata: Metadata, **changes: object) -> None:
    """Change the metadata about the location of `w`."""
    index = MetadataIndex("w", (0, 0))
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)


def chunk(metadata: Metadata, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    metadata.state_dict_metadata["w"].chunks[:] = [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))]


def grow(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size((1 << 40, 6))
    chunk(metadata, (0, 0), (1 << 40, 6))


def repeat(metadata: Metadata) -> None:
    metadata.state_dict_metadata["w"].size = torch.Size((8, 6))
    metadata.state_dict_metadata["w"].chunks *= 2


LIES: dict[str, tuple[Callable[[Metadata], object], str]] = {
    "outside": (lambda m: place(m, relative_path="../../secret"), "not a file of the folder"),
    "absolute": (lambda m: place(m, relative_path="/etc/passwd"), "not a file of the folder"),
    "above": (lambda m: place(m, relative_path=".."), "not a file of the folder|is missing"),
    "not a name": (lambda m: place(m, relative_path=7), "not a file of the folder"),
    "before the file": (lambda m: place(m, offset=-1), "not whole numbers"),
    "missing file": (lambda m: place(m, relative_path="__7_0.distcp"), "__7_0.distcp is missing"),
    "beyond the file": (lambda m: place(m, length=1 << 40), "truncated"),
    "too large": (grow, "larger than its bytes"),
    "compressed": (lambda m: place(m, transform_descriptors=["zstd"]), "stored with"),
    "no place": (lambda m: m.storage_data.clear(), "damaged"),
    "beyond the tensor": (lambda m: chunk(m, (1, 0), (4, 6)), "reaches beyond"),
    "a hole": (lambda m: chunk(m, (0, 0), (3, 6)), "do not make up"),
    "twice": (repeat, "do not make up"),
    "no dtype": (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", "float32"), "dtype float32"),
    "other dtype": (lambda m: setattr(m.state_dict_metadata["w"].properties, "dtype", torch.int32), "int32"),
    "other shape": (lambda m: setattr(m.state_dict_metadata["w"], "size", torch.Size((6, 4))), "reaches beyond"),
    "no tensor": (lambda m: m.state_dict_metadata.update(w=None), "not a tensor"),
}


@pytest.mark.parametrize("lie", LIES)
def test_metadata_is_not_trusted(folder: Path, lie: str) -> None:
    change, message = LIES[lie]
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(ValueError, match=message):
        ShardedTensors(folder).tensor("w")


def test_damage_is_named(folder: Path) -> None:
    file, metadata = folder / "__0_0.distcp", (folder / ".metadata").read_bytes()
    content = file.read_bytes()
    reader = ShardedTensors(folder)
    file.write_bytes(b"\0" * len(content))
    with pytest.raises(ValueError, match="__0_0.distcp is damaged"):
        reader.tensor("w")
    for cut in (0, 10, len(content) - 1):
        file.write_bytes(content[:cut])
        with pytest.raises(ValueError, match="__0_0.distcp is truncated"):
            ShardedTensors(folder)
    file.unlink()
    with pytest.raises(ValueError, match="__0_0.distcp is missing"):
        ShardedTensors(folder)
    file.write_bytes(content)
    for damaged in (b"", metadata[:50], b"\x80\x04N.", os.urandom(100)):
        (folder / ".metadata").write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.metadata is not metadata"):
            ShardedTensors(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"has no \.metadata"):
        ShardedTensors(folder)


@pytest.mark.parametrize("sharded", [True, False])
def test_a_newer_format_is_refused(folder: Path, tmp_path: Path, sharded: bool) -> None:
    path = folder if sharded else tmp_path / "file.pth"

    def write(version: int, **others: object) -> None:
        meta = json.dumps({"format_version": version, **others})
        if sharded:
            (folder / "meta.json").write_text(meta)
        else:
            torch.save({"model": {"w": torch.zeros(2)}, "optimizer": {}, "meta": meta}, path)

    write(FORMAT_VERSION)
    assert Checkpoint(path).names()
    write(FORMAT_VERSION + 1, step="of a type that only a newer version knows")
    expected = (
        f"{path} has format version {FORMAT_VERSION + 1}; this version of the project reads checkpoints up to format "
        f"version {FORMAT_VERSION}. Update the project to open it"
    )
    with pytest.raises(ValueError) as refused:
        Checkpoint(path)
    assert str(refused.value) == expected


def test_path_of_another_python(folder: Path) -> None:
    """3.13 pickles a Path under another name of its module."""
    content = pickle.loads((folder / ".metadata").read_bytes())
    content.storage_meta = None
    assert b"pathlib" in (folder / ".metadata").read_bytes(), "the folder's path is no longer stored: drop this test"
    content.planner_data = Path("x")
    (folder / ".metadata").write_bytes(pickle.dumps(content, protocol=2).replace(b"cpathlib\n", b"cpathlib._local\n"))
    assert ShardedTensors(folder).names() == ["w"]


# --- Checksums ---


def test_checksums_are_of_the_elements() -> None:
    """Known values: SHA-256 of no bytes, and of the four bytes of 1.0."""
    nothing = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert tensor_checksum(torch.zeros(0, 3)) == nothing
    one = torch.ones(1)
    assert tensor_checksum(one) == tensor_checksum(torch.tensor(0x3F800000, dtype=torch.int32)) != nothing
    grid = torch.arange(12.0).reshape(3, 4)
    assert tensor_checksum(grid.t()) == tensor_checksum(grid.t().contiguous()) != tensor_checksum(grid)


@pytest.fixture
def checked(folder: Path) -> Path:
    """The folder as a checkpoint with its metadata."""
    sums = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in folder.iterdir()}
    (folder / "meta.json").write_text(json.dumps({"step": 1, "checksums": sums}))
    return folder


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_verify_names_each_fault_of_a_folder(checked: Path, name: str) -> None:
    file = checked / name
    content = file.read_bytes()
    assert Checkpoint(checked).verify() == []
    for place in (0, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert Checkpoint(checked).verify() == [f"{file} changed after it was written: its checksum differs"]
    file.write_bytes(content[:-1])
    size = len(content)
    assert Checkpoint(checked).verify() == [f"{file} has {size - 1} bytes; {size} were written"]
    file.unlink()
    assert Checkpoint(checked).verify() == [f"{file} is missing"]
    file.write_bytes(content)
    (checked / "more").write_bytes(b"")
    assert Checkpoint(checked).verify() == [f"{checked / 'more'} does not belong to the checkpoint"]


def test_verify_names_each_fault_of_a_file(tmp_path: Path) -> None:
    path, w, m = tmp_path / "c.pth", torch.randn(5), torch.randn(5)
    sums = {"model.w": tensor_checksum(w), "optimizer.w/m": tensor_checksum(m)}

    def write(w: torch.Tensor, optimizer: dict[str, dict[str, torch.Tensor]], meta: dict[str, object]) -> list[str]:
        torch.save({"model": {"w": w}, "optimizer": optimizer, "meta": json.dumps({"step": 1, **meta})}, path)
        return Checkpoint(path).verify()

    known = {"checksums": sums}
    assert write(w, {"w": {"m": m}}, known) == []
    assert write(m, {"w": {"m": m}}, known) == [f"{path}: model.w changed after it was written: its checksum differs"]
    assert write(w, {}, known) == [f"{path}: optimizer.w/m is missing"]
    extra = {"w": {"m": m, "v": m}}
    assert write(w, extra, known) == [f"{path}: optimizer.w/v does not belong to the checkpoint"]
    assert "carries no checksums" in write(w, {}, {})[0]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        Checkpoint(path)
