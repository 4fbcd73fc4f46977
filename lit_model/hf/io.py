"""Hugging Face folders: safetensors in shards, config.json, generation_config.json. One tensor in memory at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lit_model.config import ModelConfig
from lit_model.hf import llama
from lit_model.hf.llama import LazyTensors

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def write_folder(
    directory: str | Path,
    config: dict[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    generation_config: dict[str, Any] | None = None,
    shard_bytes: float = 5e9,
    extra_files: Mapping[str, str] | None = None,
) -> None:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` opens; it appears whole or not at all.

    `config` is config.json's content, `tensors` names and tensors in Hugging Face's terms, consumed one by one; at
    most `shard_bytes` of them are held before a shard is written (one tensor more, if a single one is larger).
    `extra_files` are further texts by file name. Raises ValueError if `directory` exists and holds something.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"output {directory} exists and is not an empty folder; give another one or remove it")
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = directory.parent / f".{directory.name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        _write_tensors(temporary, tensors, shard_bytes)
        for name, content in (("config.json", config), ("generation_config.json", generation_config)):
            if content is not None:
                _write_text(temporary / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        for name, text in (extra_files or {}).items():
            _write_text(temporary / name, text)
        if directory.exists():
            directory.rmdir()  # empty, as checked; os.replace does not put a folder over one on every system
        os.replace(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(directory: str | Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The config, and a mapping from our parameter names that reads each tensor from disk when asked for it.

    Raises ValueError for a folder without config.json or safetensors, for an unsupported config and for tensors that
    are missing or unknown, naming them.
    """
    directory = Path(directory)
    path = directory / "config.json"
    if not path.is_file():
        raise ValueError(f"{directory} is no Hugging Face folder: it has no config.json")
    try:
        hf = json.loads(path.read_text(encoding="utf-8"))
        config = llama.config_from_hf(hf, name=directory.name)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    files = _tensor_files(directory)
    lazy = LazyTensors(files, lambda name: _read_tensor(files[name], name))
    try:
        return config, llama.tensors_from_hf(config, lazy)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def _write_tensors(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: float) -> None:
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0

    def flush() -> None:
        nonlocal pending_bytes
        # The number of shards is known at the end only: provisional names, renamed below.
        path = directory / f"shard-{len(shards)}"
        save_file(pending, path, metadata={"format": "pt"})
        _sync(path)
        shards.append(list(pending))
        pending.clear()
        pending_bytes = 0

    for name, tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a slice would keep the whole alive
        if pending and pending_bytes + tensor.nbytes > shard_bytes:
            flush()
        pending[name] = tensor
        pending_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    if pending:
        flush()
    if not shards:
        raise ValueError("there are no tensors to write")
    if len(shards) == 1:
        os.rename(directory / "shard-0", directory / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, names in enumerate(shards):
        file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        os.rename(directory / f"shard-{i}", directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    _write_text(directory / _INDEX, json.dumps(index, indent=2) + "\n")


def _tensor_files(directory: Path) -> dict[str, Path]:
    """Which file holds which tensor."""
    index = directory / _INDEX
    if index.is_file():
        try:
            weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index} is damaged ({type(error).__name__}: {error}); fetch the folder again") from error
        for file in sorted(set(weight_map.values())):
            if Path(file).name != file or not (directory / file).is_file():
                raise ValueError(f"{index} names {file}, which is not in the folder; fetch the folder again")
        return {name: directory / file for name, file in weight_map.items()}
    single = directory / _SINGLE
    if not single.is_file():
        legacy = " (a pytorch_model.bin is not read: save it as safetensors)" if any(directory.glob("*.bin")) else ""
        raise ValueError(f"{directory} has neither {_SINGLE} nor {_INDEX}{legacy}")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def _read_tensor(path: Path, name: str) -> Tensor:
    with _open(path) as file:
        if name not in file.keys():  # noqa: SIM118 (safetensors' handle is no dict)
            raise ValueError(f"{path} lacks the tensor {name} that the index promises; fetch the folder again")
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except Exception as error:  # safetensors raises its own type, which derives from Exception only
        raise ValueError(f"{path} is not a readable safetensors file ({error}); fetch or convert it again") from error


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    _sync(path)


def _sync(path: Path) -> None:
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
