"""The longest common substring against a brute force over all substrings."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lit_eval.overlap import Overlap, longest_overlap


def brute_force(sample: str, corpus: str) -> int:
    ends = range(len(sample) + 1)
    return max((j - i for i in ends for j in ends if i < j and sample[i:j] in corpus), default=0)


# Two letters: long and repeated matches are common. The umlaut has two bytes in UTF-8 and is one character here.
texts = st.text(alphabet="abä", max_size=24)


@given(sample=texts, corpus=texts)
def test_equals_brute_force(sample: str, corpus: str) -> None:
    overlap = longest_overlap(sample, corpus)
    assert overlap.length == len(overlap.text) == brute_force(sample, corpus)
    assert overlap.text in corpus
    assert sample[overlap.start : overlap.start + overlap.length] == overlap.text


def test_first_of_the_longest() -> None:
    assert longest_overlap("xx abc yy def", "def-abc") == Overlap(3, 3, "abc")


def test_nothing_shared() -> None:
    assert longest_overlap("xyz", "abc") == Overlap(0, 0, "")
    assert longest_overlap("", "abc") == Overlap(0, 0, "")


def test_whole_sample() -> None:
    assert longest_overlap("abc", "zabcz").length == 3
