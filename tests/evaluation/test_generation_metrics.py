"""Metrics of texts against values computed by hand and a naive version; confidence against the logits; speed."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis_examples import examples

from lit_eval.generation.confidence import Bin, Predictions, calibration, calibration_error, predict
from lit_eval.generation.metrics import distinct, ends_in_loop, measure, repetition, self_bleu, words_of
from lit_eval.generation.speed import BatchTimes, SpeedSettings, batch_metrics, evaluate_speed, fit
from lit_eval.generation.text import Generated
from lit_eval.model.eval_model import EvalModel
from lit_eval.model.text_encoding import Encoding
from lit_model.config import ModelConfig
from lit_model.init import initialise
from lit_model.model import GPT


def test_words() -> None:
    assert words_of("Er sagt: „Grüß dich!“  3,5 m") == [
        "Er", "sagt", ":", "„", "Grüß", "dich", "!", "“", "3", ",", "5", "m",
    ]  # fmt: skip


def test_distinct_and_repetition_by_hand() -> None:
    a, b = ["the", "cat", "saw", "the", "cat"], ["the", "dog"]
    # unigrams the cat saw the cat the dog: 4 of 7; bigrams the-cat cat-saw saw-the the-cat the-dog: 4 of 5
    assert distinct([a, b], 1) == 4 / 7 and distinct([a, b], 2) == 4 / 5
    assert repetition(a, 1) == 2 / 5 and repetition(a, 2) == 1 / 4 and repetition(a, 3) == 0
    assert distinct([b], 3) == repetition(b, 3) == repetition([], 1) == 0


@pytest.mark.parametrize(
    ("ids", "loops"),
    [
        ([9, 8, *[1, 2, 3, 4] * 3], True),
        ([9, 8, *[1, 2, 3, 4] * 2, 1, 2, 3], False),
        ([9, *[7] * 12], True),
        ([9, *[7] * 11], False),
        ([*[7] * 12, 9], False),
        ([*range(30), *range(30), *range(30)], True),
        ([4, 1, 2, 3, 1, 2, 3, 1, 2, 3, 1, 2, 3], True),
        ([], False),
    ],
)
def test_a_loop_at_the_end(ids: list[int], loops: bool) -> None:
    assert ends_in_loop(ids) == loops


def test_self_bleu_by_hand() -> None:
    # Of 4 words 3 match, of 3 pairs 2, of 2 triples 1, of the one quadruple none: 0.1.
    score = (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25
    assert self_bleu([["a", "b", "c", "d"], ["a", "b", "c", "e"]]) == pytest.approx([score, score], rel=1e-12)
    # "a" is clipped to the one of the other text; shorter than it: exp(1 - 3/2); no pair matches, and none has three.
    short, long = self_bleu([["a", "a"], ["a", "b", "c"]])
    assert short == pytest.approx(math.exp(1 - 3 / 2) * (1 / 2 * 0.1 * 0.1 * 0.1) ** 0.25, rel=1e-12)
    assert long == pytest.approx((1 / 3 * 0.1 / 2 * 0.1 * 0.1) ** 0.25, rel=1e-12)
    assert self_bleu([["a"], ["b"], []]) == [0, 0, 0]
    assert self_bleu([["a", "b", "c", "d", "e"]] * 3) == pytest.approx([1, 1, 1], rel=1e-12)
    with pytest.raises(ValueError, match="two texts"):
        self_bleu([["a"]])


def naive_bleu(hypothesis: list[str], references: list[list[str]]) -> float:
    """As in Papineni et al. 2002, with all references at hand."""
    product = 1.0
    for n in range(1, 5):

        def grams(words: list[str], n: int = n) -> Counter[tuple[str, ...]]:
            return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

        own = grams(hypothesis)
        matches = sum(min(count, max(grams(r)[gram] for r in references)) for gram, count in own.items())
        if n == 1 and matches == 0:
            return 0.0
        product *= (matches or 0.1) / max(1, sum(own.values()))
    c = len(hypothesis)
    r = min((len(r) for r in references), key=lambda length: (abs(length - c), length))
    return (1 if c > r else math.exp(1 - r / c)) * product**0.25


@examples(40)
@given(texts=st.lists(st.lists(st.sampled_from("abc"), max_size=9), min_size=2, max_size=5))
def test_self_bleu_equals_the_naive_version(texts: list[list[str]]) -> None:
    wanted = [naive_bleu(text, texts[:i] + texts[i + 1 :]) for i, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(wanted, rel=1e-12)


def test_measure() -> None:
    texts = [
        Generated("Es war", [5], 0, [7, 8, 9, 1], " einmal. Ende", "eos"),
        Generated("Es war", [5], 1, [7] * 12, " so so so so so so", "length"),
    ]
    metrics = measure(texts)
    assert metrics["ended"] == metrics["looping"] == 0.5
    assert (metrics["tokens_mean"], metrics["tokens_median"], metrics["words_mean"]) == (7.5, 7.5, 4.5)
    assert (
        metrics["repetition_4"] == pytest.approx(1 / 3) and metrics["distinct_1"] == 4 / 9 and metrics["self_bleu"] == 0
    )
    assert "self_bleu" not in measure(texts[:1])


class Letters:
    """A tokenizer of letters: a is 2."""

    eos_id, bos_id = 1, None

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return [np.asarray([ord(c) - 95 for c in text], dtype=np.int32) for text in texts]


@pytest.fixture(scope="module")
def model() -> EvalModel:
    config = ModelConfig(block_size=12, vocab_size=28, init="normal", init_std=0.3, final_logit_softcapping=4.0)
    gpt = GPT(config)
    initialise(gpt, config, 0)
    tokenizer = Letters()
    return EvalModel(Path("m"), gpt.eval(), config, tokenizer, Encoding(), [], torch.device("cpu"))  # type: ignore[arg-type]


def test_confidence_equals_the_logits(model: EvalModel) -> None:
    """Of texts shorter and longer than the context, at any batch size."""
    texts = ["abcab", "zyxw" * 6, "q", "abcdefghijklmnop"]
    wanted = []
    for text in texts:
        ids = [1, *(ord(c) - 95 for c in text)]
        for i in range(1, len(ids)):
            # Windows of 12 inputs, the last one filled up with tokens before it.
            end = min(-(-i // 12) * 12, len(ids) - 1)
            first = max(0, end - 12)
            with torch.no_grad():
                p = model.model(torch.tensor([ids[first:i]]))[0, -1].double().softmax(-1)
            wanted.append((p.max(), -(p * p.log()).sum(), p.argmax() == ids[i], p[ids[i]].log()))
    for batch_tokens in (1, 40, 10_000):
        found = predict(model, texts, batch_tokens=batch_tokens)
        for values, column in zip(
            (found.top, found.entropy, found.correct, found.target), zip(*wanted, strict=True), strict=True
        ):
            np.testing.assert_allclose(values, [float(x) for x in column], rtol=2e-5)
    with pytest.raises(ValueError, match="no token"):
        predict(model, [""])


def test_calibration_by_hand() -> None:
    top = np.array([0.05, 0.62, 0.68, 0.9, 1.0])
    correct = np.array([0.0, 1.0, 0.0, 1.0, 1.0])
    bins = calibration(Predictions(top, top, correct, top))
    assert [b.n for b in bins] == [1, 0, 0, 0, 0, 0, 2, 0, 0, 2]
    assert bins[6] == Bin(0.6, 0.7, 2, pytest.approx(0.65), 0.5) and bins[1].accuracy is None
    assert (bins[9].confidence, bins[9].accuracy) == (pytest.approx(0.95), 1.0)
    assert calibration_error(bins) == pytest.approx((0.05 + 2 * 0.15 + 2 * 0.05) / 5)


def test_speed_times_what_it_says(model: EvalModel) -> None:
    metrics = batch_metrics(BatchTimes([0.5, 0.1, 0.3], [0.01, 0.02, 0.03, 0.04, 0.1]), batch=4, prompt_tokens=30)
    assert metrics["prefill_tokens_per_s"] == pytest.approx(400) and metrics["decode_tokens_per_s"] == pytest.approx(
        133.333, rel=1e-4
    )
    assert metrics["step_ms_p50"] == pytest.approx(30) and metrics["step_ms_p95"] == pytest.approx(88)
    assert (
        fit(2048, SpeedSettings()) == (64, 32)
        and fit(12, SpeedSettings()) == (6, 6)
        and fit(3, SpeedSettings()) == (1, 2)
    )
    result = evaluate_speed(model, SpeedSettings(batch_sizes=(1, 3), repeats=2))
    assert result.n == 4 and set(result.groups["batch_size"]) == {"1", "3"}
    assert result.settings["prompt_tokens"] == result.settings["new_tokens"] == 6
    assert result.metrics["decode_tokens_per_s"] == result.groups["batch_size"]["3"].metrics["decode_tokens_per_s"] > 0
    for wrong in ({"batch_sizes": (0,)}, {"new_tokens": 1}, {"repeats": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SpeedSettings(**wrong)  # type: ignore[arg-type]
