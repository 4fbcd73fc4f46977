"""A model of synthetic text beside the text's generator, whose probabilities are known exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from lit_data.corpus.grammar_nll import conditional_nll
from lit_data.corpus.synthetic import LEVELS
from lit_eval.evaluation.jobs import Evaluation
from lit_eval.score.results import Result
from lit_model.load import Checkpoint, is_hf_folder


def synthetic_text(model: Path) -> tuple[Path, Any]:
    """The validation text of a run with --data.synthetic, and its level. Raises ValueError if the run had none."""
    config = {} if is_hf_folder(model) else Checkpoint(model).meta.get("config")
    data = config.get("data") if isinstance(config, dict) else None
    level = (
        data["synthetic"].get("level") if isinstance(data, dict) and isinstance(data.get("synthetic"), dict) else None
    )
    for text in (folder / "text" / "val.jsonl" for folder in data_folders(model, data)):
        if level in LEVELS and text.is_file():
            return text, level
    raise ValueError(
        f"--tasks synthetic needs a run with --data.synthetic.tokens and its text (data/text/val.jsonl), which {model} "
        "does not have: leave the task out"
    )


def data_folders(model: Path, data: Any) -> list[Path]:
    """Folders that may hold a run's generated text: where it was written, and the run folder (it may be moved)."""
    val = data.get("val") if isinstance(data, dict) else None
    return [*([Path(val).parent.parent] if isinstance(val, str) else []), model.parent / "data"]


def model_and_generator(evaluation: Evaluation) -> Result:
    """Score the run's validation text, and compare with the generator's own negative log-likelihood of it.

    Documents are scored whole, without a prefix: a document's first token is no target, so the generator's likelihood
    is that of the rest given it (lit_data.corpus.grammar_nll.conditional_nll). The end of a document is a target.

    Metrics: `model_over_generator`, the ratio of the summed nats, which no model brings below 1 but by chance;
    `excess_nats` a document and its `standard_error`. Items: the excess of each document.
    """
    model = evaluation.model
    path, level = synthetic_text(model.path)
    tokenizer = model.need_tokenizer()
    lines = path.read_text(encoding="utf-8").splitlines()[: evaluation.settings.num_samples]
    texts = [json.loads(line)["text"] for line in lines]
    encoded = [[*ids, tokenizer.eos_id] for ids in model.encode(texts)]
    floor = np.array([conditional_nll(t, tokenizer.decode(i[:1]), level) for t, i in zip(texts, encoded, strict=True)])
    scored = evaluation.scorer.score_documents(encoded, None)
    nats = np.array([-sum(window.total for window in windows) for windows in scored])
    excess = nats - floor
    return Result(
        kind="synthetic",
        n=len(texts),
        metrics={
            "model_over_generator": float(nats.sum() / floor.sum()),
            "excess_nats": float(excess.mean()),
            "standard_error": float(excess.std(ddof=1) / np.sqrt(len(excess))) if len(excess) > 1 else 0.0,
            "nats": float(nats.sum()),
            "generator_nats": float(floor.sum()),
        },
        items=excess.tolist(),
    )
