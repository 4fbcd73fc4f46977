"""Memorization: the longest copies of training data in the texts a model writes, and where they came from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lit_data.packed.reader import PackedDataset
from lit_data.record.trace import TracedRun, open_run
from lit_eval.generation.copies import add_steps, find_copies
from lit_eval.generation.metrics import plain_settings
from lit_eval.generation.settings import GenerationSettings
from lit_eval.generation.text import Generated, Prompt, generate_texts, text_of
from lit_eval.model.eval_model import EvalModel
from lit_eval.score.results import Result
from lit_files.checkpoint_name import checkpoint_step
from lit_files.run_files import DATAPOINTS

LONG_TOKENS = 50  # copies of this length or more count as memorized (Carlini et al. 2023)


def open_training_data(
    model: EvalModel, data: Sequence[str | Path] = ()
) -> tuple[list[PackedDataset], TracedRun | None]:
    """The packed datasets a model was trained on, and its run if that has a datapoint record.

    Args:
        data: their folders, in the order of training; by default those that the run's record names.

    Raises ValueError or FileNotFoundError if the data is neither given nor recorded, or is missing.
    """
    folder = model.path.parent
    if (folder / DATAPOINTS).is_dir() and checkpoint_step(model.path) is not None:
        run = open_run(folder, list(data) or None)
        return run.datasets, run
    if not data:
        raise ValueError(
            f"{model.path} has no datapoint record beside it: give the packed training data with --train_data"
        )
    return [PackedDataset(path) for path in data], None


def evaluate_memorization(
    model: EvalModel,
    prompts: Sequence[Prompt],
    settings: GenerationSettings,
    *,
    data: Sequence[str | Path] = (),
    min_tokens: int = 8,
    texts: Sequence[Generated] | None = None,
) -> Result:
    """Continue prompts and look for the texts in the training data.

    Args:
        data: see `open_training_data`.
        min_tokens: shortest copy that is found.
        texts: written before with these settings, instead of new ones.

    Returns:
        metrics: `longest_mean` and `longest_max` in tokens (0 for a text without a copy); `copied`, the share of all
            tokens inside a copy; `memorized`, the share of texts with a copy of LONG_TOKENS or more.
        items: the longest copy of each text.
        details: `copies`, a dict with the fields of `Copy` and the prompt for each text, the longest first.
    """
    if not prompts:
        raise ValueError("memorization needs at least one prompt")
    datasets, run = open_training_data(model, data)
    if texts is None:
        texts = generate_texts(model, prompts, settings)
    copies = find_copies([one.ids for one in texts], datasets, min_tokens=min_tokens)
    if run is not None:
        add_steps(copies, run, checkpoint_step(model.path))
    for one, copy in zip(texts, copies, strict=True):
        if model.tokenizer is not None and copy.length:
            before = [*one.prompt_ids, *one.ids[: copy.start]]
            copy.text = text_of(model.tokenizer, before, one.ids[copy.start : copy.start + copy.length])
    tokens = sum(copy.tokens for copy in copies)
    longest = [copy.length for copy in copies]
    listed = [{"prompt": one.prompt, "sample": one.sample, **asdict(c)} for one, c in zip(texts, copies, strict=True)]
    return Result(
        kind="memorization",
        n=len(copies),
        metrics={
            "longest_mean": float(np.mean(longest)),
            "longest_max": float(max(longest)),
            "copied": sum(copy.copied for copy in copies) / tokens if tokens else 0.0,
            "memorized": float(np.mean([length >= LONG_TOKENS for length in longest])),
        },
        items=[float(length) for length in longest],
        source={
            "n_items": len(prompts),
            "data": [str(dataset.path) for dataset in datasets],
            "fingerprints": [dataset.fingerprint for dataset in datasets],
        },
        settings={**plain_settings(settings), "min_tokens": min_tokens},
        details={"copies": sorted(listed, key=lambda copy: -copy["length"])},
    )
