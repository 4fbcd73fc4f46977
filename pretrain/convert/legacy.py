"""Imports checkpoints of TinyLlama, LLäMmlein, lit-gpt and litgpt, including the optimizer state, for --init_from.

The source is one torch.save file: {"model", "optimizer", "hparams", "iter_num", "step_count"}, or only the model's
state dict; litgpt writes lit_model.pth next to model_config.yaml. `lit_model/legacy.py` maps the tensor names.
"""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from lit_data.tokenizers.tokenizer import open_tokenizer
from lit_eval.model.model_tokenizer import KnownTokenizer, of_files
from lit_files.checkpoint_name import checkpoint_step
from lit_files.publish import replace_file
from lit_model.config import ModelConfig
from lit_model.cost import count_parameters
from lit_model.legacy import (
    EMBEDDING,
    HEAD,
    config_by_name,
    config_from_litgpt,
    fit_vocabulary,
    legacy_tensors,
    match_names,
)
from lit_model.load import FORMAT_VERSION
from lit_model.tensor_file import DAMAGED, fault, open_tensor_file
from pretrain.checkpoint.commit import check_free_space, write_full
from pretrain.checkpoint.load import state_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
CONFIG_FILES = ("model_config.yaml", "lit_config.json")


@dataclass(frozen=True)
class Imported:
    """The imported checkpoint. `settings`: {our flag: value} of the original run, where known."""

    path: Path
    config: ModelConfig
    step: int
    optimizer: bool
    settings: dict[str, Any]
    tokenizer: KnownTokenizer

    def summary(self, output: Path) -> str:
        """Two readable lines."""
        optimizer = "with its optimizer's state" if self.optimizer else "without an optimizer's state"
        return (
            f"{self.path} -> {output}: step {self.step:,}, {optimizer}\n  model {self.config.name or 'custom'}: "
            f"{count_parameters(self.config):,} parameters, {self.config.vocab_size:,} ids"
        )

    def command(self, output: Path) -> str:
        """The trainer command that continues the original run, with the settings recorded in its checkpoint."""
        flags: dict[str, object] = {"init_from": output}
        if self.optimizer:
            flags |= {"init_optimizer": "true", "optim.steps_before": self.step, **self.settings}
        return "python pretrain/fabric_train.py " + " ".join(f"--{flag} {value}" for flag, value in flags.items())


