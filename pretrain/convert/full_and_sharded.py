"""Converts between checkpoint formats: one file (`full`) <-> a torch distributed checkpoint folder (`sharded`)."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lit_files.checkpoint_name import checkpoint_step
from lit_files.checksum import file_sha256
from lit_files.progress import track
from lit_files.publish import build_folder, replace_file
from lit_model.checksum import byte_view, tensor_checksum
from lit_model.load import Checkpoint, is_hf_folder, resolve
from pretrain.checkpoint.commit import check_free_space, nested


def convert_checkpoint(source: Path, output: Path, to: Literal["full", "sharded"]) -> Path:
    """Convert a checkpoint (or a run folder's newest), including the optimizer state, to the other format; atomic.

    Tensors and meta are unchanged; checksums are recomputed, and the output is verified against them before it gets
    its final name. Training resumes from it as from the original. Returns the checkpoint that was read. Raises
    ValueError or FileNotFoundError naming the path, OSError if the disk is full.
    """
    path = resolve(source)
    if is_hf_folder(path):
        raise ValueError(f"{path} is a Hugging Face folder: scripts/convert_from_hf.py makes a checkpoint of it")
    if output.exists():
        raise ValueError(f"output {output} exists already; give another name or remove it")
    checkpoint = Checkpoint(path)
    if checkpoint.sharded == (to == "sharded"):
        raise ValueError(f"{path} is already {to}")
    named = checkpoint_step(output)
    if named is not None and named != checkpoint.meta.get("step"):
        raise ValueError(f"output {output} names step {named}, but {path} is at step {checkpoint.meta.get('step')}")
    output.parent.mkdir(parents=True, exist_ok=True)
    layouts = {name: checkpoint.layout(name) for name in checkpoint.names()}
    check_free_space(output.parent, sum(t.nbytes for t in layouts.values()))
    meta = {key: value for key, value in checkpoint.meta.items() if key != "checksums"}
    with (build_folder if to == "sharded" else replace_file)(output) as temporary:
        if to == "sharded":
            _write_folder(temporary, checkpoint, meta)
        else:
            write_file(temporary, layouts, checkpoint.tensor, meta)
        faults = Checkpoint(temporary).verify()
        if faults:
            raise ValueError(f"the written output is damaged: {faults[0]}")
    return path


def _write_folder(folder: Path, checkpoint: Checkpoint, meta: dict[str, Any]) -> None:
    """Write with DCP's writer in one process. The tensors are memory-mapped, so the system can reclaim their pages."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    tensors = {name: checkpoint.tensor(name) for name in checkpoint.names()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # a single process is intended
        save(tensors, storage_writer=FileSystemWriter(folder, sync_files=False), no_dist=True)
    files = sorted(folder.iterdir())
    meta["checksums"] = {f.name: {"bytes": f.stat().st_size, "sha256": file_sha256(f)} for f in files}
    (folder / "meta.json").write_text(json.dumps(meta, indent=1), encoding="utf-8")


def write_file(path: Path, layouts: Mapping[str, Tensor], read: Callable[[str], Tensor], meta: dict[str, Any]) -> None:
    """Write a full checkpoint one tensor at a time. `layouts`: tensors of the shapes and dtypes that `read` returns.

    torch.save writes everything but the tensors' bytes and reserves their space: it is given placeholder memory that is
    never touched. Then they are filled in one by one. The checksums are part of the meta, which is written first, so
    each tensor is read twice.
    """
    total = sum(layout.nbytes for layout in layouts.values()) / 1e6

    def shown(title: str) -> Iterator[str]:
        return track(layouts, title, "MB", total, size=lambda name: layouts[name].nbytes / 1e6)

    meta = meta | {"checksums": {name: tensor_checksum(read(name)) for name in shown("reading")}}
    untouched = {name: torch.empty_like(layout, device="cpu") for name, layout in layouts.items()}
    content = nested(untouched)
    name_of = {id(tensor): name for name, tensor in untouched.items()}
    with torch.serialization.skip_data(), open(path, "wb") as f:
        torch.save({**content, "meta": json.dumps(meta)}, f)
    with zipfile.ZipFile(path) as archive, open(path, "rb+", buffering=0) as file:
        records = {r.filename.partition("/")[2]: r for r in archive.infolist()}
        tensors = track(_in_order(content), "writing", "MB", total, size=lambda tensor: tensor.nbytes / 1e6)
        for number, tensor in enumerate(tensors):  # data/N is the N-th tensor in the pickle
            record = records[f"data/{number}"]
            assert record.file_size == tensor.nbytes, "torch.save numbers the tensors in another order"
            file.seek(record.header_offset + 26)
            header = file.read(4)  # of a local header: the lengths of its name and of its extra field
            file.seek(int.from_bytes(header[:2], "little") + int.from_bytes(header[2:], "little"), os.SEEK_CUR)
            view = byte_view(read(name_of[id(tensor)]))
            while view:
                view = view[file.write(view[: 1 << 16]) :]


def _in_order(content: dict[str, Any]) -> Iterator[Tensor]:
    """The tensors of nested dictionaries in pickling order."""
    for value in content.values():
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _in_order(value)
