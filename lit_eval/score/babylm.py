"""Scores the zero-shot tasks of the BabyLM challenge, and writes their predictions as the challenge takes them.

As for a causal model in github.com/babylm/evaluation-pipeline-2025, `evaluation_pipeline/sentence_zero_shot`: a
candidate's score is the sum of the log-probabilities of the tokens that end behind the first scored character
(`dataset.py`); the best one is chosen, the first of equal ones (`compute_results.py`); accuracies are averaged over
parts of a dataset (`run.py`). Predictions have the form and the places that `collate_preds.py` reads.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from lit_eval.model.likelihood import Scorer, Span
from lit_eval.model.text_encoder import AlignedEncoder
from lit_eval.score.babylm_data import DATASETS, ENTITY_SPLITS, BabylmTask, Dataset, Example, Set
from lit_eval.score.candidates import mean
from lit_eval.score.reading_times import Word, score_reading
from lit_eval.score.results import Group, Result
from lit_eval.spacing import evenly_spaced
from lit_files.publish import write_json, write_text

Predictions = dict[str, dict[str, list[dict[str, Any]]]]
"""{part of the dataset: {"predictions": [{"id": ..., "pred": ...}, ...]}}"""

CHECKSUM = "checksum.txt"


def run_babylm(
    task: BabylmTask, scorer: Scorer, encoder: AlignedEncoder, most: int | None = None
) -> tuple[Result, Predictions]:
    """Score a dataset, on every rank of `scorer.ranks` alike.

    Args:
        most: score at most this many items, evenly spaced. Reading times need all words.

    `details.n_cut` counts the items with a text longer than the model's context. A context is then cut on the left, and
    a longer scored part scored in several windows; the pipeline would feed the model more than it was made for.

    Returns the result and the predictions. Metrics of pairs and choices: `accuracy`; `accuracy_macro`, which the
    challenge reports; `ties`, the share of items whose best candidate isn't the only one; `chance`. Of WUG:
    `correlation`, Spearman's, of the model's preference and people's. Of reading times: see `score_reading`. Raises
    ValueError for too few items.
    """
    if words := [item for item in task.items if isinstance(item, Word)]:
        result, found = score_reading(scorer, encoder, words)
        listed = [{"id": i, "pred": here, "prev_pred": before} for i, (here, before) in enumerate(found)]
        predictions = {"reading": {"predictions": listed}}
    else:
        examples = [item for item in task.items if isinstance(item, Example)]
        result, predictions = _score_examples(evenly_spaced(examples, most), scorer, encoder)
        if task.dataset.name == "entity_tracking":
            result.metrics["accuracy_macro"] = _entity_average(result.groups["category"])
    result.source = {"file": str(task.path.resolve()), "sha256": task.sha256, "n_items": len(task.items)}
    return result, predictions


def _score_examples(examples: Sequence[Example], scorer: Scorer, encoder: AlignedEncoder) -> tuple[Result, Predictions]:
    spans: list[list[Span]] = []
    n_cut = 0
    for example in examples:
        cut = False
        for text in example.candidates:
            ids, start = encoder.split(text.whole, len(text.whole) - text.scored)
            size = scorer.block_size
            spans.append([Span(ids[:at], ids[at : at + size]) for at in range(start, len(ids), size)])
            cut |= len(ids) - 1 > size
        n_cut += cut
    scores = iter(scorer.score([span for some in spans for span in some]))
    totals = iter([sum(next(scores).total for _ in some) for some in spans])
    scored = [[next(totals) for _ in example.candidates] for example in examples]
    result = _correlation(examples, scored) if examples[0].ratio is not None else _accuracy(examples, scored)
    if n_cut:
        result.details["n_cut"] = n_cut
    predictions: Predictions = {}
    for example, own in zip(examples, scored, strict=True):
        listed = predictions.setdefault(example.uid, {"predictions": []})["predictions"]
        prediction = {"id": f"{example.uid}_{len(listed)}", "pred": example.candidates[_best(own)].prediction}
        listed.append(prediction if example.ratio is None else {**prediction, "prob": _first_share(own)})
    return result, predictions


def _best(totals: Sequence[float]) -> int:
    """The first of the best, as torch.max chooses on a CPU."""
    return max(range(len(totals)), key=lambda i: totals[i])


def _first_share(totals: Sequence[float]) -> float:
    """Softmax of the totals, of the first; in float32, so that values that are equal in the pipeline are equal here."""
    return float(torch.tensor(totals, dtype=torch.float32).softmax(0)[0])


def _accuracy(examples: Sequence[Example], scored: Sequence[Sequence[float]]) -> Result:
    right = [float(_best(own) == 0) for own in scored]
    ties = [float(list(own).count(max(own)) > 1) for own in scored]
    chance = [1 / len(own) for own in scored]

    def metrics(numbers: Sequence[int]) -> dict[str, float]:
        columns = {"accuracy": right, "ties": ties, "chance": chance}
        return {name: mean([column[i] for i in numbers]) for name, column in columns.items()}

    groups: dict[str, dict[str, list[int]]] = {}
    for i, example in enumerate(examples):
        for by, name in {**example.groups, "part": example.uid}.items():
            groups.setdefault(by, {}).setdefault(name, []).append(i)
    parts = [metrics(some)["accuracy"] for some in groups.pop("part").values()]
    whole = metrics(range(len(examples)))
    return Result(
        kind="pairs" if all(len(own) == 2 for own in scored) else "choice",
        n=len(examples),
        metrics={"accuracy": whole.pop("accuracy"), "accuracy_macro": mean(parts), **whole},
        groups={
            by: {name: Group(len(some), metrics(some)) for name, some in sorted(found.items())}
            for by, found in groups.items()
        },
        items=right,
    )


def _entity_average(groups: dict[str, Group]) -> float:
    """The mean over kinds of boxes of the mean over numbers of operations."""
    splits = [[g.metrics["accuracy"] for name, g in groups.items() if name.startswith(s)] for s in ENTITY_SPLITS]
    return mean([mean(accuracies) for accuracies in splits if accuracies])


def _correlation(examples: Sequence[Example], scored: Sequence[Sequence[float]]) -> Result:
    shares = [_first_share(own) for own in scored]
    correlation = spearman(shares, [example.ratio or 0.0 for example in examples])
    return Result("correlation", len(examples), {"correlation": correlation})


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; equal values share the mean of their ranks. 0 if all values of one are equal."""
    x, y = (_ranks(np.asarray(values, dtype=np.float64)) for values in (a, b))
    x, y = x - x.mean(), y - y.mean()
    spread = float(np.sqrt((x**2).sum() * (y**2).sum()))
    return float((x * y).sum()) / spread if spread else 0.0


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum()
    ranks: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[where]
    return ranks


