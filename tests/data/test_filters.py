"""Filters, the reasons they report, and custom filters."""

from __future__ import annotations

import math
import pickle
import sys
from pathlib import Path

import pytest

from lit_data.corpus.readers import Document
from lit_data.prepare import filters
from lit_data.prepare.filters import language_filter, length_filter, open_filter, token_word_ratio

GERMAN = "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller Gewalt."
ENGLISH = "Everyone has the right to life, liberty and the security of person, and to recognition before the law."


def document(text: str) -> Document:
    return Document("doc-1", text, "some.txt", 0, {})


def test_length() -> None:
    keep = length_filter(3, 5).keep
    assert keep(document("ab")) == "too short: 2 characters"
    assert keep(document("abc")) is keep(document("äbcdé")) is None
    assert keep(document("abcdef")) == "too long: 6 characters"
    assert length_filter(1).keep(document("a" * 10**6)) is None
    assert pickle.loads(pickle.dumps(length_filter(3))).keep(document("ab")) == "too short: 2 characters"


@pytest.mark.parametrize("bounds", [(-1, None), (5, 4), (0, 0)])
def test_impossible_lengths_are_refused(bounds: tuple[int, int | None]) -> None:
    with pytest.raises(ValueError, match=f"--min_characters {bounds[0]}, --max_characters {bounds[1]}"):
        length_filter(*bounds)


def test_tokens_per_word() -> None:
    assert token_word_ratio(6, " one\ntwo \t three ") == 2.0
    assert token_word_ratio(5, " \n") == math.inf


def test_language() -> None:
    pytest.importorskip("py3langid")
    german = pickle.loads(pickle.dumps(language_filter(["de"], 0.9)))
    assert german.keep(document(GERMAN)) is None
    assert german.keep(document(ENGLISH)).startswith("language en: probability ")
    assert german.keep(document("A B C D E")).startswith("language")
    assert language_filter(["de", "en"], 0.9).keep(document(ENGLISH)) is None
    # The language may be detected, but with too little confidence.
    unsure = "Hand in Hand"
    assert language_filter(["de", "en"], 0.0).keep(document(unsure)) is None
    assert language_filter(["de", "en"], 1.0).keep(document(unsure)).startswith("language unsure: ")


@pytest.mark.parametrize(
    "languages, probability, message",
    [
        (["de", "klingon"], 0.5, "--language klingon: the known language codes .*de, .*en"),
        ([], 0.5, "--language: name at least one"),
        (["de"], 1.5, "--min_language_probability 1.5"),
    ],
)
def test_errors_in_languages_are_reported(languages: list[str], probability: float, message: str) -> None:
    pytest.importorskip("py3langid")
    with pytest.raises(ValueError, match=message):
        language_filter(languages, probability)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    filters._language_identifier.cache_clear()
    monkeypatch.setitem(sys.modules, "py3langid.langid", None)
    with pytest.raises(ValueError, match=r"py3langid: pip install 'llammlein\[data\]'"):
        language_filter(["de"])


def test_a_custom_filter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_filters.py").write_text(
        "def no_lists(text):\n    return not text.startswith('- ')\n"
        "def wrong(text):\n    return text\n"
        "def failing(text):\n    raise KeyError\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = pickle.loads(pickle.dumps(open_filter("own_filters:no_lists")))
    assert own.name == "own_filters:no_lists"
    assert own.keep(document("text")) is None
    assert own.keep(document("- text")) == "own_filters:no_lists"
    with pytest.raises(ValueError, match="--filter own_filters:no_such: own_filters .*has no function no_such"):
        open_filter("own_filters:no_such")
    with pytest.raises(ValueError, match="--filter own_filters:wrong returned a str for document doc-1 .*some.txt"):
        open_filter("own_filters:wrong").keep(document("text"))
    with pytest.raises(
        ValueError, match="--filter own_filters:failing failed at document doc-1 .*some.txt.*: KeyError"
    ):
        open_filter("own_filters:failing").keep(document("text"))
