"""The German minimal pairs: how many, always the same, and each pair differs."""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import pytest

from lit_eval.score.german_pairs import german_pairs


def test_there_are_a_hundred_of_each_of_at_least_twelve_phenomena() -> None:
    items = german_pairs()
    counts = Counter(item["phenomenon"] for item in items)
    assert len(counts) == 25 and set(counts.values()) == {100}
    assert {item["field"] for item in items} == {"agreement", "case", "verbs", "word_order", "negation"}
    assert len({(item["sentence_good"], item["sentence_bad"]) for item in items}) == len(items)


def test_a_pair_is_two_different_clean_sentences() -> None:
    for item in german_pairs():
        good, bad = item["sentence_good"], item["sentence_bad"]
        assert good != bad
        for sentence in (good, bad):
            assert sentence[0].isupper() and sentence.endswith(".") and "  " not in sentence


def test_no_sentence_is_good_in_one_pair_and_bad_in_another() -> None:
    items = german_pairs()
    assert not {item["sentence_good"] for item in items} & {item["sentence_bad"] for item in items}


def test_the_pairs_are_the_same_on_every_machine() -> None:
    digest = hashlib.sha256(json.dumps(german_pairs(), ensure_ascii=False).encode()).hexdigest()
    assert digest == "69ef6f2c499fa2cebab4ae1b6858d2809618327eed11de4609f53f896f7550a7", (
        "scores of different pairs cannot be compared: name the new set differently"
    )


def test_more_pairs_than_there_are_is_refused() -> None:
    with pytest.raises(ValueError, match="fewer than 1000"):
        german_pairs(1000)
