"""Hugging Face folders: safetensors in shards, config.json, generation_config.json. One tensor in memory at a time.

Which of a folder's files are read is decided as transformers decides it: model.safetensors, else the shards of its
index, else pytorch_model.bin, else its shards, by a loader that runs no code. All tensors of these files count, whether
an index lists them or not; other files are ignored.

A safetensors file is 8 bytes, the length of the header (little-endian); the header, JSON of each tensor's dtype, shape
and place; and the tensors' bytes, little-endian and without gaps. So a file can be written tensor by tensor once all
dtypes and shapes are known.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from lit_files.platform import drop_from_cache
from lit_files.progress import track
from lit_files.publish import build_folder
from lit_files.reading import read_dataclass, read_object, regular
from lit_model.checksum import byte_view
from lit_model.config import ModelConfig
from lit_model.hf.families import config_from_hf, family_from_hf
from lit_model.hf.table import LazyTensors, tensors_from_hf
from lit_model.tensor_file import DAMAGED, fault, open_tensor_file

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_LEGACY_SINGLE = "pytorch_model.bin"
_LEGACY_INDEX = "pytorch_model.bin.index.json"
# One rank's part of transformers' distributed checkpoints; where it is, transformers opens nothing else.
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")
_FLOATS = ("F", "BF")  # prefixes of the dtypes of unquantized weights
# For a larger write Linux looks for large pages to cache it in, which took 3 to 8 times as long (ext4, 6.18, virtual).
_WRITE_BYTES = 1 << 16
_FLUSH_BYTES = 1 << 26
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_folder(
    directory: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    layout: Iterable[tuple[str, Tensor]] | None = None,
    generation_config: dict[str, Any] | None = None,
    shard_bytes: float = 5e9,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens; it appears complete or not at all.

    `config` is config.json's content, `tensors` names and tensors in Hugging Face's terms, consumed one by one: each is
    written before the next is asked for. That needs `layout`, the same names, shapes and dtypes in the same order on
    any device (`meta` costs nothing); without it the tensors are gathered first. A file holds at most `shard_bytes` of
    tensors, or a single larger one. `extra_files` are further texts by path in it. Raises ValueError if `directory`
    exists and holds something.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"output {directory} exists and is not an empty folder; give another path or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with build_folder(directory) as temporary:
        if layout is None:
            tensors = layout = list(tensors)
        _write_tensors(temporary, tensors, list(layout), shard_bytes)
        for name, content in (("config.json", config), ("generation_config.json", generation_config)):
            if content is not None:
                (temporary / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for name, text in (extra_files or {}).items():
            (temporary / name).parent.mkdir(exist_ok=True)
            (temporary / name).write_text(text, "utf-8")
        if directory.exists():
            directory.rmdir()  # empty, as checked; not every system renames a folder over one


def read_folder(directory: str | Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The config, and a mapping from our parameter names that reads each tensor from disk when asked for it.

    Raises ValueError for a folder without config.json or tensors, for an unsupported config, for tensors that are
    missing or unknown, and for a pytorch_model.bin that would run code, naming them.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is not a Hugging Face folder: it has no config.json")
    try:
        hf = read_object(path)
        family, config = family_from_hf(hf), config_from_hf(hf, name=directory.name)
    except (ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as error:
        raise ValueError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
    _refuse_other_layouts(directory)
    where, stored = _stored_tensors(directory)
    for name, dtype in stored.dtypes.items():
        if not dtype.startswith(_FLOATS) and not family.is_buffer(name):
            raise ValueError(
                f"{where} holds {name} as {dtype}: quantized weights cannot be read; save them dequantized"
            )
    return config, tensors_from_hf(family, config, stored.tensors, str(where))


def open_tensors(directory: str | Path) -> Mapping[str, Tensor]:
    """A folder's tensors by their names in it, each read when it is asked for.

    Raises ValueError for a folder without tensors, or with fewer than its index names.
    """
    return _stored_tensors(Path(directory))[1].tensors


def _write_tensors(
    directory: Path, tensors: Iterable[tuple[str, Tensor]], layout: list[tuple[str, Tensor]], shard_bytes: float
) -> None:
    shards: list[dict[str, Tensor]] = []
    free: float = 0
    for name, like in layout:
        if not shards or like.nbytes > free:
            shards.append({})
            free = shard_bytes
        shards[-1][name] = like
        free -= like.nbytes
    if not shards:
        raise ValueError("there are no tensors to write")
    total = sum(like.nbytes for _, like in layout) / 1e6
    source, weight_map = track(tensors, "writing", "MB", total, size=lambda one: one[1].nbytes / 1e6), {}
    for i, shard in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else _SINGLE
        _write_shard(directory / file, shard, source)
        weight_map.update(dict.fromkeys(shard, file))
    if next(source, None) is not None:
        raise ValueError("there are more tensors than the layout names")
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(like.nbytes for _, like in layout)}, "weight_map": weight_map}
        (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n", "utf-8")


def _write_shard(path: Path, layout: dict[str, Tensor], tensors: Iterator[tuple[str, Tensor]]) -> None:
    """One file: its header from the layout, then the bytes of as many tensors."""
    assert sys.byteorder == "little", "safetensors are little-endian"
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    places: dict[str, int] = {}
    end = 0
    # Larger elements first, so that each tensor is aligned to its element size: readers map the file.
    for name, like in sorted(layout.items(), key=lambda item: -item[1].element_size()):
        if like.dtype not in _DTYPES:
            raise ValueError(f"{name} is {like.dtype}, which safetensors does not hold")
        places[name], end = end, end + like.nbytes
        offsets = [places[name], end]
        header[name] = {"dtype": _DTYPES[like.dtype], "shape": list(like.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    begin, unflushed = 8 + len(text), 0
    with open(path, "wb", buffering=0) as file:
        _write_all(file, len(text).to_bytes(8, "little") + text)
        for expected, like in layout.items():
            name, tensor = next(tensors, ("", like))
            if name != expected or tensor.shape != like.shape or tensor.dtype != like.dtype:
                raise ValueError(f"expected {expected} of shape {tuple(like.shape)}, got {name or 'nothing'}")
            if file.tell() != begin + places[name]:
                file.seek(begin + places[name])
            _write_all(file, byte_view(tensor.detach().cpu().contiguous()))
            del tensor  # before the next one is read
            unflushed += like.nbytes
            if unflushed >= _FLUSH_BYTES:
                # Linux: the disk begins to write, and the sync has little left to do. What is on it by now leaves the
                # page cache, and the next tensors get these pages: new ones cost far more, above all in a virtual
                # machine, whose host has to find them.
                drop_from_cache(file.fileno())
                unflushed = 0


def _write_all(file: Any, content: bytes | memoryview) -> None:
    """Write to an unbuffered file."""
    view = memoryview(content)
    while view:
        view = view[file.write(view[:_WRITE_BYTES]) :]


class _Stored(NamedTuple):
    """The tensors of a folder by their names, each read when asked for, and their dtypes as safetensors names them."""

    tensors: Mapping[str, Tensor]
    dtypes: dict[str, str]


@dataclass(frozen=True)
class _Index:
    """model.safetensors.index.json and its like: which file holds which tensor."""

    weight_map: dict[str, str]
    metadata: dict[str, Any] | None = None


def _refuse_other_layouts(directory: Path) -> None:
    """Raise ValueError for a folder whose tensors are not all of the model, or not where they are looked for."""
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} holds an adapter (adapter_config.json), which transformers adds to the model: merge it "
            "(merge_and_unload) and save the model; if it is already merged, remove that file"
        )
    ranks = [path.name for path in directory.iterdir() if _DISTRIBUTED.fullmatch(path.name)]
    if ranks:
        raise ValueError(
            f"{directory} holds {min(ranks)}, of a distributed checkpoint of transformers: open it there and save it "
            "by save_pretrained"
        )


def _stored_tensors(directory: Path) -> tuple[Path, _Stored]:
    """The tensors of a folder, and the file that lists them, for error messages."""
    readers = {_SINGLE: _safetensors, _INDEX: _safetensors, _LEGACY_SINGLE: _legacy, _LEGACY_INDEX: _legacy}
    for name, read in readers.items():
        if (path := directory / name).is_file():
            return path, _listed(path, read) if name in (_INDEX, _LEGACY_INDEX) else read([path])
    raise ValueError(f"{directory} has neither {' nor '.join(readers)}")


def _listed(index: Path, read: Callable[[list[Path]], _Stored]) -> _Stored:
    """The tensors of the files that an index names. Raises ValueError for one that is not where the index says."""
    try:
        weight_map = read_dataclass(_Index, index).weight_map
        files = sorted(set(weight_map.values()))
    except ValueError as error:
        raise ValueError(f"{error}; fetch the folder again") from error
    for file in files:
        if Path(file).name != file or not (index.parent / file).is_file():
            raise ValueError(f"{index} names {file}, which is not in the folder; fetch the folder again")
    stored = read([index.parent / file for file in files])
    lacking = [name for name in weight_map if name not in stored.dtypes]
    if lacking:
        where = index.parent / weight_map[lacking[0]]
        raise ValueError(f"{where} lacks the tensor {lacking[0]} that the index promises; fetch the folder again")
    return stored


def _safetensors(files: list[Path]) -> _Stored:
    places: dict[str, Path] = {}
    dtypes: dict[str, str] = {}
    for path in files:
        with _open(path) as file:
            for name in file.keys():  # noqa: SIM118 (safetensors' handle is no dict)
                _place(places, name, path)
                dtypes[name] = str(file.get_slice(name).get_dtype())

    def read(name: str) -> Tensor:
        with _open(places[name]) as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor

    return _Stored(LazyTensors(places, read), dtypes)


def _legacy(files: list[Path]) -> _Stored:
    """The files are mapped, and read where a tensor is used."""
    places: dict[str, Path] = {}
    tensors: dict[str, Tensor] = {}
    for path in files:
        for name, tensor in _open_legacy(path).items():
            _place(places, name, path)
            tensors[name] = tensor
    return _Stored(tensors, {name: _DTYPES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in tensors.items()})


def _place(places: dict[str, Path], name: str, path: Path) -> None:
    if name in places:
        raise ValueError(f"{places[name]} and {path.name} both hold {name}; fetch the folder again")
    places[name] = path


def _open_legacy(path: Path) -> dict[str, Tensor]:
    try:
        content = open_tensor_file(path)
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged, or it holds more than tensors and is not opened{fault(error)}") from error
    if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
        raise ValueError(f"{path} holds more than tensors by name")
    return content


def _open(path: Path) -> Any:
    try:
        return safe_open(regular(path), framework="pt", device="cpu")
    except Exception as error:  # safetensors raises its own type, which derives from Exception only
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or convert it again") from error
