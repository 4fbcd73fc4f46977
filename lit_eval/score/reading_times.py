"""Reading times: how much better a model's surprisal predicts how long people look at a word, and wait before the next.

The data, the regressions and the score are those of `evaluation_pipeline/reading/run.py` and `evaluation_functions.py`
in github.com/babylm/evaluation-pipeline-2025; the measurements are those of de Varda et al. 2023,
https://doi.org/10.3758/s13428-023-02261-8.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lit_eval.model.likelihood import Scorer, Span
from lit_eval.model.text_encoder import AlignedEncoder
from lit_eval.score.candidates import mean
from lit_eval.score.results import Group, Result

Numbers = npt.NDArray[np.float64]

EYE_TRACKING = ("RTfirstfix", "RTfirstpass", "RTgopast", "RTrightbound")
SELF_PACED = "self_paced_reading_time"
EEG = ("ELAN", "LAN", "N400", "P600", "EPNP", "PNP")
OF_THE_WORD = ("Subtlex_log10", "length", "context_length")
OF_THE_WORD_BEFORE = ("prev_length", "prev_surprisal")
TEXTS = ("item", "word", "prev_item", "prev_word")
MISSING = {"", "NA", "N/A", "NaN", "nan", "None", "null", "NULL", "n/a", "<NA>"}  # of pandas.read_csv


@dataclass(frozen=True)
class Word:
    """A word in its sentence.

    Attributes:
        context: the sentence up to the word.
        before: (context, word) of the word before it; None if it is the first.
        numbers: predictors and measurements by column; NaN where there is none.
    """

    context: str
    word: str
    before: tuple[str, str] | None
    numbers: dict[str, float]


def read_words(file: Path) -> list[Word]:
    """Read `reading_data.csv`. Raises ValueError naming file, line and fault."""
    required = (*TEXTS, *OF_THE_WORD, "prev_length", *EYE_TRACKING, SELF_PACED)
    words: list[Word] = []
    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            rows = csv.DictReader(opened)
            columns = rows.fieldnames or []
            if absent := [name for name in required if name not in columns]:
                raise ValueError(f"{file}, line 1: the column {absent[0]!r} is missing")
            numeric = [name for name in (*required, *EEG) if name in columns and name not in TEXTS]
            for row in rows:
                try:
                    words.append(_word(row, numeric))
                except ValueError as error:
                    raise ValueError(f"{file}, line {rows.line_num}: {error}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{file} is not a CSV file in UTF-8: {error}") from error
    if not words:
        raise ValueError(f"{file} holds no word")
    return words


def _word(row: dict[str, str], numeric: Sequence[str]) -> Word:
    texts = {name: row[name] for name in TEXTS}
    if None in texts.values():
        raise ValueError("the row is too short")
    if not texts["word"].strip():
        raise ValueError("'word' is empty")
    numbers = {}
    for name in numeric:
        value = row[name]
        try:
            numbers[name] = math.nan if value is None or value.strip() in MISSING else float(value)
        except ValueError as error:
            raise ValueError(f"{name!r} is {value!r}; it must be a number") from error
    known = texts["prev_item"] not in MISSING and texts["prev_word"] not in MISSING
    # A sentence that begins with the word None is read by pandas as a missing value, and so repaired in the pipeline.
    context = "None" if texts["item"] in MISSING else texts["item"]
    return Word(context, texts["word"], (texts["prev_item"], texts["prev_word"]) if known else None, numbers)


def surprisals(scorer: Scorer, encoder: AlignedEncoder, words: Sequence[Word]) -> list[tuple[float, float]]:
    """-log p of each word behind its context, and of the word before it, in nats; NaN for a first word's."""
    asked = dict.fromkeys(place for word in words for place in ((word.context, word.word), word.before) if place)
    spans = {place: _spans(encoder, *place) for place in asked}
    scores = iter(scorer.score([span for some in spans.values() for span in some]))
    found = {place: -sum(next(scores).total for _ in some) for place, some in spans.items()}
    return [(found[w.context, w.word], math.nan if w.before is None else found[w.before]) for w in words]


