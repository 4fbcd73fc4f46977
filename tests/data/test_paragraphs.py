"""Paragraphs and their hashes."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_data.prepare.paragraphs import drop_paragraphs, hash_paragraphs, split_paragraphs


def paragraph_hash(paragraph: str) -> bytes:
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=16).digest()


TEXTS = st.text(alphabet="ab .\n\r\t \u00a0\u2028", max_size=60)


@pytest.mark.parametrize(
    "text, paragraphs",
    [
        ("", []),
        ("one", ["one"]),
        ("one\ntwo\n", ["one\n", "two\n"]),
        ("one\n\n\ntwo", ["one\n\n\n", "two"]),
        ("one\n \t\ntwo", ["one\n \t\n", "two"]),
        ("one\r\n\r\ntwo\r\n", ["one\r\n\r\n", "two\r\n"]),
        ("\n\none", ["\n\n", "one"]),
        ("one\n  two", ["one\n", "  two"]),
        ("one\u2028two", ["one\u2028two"]),
    ],
)
def test_a_paragraph_is_a_line_with_the_blank_lines_after_it(text: str, paragraphs: list[str]) -> None:
    assert split_paragraphs(text) == paragraphs


@given(TEXTS)
def test_paragraphs_joined_are_the_text(text: str) -> None:
    paragraphs = split_paragraphs(text)
    assert "".join(paragraphs) == text
    assert all(p.strip() for p in paragraphs[1:-1])
    hashes = hash_paragraphs(text, 3)
    assert len(hashes) == len(paragraphs)
    for paragraph, found in zip(paragraphs, hashes, strict=True):
        assert found == (paragraph_hash(paragraph) if len(" ".join(paragraph.split())) >= 3 else None)


@given(TEXTS, st.sets(st.integers(0, 8)))
def test_dropping_leaves_the_others(text: str, dropped: set[int]) -> None:
    expected = "".join(p for i, p in enumerate(split_paragraphs(text)) if i not in dropped)
    assert drop_paragraphs(text, dropped) == drop_paragraphs(text, sorted(dropped)) == expected


def test_the_hash_is_of_the_words_with_one_space_between() -> None:
    expected = [hashlib.blake2b("Ein Satz über Öl.".encode(), digest_size=16).digest()]
    assert hash_paragraphs("Ein Satz über Öl.", 0) == expected
    assert hash_paragraphs("  Ein\tSatz \u00a0über  Öl.\r\n\n", 0) == expected
    assert hash_paragraphs("ein Satz über Öl.", 0) != expected


def test_short_and_blank_paragraphs_have_no_hash() -> None:
    assert hash_paragraphs("\n1234567\n 12345678 \n12345678", 8) == [None, None, *[paragraph_hash("12345678")] * 2]
    assert hash_paragraphs("\n \nx", 0) == [None, paragraph_hash("x")]