def import_legacy(
    source: Path,
    output: Path,
    *,
    model: str | None = None,
    vocab_size: int | None = None,
    weights_only: bool = False,
    tokenizer: Path | None = None,
) -> Imported:
    """Convert a legacy checkpoint to our format, atomically.

    Weights and moments keep their precision. They are memory-mapped from the source file; only rearranged tensors (the
    fused QKV projections, at most a quarter of the file) and a padded vocabulary are copied into memory.

    Args:
        source: the file, or a folder with lit_model.pth.
        model: a name in our registry or the original trainers', or a model_config.yaml or lit_config.json. Default:
            the config next to the file, otherwise the name in its hparams.
        vocab_size: number of token ids. Default: the model's.
        weights_only: drop the optimizer state.
        tokenizer: folder or file of the tokenizer it was trained with, to record in the output. Default: the one next
            to the file, if there is one.

    Raises ValueError or FileNotFoundError with the cause before anything is written, OSError if the disk is full.
    """
    if output.exists():
        raise ValueError(f"output {output} exists already; give another name or remove it")
    path = find_file(source)
    content = read_file(path)
    try:
        state = Legacy(path, content, model, vocab_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    try:
        optimizer = None if weights_only or "optimizer" not in content else state.optimizer(content["optimizer"])
    except ValueError as error:
        raise ValueError(f"{path}: {error} (--weights_only leaves the optimizer out)") from error
    named = checkpoint_step(output)
    if named is not None and named != state.step:
        raise ValueError(f"output {output} names step {named}, but {path} is at step {state.step}")
    tensors: dict[str, Any] = {"model": state.tensors(state.weights, "the model")}
    tensors["optimizer"] = {} if optimizer is None else optimizer.tensors
    settings = legacy_settings(content.get("hparams"), optimizer.group if optimizer is not None else {}, state.step)
    known = find_own_tokenizer(path, tokenizer, state.config.vocab_size)
    meta = {
        "format_version": FORMAT_VERSION,
        "step": state.step,
        "model_config": state.config.to_dict(),
        "tokenizer": known.facts_to_keep(),
        "source": path.resolve().name,
        "source_settings": settings,
    }
    _write(output, tensors, meta)
    return Imported(path, state.config, state.step, optimizer is not None, settings, known)


# --- Reading ---------------------------------------------------------------------------------------------------------


def find_file(source: Path) -> Path:
    """The checkpoint file. Raises FileNotFoundError or ValueError naming the paths searched."""
    if source.is_dir():
        if (source / "lit_model.pth").is_file():
            return source / "lit_model.pth"
        if (source / ".metadata").is_file():
            raise ValueError(
                f"{source} is a sharded Fabric checkpoint: merge it into one file with `fabric consolidate` first"
            )
        raise FileNotFoundError(f"{source} has no lit_model.pth: give the path of the checkpoint file")
    if not source.is_file():
        raise FileNotFoundError(f"no checkpoint at {source}: give a .pth file or a folder with lit_model.pth")
    return source


def find_own_tokenizer(path: Path, given: Path | None, vocab_size: int) -> KnownTokenizer:
    """The given tokenizer, or the one litgpt puts next to a checkpoint. Raises ValueError if the given one cannot be
    opened or has more ids than the model.
    """
    if given is None:
        beside = any((path.parent / name).is_file() for name in ("tokenizer.json", "tokenizer.model"))
        return of_files(path.parent if beside else None)
    tokenizer = open_tokenizer(given)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"--tokenizer {given} has {tokenizer.vocab_size} ids, the model in {path} only {vocab_size}")
    return of_files(given)


def read_file(path: Path) -> dict[str, Any]:
    """{"model": {name: tensor}, ...}, tensors memory-mapped where the format allows it. Never executes pickled code.

    Raises ValueError for a damaged file, and for one with anything but tensors and plain values, naming the class.
    """
    try:
        content = open_tensor_file(path)
    except pickle.UnpicklingError as error:
        classes = re.findall(r"GLOBAL ([\w.]+)", str(error))
        if not classes:
            raise ValueError(f"{path} is damaged, or was not written by torch.save{fault(error)}") from error
        raise ValueError(
            f"{path} contains objects of {classes[0]}; loading them would run code from the file, so it is refused. "
            "Load it where it was made, keep only tensors and plain values, and save it again"
        ) from error
    except DAMAGED as error:
        raise ValueError(f"{path} is damaged, or was not written by torch.save{fault(error)}") from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{path} contains a {type(content).__name__}, not a state dict")
    if "meta" in content:
        raise ValueError(f"{path} is already a checkpoint of this project")
    if "model" not in content:
        content = {"model": content}
    weights = content["model"]
    foreign = (
        [n for n, t in weights.items() if not isinstance(t, Tensor)] if isinstance(weights, Mapping) else ["model"]
    )
    if foreign or not weights:
        raise ValueError(f"{path} is not a model checkpoint: {foreign[0] if foreign else 'model'} is not a tensor")
    return dict(content)