def write_predictions(folder: Path, task: BabylmTask, predictions: Predictions, checksum: str) -> Path:
    """Write a dataset's predictions, and those of all datasets so far as one file.

    Args:
        folder: results/MODEL/REVISION of the pipeline.
        checksum: of the model's weights. Predictions of other weights in the folder are removed before.

    Returns the collated file: `all_full_preds_causal.json` or `all_fast_preds_causal.json`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / CHECKSUM
    if not mark.exists() or mark.read_text(encoding="utf-8").strip() != checksum:
        for which in ("full", "fast"):
            for dataset in DATASETS:
                _place(folder, dataset, which).unlink(missing_ok=True)
        write_text(mark, checksum + "\n")
    place = _place(folder, task.dataset, task.set)
    place.parent.mkdir(parents=True, exist_ok=True)
    write_json(place, predictions)
    places = {dataset.name: _place(folder, dataset, task.set) for dataset in DATASETS if task.set in dataset.folders}
    collated = folder / f"all_{task.set}_preds_causal.json"
    write_json(collated, {name: json.loads(p.read_bytes()) for name, p in places.items() if p.exists()})
    return collated


def _place(folder: Path, dataset: Dataset, which: Set) -> Path:
    """Where `run.py` writes a dataset's predictions."""
    data = (dataset.task, dataset.folders.get(which, dataset.folders["full"])) if dataset.task else ("reading",)
    return folder.joinpath("zero_shot", "causal", *data, "predictions.json")
