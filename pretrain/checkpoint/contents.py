"""Summarizes a checkpoint: its step, model, sizes, origin, and faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lit_files.checkpoint_name import budget_name, list_checkpoints
from lit_model.cost import count_parameters
from lit_model.load import MODEL_PREFIX, Checkpoint


def contents_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Facts by name; those that an older version did not record are None."""
    meta, config, path = checkpoint.meta, checkpoint.model_config, checkpoint.path
    layouts = {name: checkpoint.layout(name) for name in checkpoint.names()}
    model = [t for name, t in layouts.items() if name.startswith(MODEL_PREFIX)]
    model_bytes = sum(t.nbytes for t in model)
    return {
        "path": str(path),
        "kind": "sharded" if checkpoint.sharded else "full",
        "step": meta.get("step"),
        "tokens": meta.get("tokens"),
        "words": meta.get("words"),
        "word_budgets": [budget_name(words) for words in meta.get("word_budgets") or []],
        "model": config.name or "custom",
        "parameters": count_parameters(config),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in model}),
        "model_bytes": model_bytes,
        "optimizer_bytes": sum(t.nbytes for t in layouts.values()) - model_bytes,
        "file_bytes": sum(f.stat().st_size for f in (path.iterdir() if checkpoint.sharded else [path])),
        "world_size": meta.get("world_size"),
        "torch": meta.get("torch"),
    }


def describe(contents: dict[str, Any]) -> str:
    """Several readable lines of `contents_of`."""
    shown = {
        name: "unknown" if value is None else f"{value:,}" if isinstance(value, int) else value
        for name, value in contents.items()
    }
    budgets = contents["word_budgets"]
    shown["budgets"] = f" (word budget {', '.join(budgets)})" if budgets else ""
    return (
        "{path} ({kind})\n"
        "  step {step}, {tokens} tokens, {words} words{budgets}\n"
        "  model {model}: {parameters} parameters, {dtypes}\n"
        "  {file_bytes} bytes: model {model_bytes}, optimizer {optimizer_bytes}\n"
        "  written by {world_size} ranks, torch {torch}"
    ).format_map(shown | {"dtypes": ", ".join(contents["dtypes"])})


def word_budgets_in(run: Path) -> dict[int, Path]:
    """The checkpoint of each word budget (--save.at_words) in a run folder, by the number of words, ascending."""
    found: dict[int, Path] = {}
    for path in list_checkpoints(run):
        try:
            budgets = Checkpoint(path).meta.get("word_budgets") or []
        except (ValueError, OSError):  # damaged: reported when it is loaded
            continue
        found |= {words: path for words in budgets}
    return dict(sorted(found.items()))


def faults_of(path: Path) -> list[str]:
    """All faults of a checkpoint; one that cannot be opened has a single fault."""
    try:
        checkpoint = Checkpoint(path)
        faults = checkpoint.verify()
        if not faults:
            checkpoint.names()
    except ValueError as error:
        return [str(error)]
    return faults