def find_config(path: Path, hparams: Any, model: str | None, rows: int) -> ModelConfig:
    """The config from --model, from the file next to the checkpoint, or from the model's name in its hparams."""
    files = [path.parent / name for name in CONFIG_FILES]
    if model is not None and Path(model).suffix in (".yaml", ".yml", ".json"):
        files = [Path(model)]
        if not files[0].is_file():
            raise FileNotFoundError(f"--model {model}: no such file")
    elif model is not None:
        return config_by_name(model, rows)
    for file in files:
        if file.is_file():
            try:
                text = file.read_text(encoding="utf-8")
                # A YAML parser could read both, but parses JSON's 1e-05 as a string.
                fields = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
                if not isinstance(fields, dict):
                    raise ValueError("it has no fields")
                return config_from_litgpt(fields)
            except (ValueError, TypeError, yaml.YAMLError) as error:
                raise ValueError(f"{file}: {error}") from error
    name = hparams.get("model_name") if isinstance(hparams, Mapping) else None
    if name is None:
        raise ValueError(
            f"it does not name its model: give --model NAME, or a {' or '.join(CONFIG_FILES)} as --model FILE"
        )
    try:
        return config_by_name(str(name), rows)
    except ValueError as error:
        raise ValueError(f"the model named in its hparams is unknown: {error}. Give --model") from error


# --- Content ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Optimizer state of a checkpoint: {name: {key: tensor}}, and the settings of its parameter group."""

    tensors: dict[str, dict[str, Tensor]]
    group: dict[str, Any]


