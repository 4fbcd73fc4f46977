"""A model's confidence in its next token on given texts, and how well it is calibrated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lit_eval.model.choices import Prefix
from lit_eval.model.eval_model import EvalModel
from lit_eval.model.likelihood import numbers_of_targets, rolling_windows
from lit_eval.score.results import Result

Array = npt.NDArray[np.float64]
LOW = 0.5  # predictions whose most probable token has less count as low confidence
BINS = 10


@dataclass
class Predictions:
    """One entry for each predicted token.

    Attributes:
        top: probability of the most probable token.
        entropy: of the distribution, in nats.
        correct: 1 where the most probable token is the text's (ties: the smallest id), else 0.
        target: log-probability of the text's token, in nats.
    """

    top: Array
    entropy: Array
    correct: Array
    target: Array


@dataclass
class Bin:
    """The predictions whose top probability lies in [low, high), the last bin with its end.

    Attributes:
        confidence: their mean top probability; None if there are none.
        accuracy: share of them that are correct.
    """

    low: float
    high: float
    n: int
    confidence: float | None
    accuracy: float | None


def predict(
    model: EvalModel, texts: Sequence[str], *, prefix: Prefix = "auto", batch_tokens: int = 16384
) -> Predictions:
    """The prediction of each token of texts, in the windows of `rolling_windows`: each token is predicted once.

    Args:
        prefix: what precedes a text; see `EvalModel.prefix_id`.
        batch_tokens: most tokens at a time, padding included. It does not change the numbers but for rounding.
    """
    prefix_id = model.prefix_id(prefix)
    spans = [s for ids in model.encode(texts) for s in rolling_windows(ids, prefix_id, model.config.block_size)]
    if not spans:
        raise ValueError("the texts have no token to predict")
    found = model.scorer(batch_tokens, head=predictions_of_targets).numbers(spans)
    return Predictions(*np.concatenate(found, axis=1, dtype=np.float64))


def _predict(logits: Tensor, target: Tensor) -> Sequence[Tensor]:
    log_p = logits.log_softmax(-1)
    top, id = log_p.max(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return top.exp(), entropy, id == target.squeeze(-1), log_p.gather(1, target).squeeze(-1)


predictions_of_targets = partial(numbers_of_targets, of_logits=_predict, n_numbers=4)
"""A head for `GPT.forward`: the fields of `Predictions` in their order."""


def calibration(predictions: Predictions) -> list[Bin]:
    """Predictions in BINS equal bins of top probability. If calibrated, accuracy equals confidence in each bin."""
    places = np.minimum((predictions.top * BINS).astype(np.int64), BINS - 1)
    n = np.bincount(places, minlength=BINS)
    confidence, accuracy = (np.bincount(places, v, BINS) for v in (predictions.top, predictions.correct))
    return [
        Bin(
            low=i / BINS,
            high=(i + 1) / BINS,
            n=int(n[i]),
            confidence=float(confidence[i] / n[i]) if n[i] else None,
            accuracy=float(accuracy[i] / n[i]) if n[i] else None,
        )
        for i in range(BINS)
    ]


def calibration_error(bins: Sequence[Bin]) -> float:
    """Expected calibration error: |accuracy - confidence| of the bins, weighted by n (Guo et al. 2017)."""
    gaps = [(b.n, abs(b.accuracy - b.confidence)) for b in bins if b.accuracy is not None and b.confidence is not None]
    return sum(n * gap for n, gap in gaps) / sum(n for n, _ in gaps)


def evaluate_confidence(
    model: EvalModel, texts: Sequence[str], *, prefix: Prefix = "auto", batch_tokens: int = 16384
) -> Result:
    """Measure a model's confidence on texts it is given; it writes nothing itself.

    Returns:
        n: predicted tokens.
        metrics: `top_1_accuracy`; `top_1_probability` and `entropy` (nats) on average; `low_confidence`, the share of
            predictions whose top probability is below LOW; `calibration_error`; `loss` (nats a token).
        details: `calibration`, a dict with the fields of `Bin` for each bin.

    Raises ValueError if the texts have no token, or the model no tokenizer.
    """
    found = predict(model, texts, prefix=prefix, batch_tokens=batch_tokens)
    bins = calibration(found)
    metrics = {
        "top_1_accuracy": float(found.correct.mean()),
        "top_1_probability": float(found.top.mean()),
        "entropy": float(found.entropy.mean()),
        "low_confidence": float((found.top < LOW).mean()),
        "calibration_error": calibration_error(bins),
        "loss": -float(found.target.mean()),
    }
    return Result(
        kind="confidence",
        n=len(found.top),
        metrics=metrics,
        source={"n_items": len(texts)},
        settings={"prefix": prefix},
        details={"calibration": [asdict(b) for b in bins]},
    )
