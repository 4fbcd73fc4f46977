"""Averages the weights of several checkpoints of one model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from lit_files.checkpoint_name import list_checkpoints
from lit_files.nested_run import did_you_mean_run
from lit_files.publish import replace_file
from lit_model.load import MODEL_PREFIX, Checkpoint, is_hf_folder
from pretrain.checkpoint.commit import check_free_space
from pretrain.convert.full_and_sharded import write_file

# Of the newest checkpoint's meta; without its place in the data (segments), nothing can be resumed from an average.
KEPT = ("format_version", "step", "max_steps", "tokens", "words", "config", "data", "tokenizer", "encoding", "torch")


def last_checkpoints(run: Path, n: int) -> list[Path]:
    """The newest `n` checkpoints of a run folder, oldest first. Raises ValueError for n below 2, or if it has fewer."""
    if n < 2:
        raise ValueError(f"--last {n}: an average needs at least two checkpoints")
    found = list_checkpoints(run)
    if len(found) < n:
        near = "" if found else did_you_mean_run(run)
        raise ValueError(f"--last {n}: {run} holds {len(found)} checkpoints{near}")
    return found[-n:]


def average_checkpoints(paths: Sequence[Path], output: Path) -> None:
    """Write the mean of the weights, computed in float64, as a checkpoint file without optimizer state; atomic.

    Checkpoints may be full or sharded; one tensor of each is in memory at a time. The meta is that of the last path,
    without its place in the data, and `averaged` lists the paths. Raises ValueError naming the path for a run folder or
    a Hugging Face folder, an existing output, a path given twice, checkpoints of different models or tokenizers, and
    damage.
    """
    for path in paths:
        if path.is_dir() and list_checkpoints(path):
            raise ValueError(
                f"{path} is a run folder: name its checkpoints, such as {list_checkpoints(path)[-1]}, or give one run "
                "with --last K"
            )
        if is_hf_folder(path):
            raise ValueError(f"{path} is a Hugging Face folder: convert it with scripts/convert_from_hf.py first")
    if len(paths) < 2:
        raise ValueError(f"an average needs at least two checkpoints; got {', '.join(map(str, paths)) or 'none'}")
    twice = [path for path in paths if sum(path.resolve() == other.resolve() for other in paths) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is given twice")
    if output.exists():
        raise ValueError(f"output {output} exists already; give another name or remove it")
    checkpoints = [Checkpoint(path) for path in paths]
    last = checkpoints[-1]
    for other in checkpoints[:-1]:
        check_same_model(other, last)
    layouts = {name: last.layout(name) for name in last.names() if name.startswith(MODEL_PREFIX)}

    def mean(name: str) -> Tensor:
        total = torch.zeros(layouts[name].shape, dtype=torch.float64)
        for checkpoint in checkpoints:
            total += checkpoint.tensor(name)
        return (total / len(checkpoints)).to(layouts[name].dtype)

    meta = {key: last.meta[key] for key in KEPT if key in last.meta}
    meta |= {"model_config": last.model_config.to_dict(), "averaged": [str(path) for path in paths]}
    output.parent.mkdir(parents=True, exist_ok=True)
    check_free_space(output.parent, sum(layout.nbytes for layout in layouts.values()))
    with replace_file(output) as temporary:
        write_file(temporary, layouts, mean, meta)
        if faults := Checkpoint(temporary).verify():
            raise ValueError(f"the written output is damaged: {faults[0]}")


def check_same_model(one: Checkpoint, other: Checkpoint) -> None:
    """Raise ValueError unless both have the same model config, tokenizer, and weights of the same shapes."""
    here, there = one.model_config.to_dict(), other.model_config.to_dict()
    for key, value in here.items():
        if value != there[key] and key not in ("name", "family"):
            raise ValueError(f"{one.path} and {other.path} are different models: {key} is {value} and {there[key]}")
    tokenizers = [((c.meta.get("data") or {}).get("tokenizer") or {}).get("fingerprint") for c in (one, other)]
    if tokenizers[0] != tokenizers[1]:
        raise ValueError(f"{one.path} and {other.path} were trained with different tokenizers")
    shapes = [{name: tuple(layout.shape) for name, layout in c.model_layout().items()} for c in (one, other)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"{one.path} and {other.path} hold different weights")