def _spans(encoder: AlignedEncoder, context: str, word: str) -> list[Span]:
    """A span for each token of the word (`get_p2`): the text up to it is encoded again, as one."""
    spans = []
    for number, id in enumerate(encoder.encode(word)[0]):
        piece = encoder.decode([id])
        ids = [id] if number == 0 else encoder.encode(piece)[0][:1] or [id]
        spans.append(Span(encoder.ids(context), ids))
        context += piece
    return spans


def score_reading(scorer: Scorer, encoder: AlignedEncoder, words: Sequence[Word]) -> tuple[Result, list[list[float]]]:
    """Regress each measurement on properties of the word, without and with its surprisal.

    Metrics: `eye_tracking`, the mean over the four of EYE_TRACKING, and `self_paced_reading`, whose regression also
    knows the word before (spillover), of the share of the variance left by the other predictors that surprisal
    explains: (R2 with - R2 without) / (1 - R2 without), the squared partial correlation.

    Groups: `measurement` and `spillover`, each measurement by the one regression and the other, with that share
    (`partial_r2`), `r2`, surprisal's `coefficient`, and its plain `correlation` with the measurement.

    Returns the result, and [surprisal, that of the word before] of each word. Raises ValueError if fewer words are
    complete than a regression has coefficients.
    """
    found = surprisals(scorer, encoder, words)
    columns = {name: np.array([word.numbers[name] for word in words]) for name in words[0].numbers}
    columns["surprisal"], columns["prev_surprisal"] = np.array(found).T
    measurements = [name for name in (*EYE_TRACKING, SELF_PACED, *EEG) if name in columns]
    groups: dict[str, dict[str, Group]] = {}
    for by, predictors in (("measurement", OF_THE_WORD), ("spillover", (*OF_THE_WORD, *OF_THE_WORD_BEFORE))):
        needed = (*EYE_TRACKING, SELF_PACED) if by == "measurement" else (SELF_PACED,)
        groups[by] = {}
        for name in measurements:
            try:
                groups[by][name] = regress(columns, name, predictors)
            except ValueError:
                if name in needed:
                    raise
    metrics = {
        "eye_tracking": mean([groups["measurement"][name].metrics["partial_r2"] for name in EYE_TRACKING]),
        "self_paced_reading": groups["spillover"][SELF_PACED].metrics["partial_r2"],
    }
    return Result("reading", len(words), metrics, groups), [list(pair) for pair in found]


def regress(columns: dict[str, Numbers], measurement: str, predictors: Sequence[str]) -> Group:
    """Ordinary least squares on an intercept, the predictors and their products in pairs, with and without `surprisal`.

    Words with a missing value are left out. Raises ValueError if too few are left.
    """
    table = np.stack([columns[name] for name in (measurement, "surprisal", *predictors)])
    table = table[:, ~np.isnan(table).any(0)]
    y, surprisal, *plain = table
    terms = [*plain, *(a * b for a, b in combinations(plain, 2))]
    if len(y) < len(terms) + 3:
        raise ValueError(f"{measurement}: {len(y)} complete words are too few for {len(terms) + 2} coefficients")
    base, _ = _fit(y, terms)
    r2, coefficient = _fit(y, [*terms, surprisal])
    spread = float(surprisal.std() * y.std())
    metrics = {
        "partial_r2": (r2 - base) / (1 - base) if base < 1 else 0.0,
        "r2": r2,
        "coefficient": coefficient,
        "correlation": float(((surprisal - surprisal.mean()) * (y - y.mean())).mean()) / spread if spread else 0.0,
    }
    return Group(len(y), metrics)


def _fit(y: Numbers, terms: Sequence[Numbers]) -> tuple[float, float]:
    """R2, and the coefficient of the last term."""
    x = np.stack(terms, 1)
    scale = x.std(0)
    scale[scale == 0] = 1.0
    x, centred = (x - x.mean(0)) / scale, y - y.mean()  # as with an intercept, and better conditioned
    coefficients = np.linalg.lstsq(x, centred, rcond=None)[0]
    left, total = float(((centred - x @ coefficients) ** 2).sum()), float((centred**2).sum())
    return (1 - left / total if total else 0.0), float(coefficients[-1] / scale[-1])
