"""A path -> a model. Owns the layout of a checkpoint as it is read; `pretrain/checkpoint.py` writes it.

A checkpoint `iter-00001000-ckpt.pth` is
- a file (`full`): {"model": {name: tensor}, "optimizer": {name: {key: tensor}}, "meta": JSON text}, or
- a folder (`sharded`): torch DCP files whose keys are `model.NAME` and `optimizer.NAME/KEY`, and `meta.json`.

Nothing that is loaded can run code: files are opened with `weights_only=True`, a folder's `.metadata` (a pickle) by an
unpickler that knows only DCP's own classes.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from lit_model.config import ModelConfig
from lit_model.hf.io import read_folder
from lit_model.model import GPT

CHECKPOINT_NAME = re.compile(r"iter-(\d{8,})-ckpt\.pth")
MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."


def checkpoint_step(path: Path) -> int | None:
    """Steps done in a checkpoint, by its name; None for a name of another form."""
    match = CHECKPOINT_NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def list_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, oldest first. A name that exists is whole."""
    found = [p for p in run.iterdir() if checkpoint_step(p) is not None] if run.is_dir() else []
    return sorted(found, key=lambda p: checkpoint_step(p) or 0)


class _MetadataUnpickler(pickle.Unpickler):
    """Reads DCP's `.metadata`: its own data classes, sizes, dtypes and containers, nothing else."""

    ALLOWED = frozenset(
        {
            ("collections", "OrderedDict"),
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("pathlib", "Path"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in self.ALLOWED or (
            module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint's metadata")


class SafeReader(FileSystemReader):
    """DCP's reader of a folder, with `.metadata` read by the allow-listing unpickler and byte items refused."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = cast(Metadata, _MetadataUnpickler(io.BytesIO(file.read_bytes())).load())
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError) as error:
            raise ValueError(f"{file} is no metadata of a checkpoint written here: {error}") from error
        foreign = [k for k, v in metadata.state_dict_metadata.items() if not isinstance(v, TensorStorageMetadata)]
        if foreign:
            raise ValueError(
                f"{self.path} holds items that are not tensors ({foreign[0]}, ...); it was not written here"
            )
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class Checkpoint:
    """A checkpoint opened for reading: its facts, and its tensors one at a time."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"checkpoint {self.path} does not exist")
        self.sharded = self.path.is_dir()
        self._file: dict[str, Any] = {}
        if self.sharded:
            meta_file = self.path / "meta.json"
            if not meta_file.is_file():
                raise ValueError(f"{self.path} is no checkpoint: it holds no meta.json")
            self.meta: dict[str, Any] = json.loads(meta_file.read_text())
            self._sizes = {
                name: cast(TensorStorageMetadata, item)
                for name, item in SafeReader(self.path).read_metadata().state_dict_metadata.items()
            }
            self._names = list(self._sizes)
        else:
            try:
                self._file = torch.load(self.path, map_location="cpu", mmap=True, weights_only=True)
                self.meta = json.loads(self._file["meta"])
            except (RuntimeError, KeyError, TypeError, pickle.UnpicklingError, EOFError) as error:
                raise ValueError(
                    f"{self.path} is not a checkpoint written by this project, or it is damaged: {error}"
                ) from error
            self._names = [MODEL_PREFIX + n for n in self._file["model"]] + [
                f"{OPTIMIZER_PREFIX}{n}/{key}" for n, state in self._file["optimizer"].items() for key in state
            ]

    @property
    def model_config(self) -> ModelConfig:
        return ModelConfig.from_dict(self.meta["model_config"])

    def names(self) -> list[str]:
        """Keys of all tensors: `model.NAME` and `optimizer.NAME/KEY`."""
        return self._names

    def tensor(self, name: str) -> Tensor:
        """Read one whole tensor to the CPU."""
        if self.sharded:
            item = self._sizes[name]
            whole = torch.empty(item.size, dtype=item.properties.dtype)
            with warnings.catch_warnings():
                warnings.filterwarnings(
                    "ignore", message="torch.distributed is disabled"
                )  # one process reads, as meant
                dcp_load({name: whole}, storage_reader=SafeReader(self.path), no_dist=True)
            return whole
        if name.startswith(MODEL_PREFIX):
            return cast(Tensor, self._file["model"][name.removeprefix(MODEL_PREFIX)])
        parameter, key = name.removeprefix(OPTIMIZER_PREFIX).rsplit("/", 1)
        return cast(Tensor, self._file["optimizer"][parameter][key])

    def model_tensors(self) -> Mapping[str, Tensor]:
        """The model's tensors by parameter name, each read when it is asked for."""
        return _ModelTensors(self)


class _ModelTensors(Mapping[str, Tensor]):
    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.keys_ = [n.removeprefix(MODEL_PREFIX) for n in checkpoint.names() if n.startswith(MODEL_PREFIX)]

    def __getitem__(self, name: str) -> Tensor:
        return self.checkpoint.tensor(MODEL_PREFIX + name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys_)

    def __len__(self) -> int:
        return len(self.keys_)


def file_checksum(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tensor_checksum(tensor: Tensor) -> str:
    """SHA-256 of a tensor's elements in order, as bytes of this machine, hexadecimal."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(flat.numpy())).hexdigest()


def is_hf_folder(path: Path) -> bool:
    """Whether a path is a Hugging Face model folder."""
    return (path / "config.json").is_file()


def resolve(path: str | Path) -> Path:
    """A run folder, checkpoint or Hugging Face folder -> the checkpoint or folder to read.

    Raises FileNotFoundError or ValueError that say what was looked for.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no model at {path}: give a run folder, an iter-XXXXXXXX-ckpt.pth or a Hugging Face folder"
        )
    if path.is_file() or checkpoint_step(path) is not None or is_hf_folder(path) or (path / "meta.json").is_file():
        return path
    checkpoints = list_checkpoints(path)
    if not checkpoints:
        raise ValueError(f"{path} holds neither an iter-XXXXXXXX-ckpt.pth nor a config.json")
    return checkpoints[-1]


def load_tensors(path: str | Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The config and, lazily, the tensors (by our names) of a run folder, a checkpoint or a Hugging Face folder."""
    path = resolve(path)
    if is_hf_folder(path):
        return read_folder(path)
    checkpoint = Checkpoint(path)
    return checkpoint.model_config, checkpoint.model_tensors()


def load_model(path: str | Path, *, attention: str = "auto") -> tuple[GPT, ModelConfig]:
    """Open a run folder (its newest checkpoint), a checkpoint or a Hugging Face folder.

    Returns:
        The model in evaluation mode on the CPU, in the precision it was saved in, and its config. Its call
        `model(tokens: int64 [B, T])` gives logits [B, T, vocab_size].
    """
    config, tensors = load_tensors(path)
    with torch.device("meta"):
        model = GPT(config, attention=attention)
    # assign=True: no second copy of the weights; clone: a memory-mapped checkpoint may be deleted by a retention.
    model.load_state_dict({name: tensors[name].clone() for name in tensors}, assign=True)
    return model.eval(), config
