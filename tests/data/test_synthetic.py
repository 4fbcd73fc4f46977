"""The synthetic grammars: probabilities that add up, one derivation a text, entropies as computed."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest

from lit_data.corpus.synthetic import (
    END,
    LEVELS,
    Level,
    conditional_nll,
    document_nll,
    entropy,
    options,
    sample_documents,
    write_synthetic,
)


@pytest.mark.parametrize("level", LEVELS)
def test_every_state_is_a_distribution_over_prefix_free_pieces(level: Level) -> None:
    todo, done = [("begin", 0)], set()
    while todo:
        state = todo.pop()
        if state in done or state == END:
            continue
        done.add(state)
        following = options(level, state)
        assert sum(p for _, p, _ in following) == pytest.approx(1, abs=1e-12)
        pieces = [t for t, _, _ in following if t]
        assert not any(b.startswith(a) for a, b in itertools.permutations(pieces, 2)), state
        todo += [then for _, _, then in following]
    assert len(done) > 50


def test_simple_grammar_has_the_known_entropy() -> None:
    """ln 10 + ln 14 + 2 ln 10 + ln 2 + (3 ln 10 + ln 14) / 2 = 15.013 nats a sentence, 5.5 sentences, their number ln 6."""
    sentence = 3 * math.log(10) + math.log(14) + math.log(2) + (3 * math.log(10) + math.log(14)) / 2
    assert sentence == pytest.approx(15.013, abs=5e-4)
    assert entropy("simple") == pytest.approx(5.5 * sentence + math.log(6), rel=1e-12)


@pytest.mark.parametrize("level", LEVELS)
def test_likelihood_read_off_the_text_is_the_generators(level: Level) -> None:
    documents = list(sample_documents(level, seed=3, n_words=40000))
    assert all(document_nll(d.text, level) == pytest.approx(d.nll, rel=1e-12) for d in documents)
    values = [d.nll for d in documents]
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert abs(statistics.mean(values) - entropy(level)) < 4 * error


@pytest.mark.parametrize("level", LEVELS)
def test_conditional_likelihood_marginalises_a_piece_that_is_cut(level: Level) -> None:
    """Against the definition: the probability of a prefix is the share of the whole pieces that begin with it."""
    for d in itertools.islice(sample_documents(level, seed=5, n_words=5000), 50):
        assert conditional_nll(d.text, "", level) == pytest.approx(d.nll)
        assert conditional_nll(d.text, d.text, level) >= -1e-9
        first = d.text[:2]
        share = sum(p for t, p, _ in options(level, ("begin", 0)) if t.startswith(first))
        assert conditional_nll(d.text, first, level) == pytest.approx(d.nll + math.log(share))
    with pytest.raises(ValueError, match="does not begin"):
        conditional_nll(d.text, "Xyz", level)
    with pytest.raises(ValueError, match="cannot go on"):
        document_nll("The cat.", "simple")


def test_written_text_repeats_by_seed(tmp_path: Path) -> None:
    write_synthetic(tmp_path / "a", tokens=3000, seed=1)
    write_synthetic(tmp_path / "b", tokens=3000, seed=1)
    write_synthetic(tmp_path / "c", tokens=3000, seed=2)
    read = {n: (tmp_path / n / "train.jsonl").read_text() for n in "abc"}
    assert read["a"] == read["b"] != read["c"]
    line = json.loads((tmp_path / "a" / "val.jsonl").read_text().splitlines()[0])
    assert document_nll(line["text"], "simple") == pytest.approx(line["nll"])
    with pytest.raises(ValueError, match="exists already"):
        write_synthetic(tmp_path / "a", tokens=3000)
    with pytest.raises(ValueError, match="too few"):
        write_synthetic(tmp_path / "d", tokens=10)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b", "c"]
