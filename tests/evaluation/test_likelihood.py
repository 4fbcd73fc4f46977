"""Scores of continuations: against the plain softmax, at any batch size, over several ranks, in windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_eval.model.likelihood import Scorer, Span, rolling_windows, score_targets
from lit_model.config import ModelConfig
from lit_model.init import initialise
from lit_model.model import GPT

BLOCK = 12


def small_model(**changes: Any) -> GPT:
    sizes = {"block_size": BLOCK, "vocab_size": 50, "n_layer": 2, "n_head": 4, "n_embd": 32, "intermediate_size": 48}
    model = GPT(ModelConfig(**{**sizes, **changes}))  # type: ignore[arg-type]
    initialise(model, model.config, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # far from uniform
    return model.eval()


def scorer_of(model: GPT, **options: Any) -> Scorer:
    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        scores: Tensor = model(tokens, targets, head=score_targets)
        return scores

    return Scorer(forward, model.config.block_size, **options)


def some_spans(n: int, seed: int = 0) -> list[Span]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, [2 * BLOCK, BLOCK + 1], size=(n, 2)).tolist()
    return [Span(rng.integers(0, 50, a).tolist(), rng.integers(0, 50, b).tolist()) for a, b in lengths]


@pytest.mark.parametrize("changes", [{}, {"final_logit_softcapping": 3.0}, {"padded_vocab_size": 64}])
def test_scores_are_those_of_the_plain_softmax(changes: dict[str, Any]) -> None:
    model, spans = small_model(**changes), some_spans(20)
    for span, score in zip(spans, scorer_of(model).score(spans), strict=True):
        ids = torch.tensor([*span.context, *span.continuation][-BLOCK - 1 :])
        with torch.no_grad():
            logits = model(ids[None, :-1])[0].double()[-len(span.continuation) :]
        target = torch.tensor(span.continuation)
        expected = logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1).numpy()
        np.testing.assert_allclose(score.log_probabilities, expected, rtol=1e-5, atol=1e-5)
        assert score.greedy == bool((logits.argmax(-1) == target).all())
        assert score.total == pytest.approx(expected.sum(), rel=1e-5)


def test_a_greedy_continuation_is_noticed() -> None:
    model = small_model()
    with torch.no_grad():
        best = int(model(torch.tensor([[5, 6]]))[0, -1].argmax())
    scores = scorer_of(model).score([Span([5, 6], [best]), Span([5, 6], [(best + 1) % 50])])
    assert [score.greedy for score in scores] == [True, False]


def test_the_batch_size_changes_nothing() -> None:
    model, spans = small_model(), some_spans(30)
    one, many = scorer_of(model, batch_tokens=1).score(spans), scorer_of(model, batch_tokens=10_000).score(spans)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.log_probabilities, b.log_probabilities, rtol=1e-4, atol=1e-5)


def test_equal_spans_are_computed_once_and_tie() -> None:
    """Also two contexts that are equal once they are cut; not two continuations of the same tokens."""
    calls: list[list[int]] = []

    def forward(tokens: Tensor, targets: Tensor) -> Tensor:
        calls.append((targets >= 0).sum(1).tolist())
        return torch.rand(2, *tokens.shape)  # differs for every row

    full = list(range(BLOCK))
    spans = [Span([5], [6, 7]), Span([1, *full], [8]), Span([5], [6, 7]), Span([5, 6], [7]), Span([2, *full], [8])]
    scores = Scorer(forward, BLOCK).score(spans)
    assert [sorted(n) for n in calls] == [[1, 1, 2]]
    assert scores[0].total == scores[2].total != scores[3].total and scores[1].total == scores[4].total


def test_ranks_share_the_batches_and_meet_in_each() -> None:
    """Each rank calls the model equally often, also one without rows, and all get every score."""
    model, spans = small_model(), some_spans(7)
    alone = scorer_of(model, batch_tokens=BLOCK).score(spans)
    world = 3
    mine: list[list[Any]] = []
    calls = []

    class Recording:
        """First pass: keeps what a rank would send. Second pass: gives every rank all of it."""

        def __init__(self, rank: int) -> None:
            self.rank, self.size = rank, world

        def gather(self, value: Any) -> list[Any]:
            if len(mine) < world:
                mine.append(value)
                raise InterruptedError
            return mine

    for rank in range(world):
        done: list[int] = []
        scorer = scorer_of(
            model, batch_tokens=BLOCK, ranks=Recording(rank), on_batch=lambda i, n, done=done: done.append(n)
        )
        with pytest.raises(InterruptedError):
            scorer.score(spans)
        calls.append(done)
    assert calls[0] == calls[1] == calls[2] and len(calls[0]) == calls[0][0]
    for rank in range(world):
        together = scorer_of(model, batch_tokens=BLOCK, ranks=Recording(rank)).score(spans)
        assert [score.total for score in together] == [score.total for score in alone]


def test_windows_score_each_token_once_as_the_harness_cuts_them() -> None:
    # The example in lm-evaluation-harness' documentation of loglikelihood_rolling: tokens 0..9, context 4, prefix 99.
    windows = list(rolling_windows(range(10), 99, 4))
    assert windows == [Span([99], [0, 1, 2, 3]), Span([3], [4, 5, 6, 7]), Span([5, 6, 7], [8, 9])]
    assert list(rolling_windows(range(5), None, 4)) == [Span([0], [1, 2, 3, 4])]
    assert list(rolling_windows([], 99, 4)) == list(rolling_windows([7], None, 4)) == []
    for n in range(1, 40):
        spans = list(rolling_windows(range(n), 99, 4))
        assert [t for span in spans for t in span.continuation] == list(range(n))
        assert all(len(span.context) + len(span.continuation) <= 5 for span in spans)


def test_what_cannot_be_scored_is_refused() -> None:
    scorer = scorer_of(small_model())
    with pytest.raises(ValueError, match="at least one token"):
        scorer.score([Span([], [1])])
    with pytest.raises(ValueError, match=f"13 tokens exceeds the model's context \\(block_size {BLOCK}\\)"):
        scorer.score([Span([1], list(range(13)))])
    assert scorer.score([]) == []
