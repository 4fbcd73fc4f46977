"""Written safetensors folders: readable by safetensors, without extra bytes, written one tensor at a time."""

from __future__ import annotations

import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lit_model.hf.families import tensors_to_hf
from lit_model.hf.io import write_folder
from lit_model.hf.table import LazyTensors
from lit_model.model import parameter_shapes
from lit_model.registry import get_config

SINGLE = "model.safetensors"


def mixed() -> dict[str, torch.Tensor]:
    """Odd numbers of small elements before larger ones."""
    torch.manual_seed(0)
    return {
        "bytes": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3).bfloat16(),
        "number": torch.tensor(2.5, dtype=torch.float64),
        "nothing": torch.zeros(0, 4),
        "single": torch.randn(3, 3),
        "transposed": torch.randn(2, 5).t(),
        "fp16": torch.randn(1, 7).half(),
        "flag": torch.tensor([True]),
        "long": torch.arange(3),
    }


def header_of(path: Path) -> tuple[int, dict[str, dict[str, list[int]]]]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return 8 + length, json.loads(content[8 : 8 + length])


def test_safetensors_reads_it(tmp_path: Path) -> None:
    tensors = mixed()
    write_folder(tmp_path / "out", {}, tensors.items())
    back = load_file(tmp_path / "out" / SINGLE)
    assert set(back) == set(tensors)
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor), name
    begin, header = header_of(tmp_path / "out" / SINGLE)
    assert begin % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert (tmp_path / "out" / SINGLE).stat().st_size == begin + sum(t.nbytes for t in tensors.values())
    for name, facts in header.items():
        assert facts["data_offsets"][0] % tensors[name].element_size() == 0, f"{name} cannot be mapped"
    save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "theirs").stat().st_size == (tmp_path / "out" / SINGLE).stat().st_size


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4 + i,), float(i)) for i in range(8)}  # 16 to 44 bytes
    write_folder(tmp_path / "out", {}, iter(tensors.items()), shard_bytes=60)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    assert list(index["weight_map"]) == list(tensors)
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 3
    for file in files:
        begin, _ = header_of(tmp_path / "out" / file)
        names = [name for name, f in index["weight_map"].items() if f == file]
        n_bytes = sum(tensors[n].nbytes for n in names)
        assert (tmp_path / "out" / file).stat().st_size == begin + n_bytes and n_bytes <= 60
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert all(torch.equal(opened.get_tensor(n), tensors[n]) for n in names)
    write_folder(tmp_path / "one", {}, tensors.items(), shard_bytes=20)  # none fits: one each
    assert len(list((tmp_path / "one").glob("*.safetensors"))) == len(tensors)


def test_one_tensor_at_a_time_and_one_sync_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = get_config("debug")
    alive: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
    most = 0

    def build(name: str) -> torch.Tensor:
        nonlocal most
        tensor = torch.full(shapes[name], 0.5)
        alive.add(tensor.untyped_storage())
        most = max(most, len(alive))
        return tensor

    synced: list[str] = []
    sync = os.fsync

    def count(descriptor: int) -> None:
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    shapes = parameter_shapes(config)
    layout = LazyTensors(shapes, lambda name: torch.empty(shapes[name], device="meta"))
    write_folder(
        tmp_path / "out",
        {"a": 1},
        tensors_to_hf(config, LazyTensors(shapes, build)),
        layout=tensors_to_hf(config, layout),
        shard_bytes=1e5,
        extra_files={"README.md": "x"},
    )
    assert most == 1, "more than one tensor was in memory"
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert len(files) > 5 and files <= set(synced)
    assert all(synced.count(name) == 1 for name in files)


def test_a_tensor_that_contradicts_the_layout_leaves_no_file(tmp_path: Path) -> None:
    a, b = ("a", torch.zeros(3)), ("b", torch.zeros(4))

    def write(tensors: list[tuple[str, torch.Tensor]], layout: list[tuple[str, torch.Tensor]]) -> str:
        with pytest.raises(ValueError, match="layout|expected|no tensors|safetensors does not hold") as raised:
            write_folder(tmp_path / "out", {}, tensors, layout=layout)
        assert list(tmp_path.iterdir()) == []
        return str(raised.value)

    assert "got nothing" in write([a], [a, b])
    assert "more tensors" in write([a, b], [a])
    assert "got b" in write([b, a], [a, b])
    assert "got a" in write([("a", torch.zeros(4))], [a])
    assert "got a" in write([("a", torch.zeros(3).half())], [a])
    assert "no tensors" in write([], [])
    assert "complex64" in write([("c", torch.zeros(1, dtype=torch.complex64))] * 2, [("c", torch.zeros(1) + 0j)])
