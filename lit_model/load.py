"""Loads a model from a path. Defines the layout of a checkpoint for reading; `pretrain/checkpoint/commit.py` writes it.

A checkpoint `iter-00001000-ckpt.pth` is
- a file (`full`): {"model": {name: tensor}, "optimizer": {name: {key: tensor}}, "meta": JSON text}, or
- a folder (`sharded`): torch DCP files whose keys are `model.NAME` and `optimizer.NAME/KEY`, and `meta.json`.

Nothing that is loaded can run code: files are opened with `weights_only=True`; folders by `lit_model/sharded.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from lit_files.checkpoint_name import checkpoint_step, list_checkpoints
from lit_files.checksum import file_sha256
from lit_files.nested_run import did_you_mean_run
from lit_files.progress import track
from lit_files.reading import as_object, build, parse_json, read_bytes
from lit_model.checksum import tensor_checksum
from lit_model.config import ModelConfig
from lit_model.hf.io import read_folder
from lit_model.hf.table import LazyTensors, check_names
from lit_model.model import GPT, parameter_shapes
from lit_model.sharded import ShardedTensors
from lit_model.tensor_file import DAMAGED, fault, open_tensor_file

FORMAT_VERSION = 1  # of a checkpoint's layout; raise it when an older version of the project would misread the new one
MODEL_PREFIX = "model."
OPTIMIZER_PREFIX = "optimizer."
WITHOUT_TENSORS = "without_tensors"
"""In the meta of a published checkpoint file that has the facts of training, but neither weights nor optimizer."""


class _NewerFormatError(Exception):
    """Written by a later version of the project, in a format that this one does not know."""


class Checkpoint:
    """A checkpoint opened for reading: its facts, and its tensors one at a time.

    A folder's `.metadata` is read when names or tensors are asked for first. Damage raises a ValueError that
    names the file, and so does a format newer than `FORMAT_VERSION`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"checkpoint {self.path} does not exist")
        self.sharded = self.path.is_dir()
        self._file: dict[str, Any] = {}
        try:
            if self.sharded:
                if not (self.path / "meta.json").is_file():
                    raise ValueError("it has no meta.json")
                self.meta: dict[str, Any] = _read_meta(read_bytes(self.path / "meta.json"))
            else:
                self._file = open_tensor_file(self.path)
                self.meta = _read_meta(self._file["meta"])
                self._names = _names_of(self._file)
        except _NewerFormatError as error:
            raise ValueError(f"{self.path} {error}") from None
        except DAMAGED as error:
            raise ValueError(
                f"{self.path} is not a checkpoint written by this project, or it is damaged{fault(error)}"
            ) from error

    @functools.cached_property
    def _folder(self) -> ShardedTensors:
        return ShardedTensors(self.path)

    @property
    def model_config(self) -> ModelConfig:
        if "model_config" not in self.meta:
            raise ValueError(f"{self.path} has no model_config in its meta: the model is unknown")
        try:
            return ModelConfig.from_dict(self.meta["model_config"])
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}: its meta.model_config is damaged: {error}") from error

    def names(self) -> list[str]:
        """Keys of all tensors: `model.NAME` and `optimizer.NAME/KEY`."""
        return self._folder.names() if self.sharded else self._names

    def tensor(self, name: str) -> Tensor:
        """One whole tensor on the CPU: read, or a map of the file where the checkpoint is one file."""
        return self._folder.tensor(name) if self.sharded else self._mapped(name)

    def layout(self, name: str) -> Tensor:
        """A tensor of the same shape and dtype on the `meta` device; no data is read."""
        return self._folder.layout(name) if self.sharded else torch.empty_like(self._mapped(name), device="meta")

    def model_tensors(self) -> Mapping[str, Tensor]:
        """The model's tensors by parameter name, each read when it is asked for."""
        return LazyTensors(self._model_names(), lambda name: self.tensor(MODEL_PREFIX + name))

    def passing_tensors(self) -> Mapping[str, Tensor]:
        """As `model_tensors`, but those of a folder share one buffer: each is gone when the next is asked for.

        Fresh memory for each would cost more time than the reading: the system hands it out page by page, zeroed.
        """
        if not self.sharded:
            return self.model_tensors()
        buffer = self._folder.buffer()
        return LazyTensors(self._model_names(), lambda name: self._folder.tensor(MODEL_PREFIX + name, buffer))

    def model_layout(self) -> Mapping[str, Tensor]:
        """The model's tensors on the `meta` device, by parameter name."""
        return LazyTensors(self._model_names(), lambda name: self.layout(MODEL_PREFIX + name))

    def _model_names(self) -> list[str]:
        return [n.removeprefix(MODEL_PREFIX) for n in self.names() if n.startswith(MODEL_PREFIX)]

    def verify(self, part: int = 0, parts: int = 1) -> list[str]:
        """Differences from the checksums taken when the checkpoint was written, one sentence each; reads all of it.

        With `parts` processes each checks its share of the files or tensors, the `part`-th. `meta["checksums"]` holds,
        for a folder, {"bytes", "sha256"} of every file but meta.json; for a file, the SHA-256 of every tensor.
        """
        known = self.meta.get("checksums")
        if not isinstance(known, dict):
            return [f"{self.path} carries no checksums: it was written by an older version and can't be verified"]
        names = sorted(known)[part::parts]
        find = self._file_faults if self.sharded else self._tensor_faults
        return find(known, names, parts == 1)

    def _file_faults(self, known: dict[str, Any], names: list[str], show: bool) -> list[str]:
        faults = []
        for name in track(names, "checking", "files", show=show):
            file, facts = self.path / Path(name).name, known[name] if isinstance(known[name], dict) else {}
            if not file.is_file():
                faults.append(f"{file} is missing")
            elif (size := file.stat().st_size) != facts.get("bytes"):
                faults.append(f"{file} has {size} bytes; {facts.get('bytes')} were written")
            elif file_sha256(file) != facts.get("sha256"):
                faults.append(f"{file} changed after it was written: its checksum differs")
        unknown = sorted({p.name for p in self.path.iterdir()} - set(known) - {"meta.json"})
        return faults + [f"{self.path / name} does not belong to the checkpoint" for name in unknown]

    def _tensor_faults(self, known: dict[str, Any], names: list[str], show: bool) -> list[str]:
        faults = [f"{self.path}: {name} does not belong to the checkpoint" for name in set(self._names) - set(known)]
        for name in track(names, "checking", "tensors", show=show):
            if name not in self._names:
                faults.append(f"{self.path}: {name} is missing")
            elif tensor_checksum(self._mapped(name)) != known[name]:
                faults.append(f"{self.path}: {name} changed after it was written: its checksum differs")
        return faults

    def _mapped(self, name: str) -> Tensor:
        if name.startswith(MODEL_PREFIX):
            return cast(Tensor, self._file["model"][name.removeprefix(MODEL_PREFIX)])
        parameter, key = name.removeprefix(OPTIMIZER_PREFIX).rsplit("/", 1)
        return cast(Tensor, self._file["optimizer"][parameter][key])