class Legacy:
    """The content of a legacy checkpoint, checked against its config.

    Attributes:
        weights: {our name: tensor as in the file}.
        order: our names in the file's parameter order; a tied embedding and head appear once.
        step: optimizer steps completed.
    """

    def __init__(self, path: Path, content: dict[str, Any], model: str | None, vocab_size: int | None) -> None:
        stored = content["model"]
        self.names = match_names(stored)
        if EMBEDDING not in self.names:
            raise ValueError(f"it has no {EMBEDDING}")
        self.weights: dict[str, Tensor] = {ours: stored[theirs] for ours, theirs in self.names.items()}
        ours_of = {theirs: ours for ours, theirs in self.names.items()}
        self.order = [ours_of[theirs] for theirs in stored]
        rows = self.weights[EMBEDDING].shape[0]
        config = fit_vocabulary(find_config(path, content.get("hparams"), model, rows), rows, vocab_size)
        tied = HEAD not in self.weights or same(self.weights[HEAD], self.weights[EMBEDDING])
        if config.tie_embeddings and not tied:
            raise ValueError(f"its {HEAD} differs from its embedding, but model {config.name} has one matrix for both")
        self.config = dataclasses.replace(config, tie_embeddings=tied)
        if tied and HEAD in self.weights:
            del self.weights[HEAD], self.names[HEAD]
            self.order.remove(EMBEDDING)  # tied: listed as the head, whose module was built first
            self.order[self.order.index(HEAD)] = EMBEDDING
        step = content.get("step_count", 0)
        if not isinstance(step, int) or step < 0:
            raise ValueError(f"step_count is {step!r}")
        self.step = step
        self.tensors(self.weights, "the model")  # raises for names and shapes

    def tensors(self, stored: Mapping[str, Tensor], where: str) -> Mapping[str, Tensor]:
        """Parameters, or one moment of each, in our layout; see `legacy_tensors`."""
        return legacy_tensors(self.config, self.names, {self.names[ours]: t for ours, t in stored.items()}, where)

    def optimizer(self, optimizer: Any) -> Moments:
        """AdamW's moments and update count from torch's state dict, keyed by index, or by name as FSDP writes it.

        An index refers to the model's parameters, which these trainers put into one group.
        Raises ValueError naming the mismatch.
        """
        if not isinstance(optimizer, Mapping) or not {"state", "param_groups"} <= set(optimizer):
            raise ValueError("the optimizer has no state and param_groups")
        state, groups = optimizer["state"], optimizer["param_groups"]
        if not state:
            raise ValueError("the optimizer has made no step, so it has no state")
        entries = self._by_name(state) if all(isinstance(k, str) for k in state) else self._by_number(state, groups)
        lacking = [ours for ours in self.order if ours not in entries]
        if lacking:
            raise ValueError(f"the optimizer has no state of {lacking[0]}")
        counts = set()
        for ours, entry in entries.items():
            if set(entry) != {"step", *MOMENTS}:
                wanted = ", ".join(("step", *MOMENTS))
                raise ValueError(f"the optimizer keeps {', '.join(entry)} of {ours}; AdamW's are {wanted}")
            counts.add(float(entry["step"]))
        if len(counts) > 1:
            raise ValueError(f"the optimizer updated some parameters more often, {sorted(counts)} times")
        for key in ("amsgrad", "maximize"):
            if any(group.get(key) for group in groups):
                raise ValueError(f"the optimizer has {key}, which is not supported")
        if any(group.get("weight_decay") and group.get("decoupled_weight_decay") is False for group in groups):
            raise ValueError("the optimizer is Adam with L2 regularization, not AdamW")
        moments = {
            key: self.tensors({o: e[key] for o, e in entries.items()}, f"the optimizer's {key}") for key in MOMENTS
        }
        tensors = {name: {key: moments[key][name] for key in MOMENTS} for name in moments[MOMENTS[0]]}
        tensors["all"] = {"step_count": torch.tensor(counts.pop(), dtype=torch.float32)}
        return Moments(tensors, dict(groups[0]))

    def _by_number(self, state: Mapping[Any, Any], groups: Any) -> dict[str, Any]:
        if len(groups) != 1:
            raise ValueError(
                f"the optimizer has {len(groups)} groups of numbered parameters: the numbers cannot be matched"
            )
        if list(groups[0]["params"]) != list(range(len(self.order))):
            raise ValueError(
                f"the optimizer numbers {len(groups[0]['params'])} parameters, the model has {len(self.order)}"
            )
        # `names` follows the order in which these trainers build their modules; indices are only valid in that order.
        for here, there in zip(self.order, self.names, strict=True):
            if here != there:
                raise ValueError(
                    f"the model's parameters are in another order than its trainers': {here} where {there} belongs; "
                    "the optimizer's numbers cannot be matched"
                )
        return {self.order[number]: entry for number, entry in state.items()}

    def _by_name(self, state: Mapping[str, Any]) -> dict[str, Any]:
        names = match_names(state)
        if HEAD in names and self.config.tie_embeddings:
            names.setdefault(EMBEDDING, names[HEAD])
            del names[HEAD]
        return {ours: state[theirs] for ours, theirs in names.items()}


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share storage or have equal values."""
    return a.shape == b.shape and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


# Names in TinyLlama's hparams -> our flags.
_HPARAMS = {
    "learning_rate": "optim.lr",
    "min_lr": "optim.lr_min",
    "warmup_steps": "optim.warmup_steps",
    "grad_clip": "train.clip_norm",
    "global_batch_size": "train.global_batch_samples",
}


def legacy_settings(hparams: Any, group: Mapping[str, Any], step: int) -> dict[str, Any]:
    """The flags that continue the old run: {flag: number}, where known."""
    known = hparams if isinstance(hparams, Mapping) else {}
    settings = {ours: known[theirs] for theirs, ours in _HPARAMS.items() if theirs in known}
    if isinstance(known.get("max_step"), int):
        settings["train.max_steps"] = known["max_step"] - step
    if isinstance(group.get("betas"), (tuple, list)) and len(group["betas"]) == 2:
        settings["optim.beta1"], settings["optim.beta2"] = group["betas"]
    settings.update({f"optim.{key}": group[key] for key in ("eps", "weight_decay") if key in group})
    return {flag: value for flag, value in settings.items() if isinstance(value, (int, float))}


# --- Writing ---------------------------------------------------------------------------------------------------------


def _write(output: Path, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
    named = {name: _alone(t) for name, t in state_tensors(tensors["model"], tensors["optimizer"]).items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(output.parent, sum(t.nbytes for t in named.values()))
    with replace_file(output) as temporary, open(temporary, "wb") as f:
        write_full(f, named, meta)


def _alone(tensor: Tensor) -> Tensor:
    """A tensor whose storage is exactly its own size: torch.save writes the full storage even of a small view."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.detach() if whole else tensor.detach().clone(memory_format=torch.contiguous_format)
