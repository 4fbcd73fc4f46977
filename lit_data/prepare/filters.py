"""Quality filters: decide whether to keep a document, with a reason for dropping it."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from lit_data.corpus.readers import Document
from lit_data.corpus.user_code import describe, load_function

LANGUAGE_CHARACTERS = 4000  # for language detection; more cost time and change few decisions


@dataclass(frozen=True)
class Filter:
    """A named test of documents. Filters can be pickled.

    Attributes:
        name: for reports.
        keep: returns None to keep a document, else the reason for dropping it as `kind: detail`, see
            `report.StageReport`.
    """

    name: str
    keep: Callable[[Document], str | None]


def length_filter(min_characters: int = 0, max_characters: int | None = None) -> Filter:
    """Keeps documents of min to max characters, inclusive.

    Raises:
        ValueError: no length satisfies both limits.
    """
    if min_characters < 0 or (max_characters is not None and max_characters < max(min_characters, 1)):
        raise ValueError(
            f"--min_characters {min_characters}, --max_characters {max_characters}: no document can satisfy both"
        )
    return Filter("length", partial(_length, min_characters, max_characters))


def _length(min_characters: int, max_characters: int | None, document: Document) -> str | None:
    characters = len(document.text)
    if characters < min_characters:
        return f"too short: {characters} characters"
    if max_characters is not None and characters > max_characters:
        return f"too long: {characters} characters"
    return None


def language_filter(languages: Collection[str], min_probability: float = 0.5) -> Filter:
    """Keeps documents in one of the languages, as detected by py3langid's bundled model.

    Looks at the first `LANGUAGE_CHARACTERS` characters. Probabilities are normalised over all languages of the model
    and are low for short or mixed texts.

    Args:
        languages: two-letter ISO 639-1 codes.
        min_probability: minimum probability of the detected language.

    Raises:
        ValueError: the model does not know a language, or py3langid is not installed.
    """
    if not 0 <= min_probability <= 1:
        raise ValueError(f"--min_language_probability {min_probability}: give a number from 0 to 1")
    known = set(_language_identifier().labels)
    for language in languages:
        if language not in known:
            raise ValueError(f"--language {language}: the known language codes are {', '.join(sorted(known))}")
    if not languages:
        raise ValueError("--language: name at least one")
    return Filter("language", partial(_language, frozenset(languages), min_probability))


@cache  # once per process: loading the model takes most of a second
def _language_identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise ValueError("--language needs the package py3langid: pip install 'llammlein[data]'") from error
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)


def _language(languages: Collection[str], min_probability: float, document: Document) -> str | None:
    language, probability = _language_identifier().classify(document.text[:LANGUAGE_CHARACTERS])
    if language not in languages:
        return f"language {language}: probability {probability:.2f}"
    if probability < min_probability:
        return f"language unsure: {language} with probability {probability:.2f}"
    return None


def count_words(text: str) -> int:
    """Number of whitespace-separated words."""
    return len(text.split())


def token_word_ratio(n_tokens: int, text: str) -> float:
    """Tokens per word (`count_words`); infinite for a text without words.

    Tables, chords, source code and text in a language other than the tokenizer's have many tokens per word.
    """
    words = count_words(text)
    return n_tokens / words if words else math.inf


def open_filter(spec: str) -> Filter:
    """Load a user-defined filter, `module:function`: takes the text and returns whether to keep it.

    Raises:
        ValueError: no such module or function; while filtering, if the function raises or returns anything but True or
            False (the message names the document).
    """
    return Filter(spec, partial(_user_keeps, spec, load_function(spec, "--filter")))


def _user_keeps(spec: str, function: Callable[..., object], document: Document) -> str | None:
    where = f"document {document.id} ({document.source})"
    try:
        keep = function(document.text)
    except Exception as error:
        raise ValueError(f"--filter {spec} failed at {where}: {describe(error)}") from error
    if not isinstance(keep, bool):
        raise ValueError(f"--filter {spec} returned a {type(keep).__name__} for {where}; it must return True or False")
    return None if keep else spec