_META = {
    "format_version": int,
    "step": int,
    "max_steps": int,
    "tokens": int | None,
    "segments": list[dict[str, int]],
    "config": dict[str, Any],
    "model_config": dict[str, Any],
    "data": dict[str, Any],
    "teachers": list[dict[str, Any]],
    "skipped": int,
    "skipped_in_row": int,
    "spikes": dict[str, Any] | None,
    "skips": list[dict[str, Any]],
    "changes": list[dict[str, Any]],
    "loss_scale": dict[str, float] | None,
    "world_size": int,
    "checksums": dict[str, Any],
}
"""Types of the entries of a checkpoint's meta. Resuming checks them in detail."""


def _read_meta(text: Any) -> dict[str, Any]:
    """A checkpoint's facts. Raises _NewerFormatError, and ValueError where they are not of the types above."""
    meta = as_object(parse_json(text, "its meta"), "its meta")
    version = meta.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:  # before the types, which a newer format may change
        raise _NewerFormatError(
            f"has format version {version}; this version of the project reads checkpoints up to format version "
            f"{FORMAT_VERSION}. Update the project to open it"
        )
    for name, kind in _META.items():
        if name in meta:
            build(kind, meta[name], f"meta.{name}")  # type: ignore[arg-type]
    return meta


def _names_of(file: dict[str, Any]) -> list[str]:
    tensors = {MODEL_PREFIX + n: t for n, t in file["model"].items()}
    for parameter, state in file["optimizer"].items():
        tensors.update({f"{OPTIMIZER_PREFIX}{parameter}/{key}": t for key, t in state.items()})
    foreign = [name for name, t in tensors.items() if not isinstance(t, Tensor)]
    if foreign:
        raise ValueError(f"{foreign[0]} is not a tensor")
    return list(tensors)


def is_hf_folder(path: Path) -> bool:
    """Whether a path is a Hugging Face model folder."""
    return (path / "config.json").is_file()


def resolve(path: str | Path) -> Path:
    """A run folder, checkpoint or Hugging Face folder -> the checkpoint or folder to read.

    Raises FileNotFoundError or ValueError naming the expected files.
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
        raise ValueError(f"{path} holds neither an iter-XXXXXXXX-ckpt.pth nor a config.json{did_you_mean_run(path)}")
    return checkpoints[-1]


def load_tensors(path: str | Path) -> tuple[ModelConfig, Mapping[str, Tensor]]:
    """The config and, lazily, the tensors (by our names) of a run folder, a checkpoint or a Hugging Face folder."""
    path = resolve(path)
    if is_hf_folder(path):
        return read_folder(path)
    checkpoint = Checkpoint(path)
    if checkpoint.meta.get(WITHOUT_TENSORS):
        raise ValueError(f"{path} was published without its tensors; open the exported model beside its run folder")
    config, layouts = checkpoint.model_config, checkpoint.model_layout()
    if config.n_layer > len(layouts):  # before a model of so many layers is laid out
        raise ValueError(f"{path} holds {len(layouts)} tensors, too few for a model of {config.n_layer} layers")
    shapes = parameter_shapes(config)
    check_names(shapes, layouts, str(path))
    for name, shape in shapes.items():
        if tuple(layouts[name].shape) != shape:
            raise ValueError(f"{path}: {name} has shape {tuple(layouts[name].shape)}; the config implies {shape}")
    return config, checkpoint.model_tensors()


def load_model(path: str | Path, *, attention: str = "auto") -> tuple[GPT, ModelConfig]:
    """Open a run folder (its newest checkpoint), a checkpoint or a Hugging Face folder.

    Returns:
        The model in evaluation mode on the CPU, in the precision it was saved in, and its config. Its call
        `model(tokens: int64 [B, T])` returns logits [B, T, vocab_size].
    """
    config, tensors = load_tensors(path)
    with torch.device("meta"):
        model = GPT(config, attention=attention)
    # assign=True: no second copy of the weights; clone: retention may delete a memory-mapped checkpoint.
    model.load_state_dict({name: tensors[name].clone() for name in tensors}, assign=True)
    return model.eval(), config
