"""Cleaning profiles: named cleaners of a document's text, and user-defined ones.

`wikipedia`, `subtitles` and `dialogue` clean any text. `babylm` (composed of these three) and `babylm-paper` (from the
BabyLlama paper) choose by the name of the document's file, one of `BABYLM_FILES` (2023, and those renamed in 2024),
with any suffix. All take time linear in the text.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from lit_data.corpus.readers import Document
from lit_data.corpus.user_code import describe, load_function
from lit_files.near_names import did_you_mean

Cleaner = Callable[[Document], str | None]
"""The document's new text, or None to drop it. Cleaners are picklable."""

_REFERENCE = re.compile(r"\[\d+\]")
_BLANK_LINES = re.compile(r"\n{3,}")
_SUBTITLE_LINE = re.compile(r"subtitles by|^\s*(\d\d:\d\d:\d\d[,.]\d+\s*-->.*)?$", re.IGNORECASE)
# No opening bracket inside, so that a line of only opening ones takes linear time.
_BRACKETED = re.compile(r"\[[^\[\]\n]*\]|\([^()\n]*\)")
_SPEAKER = re.compile(r"\b[A-Z]\d+:")
_SPACE = re.compile(r"\s+")
_BLANKS = re.compile(r"[ \t\u00a0]+")
_SPACE_BEFORE_MARK = re.compile(r" ([.,;!?])")
_SPLIT_CONTRACTION = re.compile(r"(\w) (['’](?:t|s|d|m|ll|re|ve)\b)", re.IGNORECASE)
_SENTENCE_PARTS = re.compile(r"[.!?]\s|\w+")


def clean_wikipedia(text: str) -> str:
    """`== Heading ==` becomes `Heading`, references like `[12]` are removed, three or more newlines become two."""
    lines = "\n".join(_unwrap(line, "==") for line in text.split("\n"))
    return _BLANK_LINES.sub("\n\n", _REFERENCE.sub("", lines))


def clean_subtitles(text: str) -> str:
    """Removes credits ("Subtitles by ..."), SRT timings, lines of digits only, and blank lines."""
    return "\n".join(line for line in text.split("\n") if not _is_subtitle_frame(line))


def clean_dialogue(text: str) -> str:
    """Removes `[...]`, `(...)` within a line and speaker labels like `A1:`; each run of whitespace, including newlines,
    becomes one space.
    """
    return _SPACE.sub(" ", _SPEAKER.sub("", _BRACKETED.sub("", text))).strip()


def unchanged(text: str) -> str:
    """Returns the text unchanged."""
    return text


def drop_blank_lines(text: str) -> str:
    """Removes blank lines."""
    return "\n".join(line for line in text.split("\n") if line.strip())


def clean_spaced_wikipedia(text: str) -> str:
    """`= = = Heading = = =` becomes `Heading`, lines are stripped, blank ones removed."""
    lines = (_unwrap(line, "= = =") for line in text.split("\n"))
    return "\n".join(line.strip() for line in lines if line.strip())


def clean_qed(text: str) -> str:
    """In lines with at least half upper-case letters, `l` becomes `I`, then sentence case is applied."""
    return "\n".join(_sentence_case(line) if _is_upper(line) else line for line in text.split("\n"))


def squeeze_blanks(text: str) -> str:
    """Runs of spaces become one; spaces before `.,;!?` are removed."""
    return _SPACE_BEFORE_MARK.sub(r"\1", _BLANKS.sub(" ", text))


def clean_cbt(text: str) -> str:
    """As `squeeze_blanks`; `don 't` becomes `don't`."""
    return _SPLIT_CONTRACTION.sub(r"\1\2", squeeze_blanks(text))


def drop_subtitle_lines(text: str) -> str:
    """Removes lines with "subtitle" in any case."""
    return "\n".join(line for line in text.split("\n") if "subtitle" not in line.lower())


def _unwrap(line: str, signs: str) -> str:
    """The text between the marks (one or more) on both sides; other lines unchanged."""
    stripped = line.strip()
    if not (stripped.startswith(signs) and stripped.endswith(signs)):
        return line
    return stripped.strip("= \t") or line


def _is_subtitle_frame(line: str) -> bool:
    return _SUBTITLE_LINE.search(line) is not None or line.strip().isdecimal()


def _is_upper(line: str) -> bool:
    letters = sum(map(str.isalpha, line))
    return 0 < letters <= 2 * sum(map(str.isupper, line))


def _sentence_case(line: str) -> str:
    """Lower case except the first letter of the line and after `.!?` and whitespace."""
    line = line.replace("l", "I").lower()
    parts, done, begins = [], 0, True
    for match in _SENTENCE_PARTS.finditer(line):
        if not match[0][0].isalnum():
            begins = True
        elif begins:
            parts += [line[done : match.start()], match[0][0].upper()]
            done, begins = match.start() + 1, False
    return "".join(parts) + line[done:]


_FIRST_SET: Mapping[str, Callable[[str], str]] = {
    "aochildes": clean_dialogue,
    "bnc_spoken": clean_dialogue,
    "cbt": unchanged,
    "childes": clean_dialogue,
    "children_stories": unchanged,
    "gutenberg": unchanged,
    "open_subtitles": clean_subtitles,
    "qed": unchanged,
    "simple_wiki": clean_wikipedia,
    "simple_wikipedia": clean_wikipedia,
    "switchboard": clean_dialogue,
    "wikipedia": clean_wikipedia,
}
_SECOND_SET: Mapping[str, Callable[[str], str]] = {
    "aochildes": squeeze_blanks,
    "bnc_spoken": squeeze_blanks,
    "cbt": clean_cbt,
    "childes": squeeze_blanks,
    "children_stories": unchanged,
    "gutenberg": unchanged,
    "open_subtitles": drop_subtitle_lines,
    "qed": clean_qed,
    "simple_wiki": drop_blank_lines,
    "simple_wikipedia": drop_blank_lines,
    "switchboard": unchanged,
    "wikipedia": clean_spaced_wikipedia,
}
BABYLM_FILES = tuple(_FIRST_SET)


def _clean(clean: Callable[[str], str], document: Document) -> str | None:
    text = clean(document.text)
    return text if text.strip() else None


def _clean_by_file(name: str, cleaners: Mapping[str, Callable[[str], str]], document: Document) -> str | None:
    stem = Path(document.source).name.partition(".")[0]
    if stem not in cleaners:
        raise ValueError(
            f"--cleaner {name} chooses the cleaner by file name and has none for {document.source}; it knows "
            f"{', '.join(cleaners)} (any suffix)"
        )
    return _clean(cleaners[stem], document)


PROFILES: Mapping[str, Cleaner] = {
    "wikipedia": partial(_clean, clean_wikipedia),
    "subtitles": partial(_clean, clean_subtitles),
    "dialogue": partial(_clean, clean_dialogue),
    "babylm": partial(_clean_by_file, "babylm", _FIRST_SET),
    "babylm-paper": partial(_clean_by_file, "babylm-paper", _SECOND_SET),
}


def open_cleaner(spec: str) -> Cleaner:
    """Open a profile by name, or a user-defined cleaner as `module:function`.

    The function takes the text, or the Document if its first parameter is named `document`, and returns the new text,
    or None to drop the document.

    Raises:
        ValueError: no such profile, module or function; while cleaning, if a user's function raises or returns anything
            else (the message names the document).
    """
    if ":" not in spec:
        if spec not in PROFILES:
            names = f"choose one of {', '.join(PROFILES)}, or give module:function"
            raise ValueError(f"--cleaner {spec}: {names}{did_you_mean(spec, PROFILES)}")
        return PROFILES[spec]
    function = load_function(spec, "--cleaner")
    return _UserCleaner(spec, function, takes_document=_first_parameter(function) == "document")


@dataclass(frozen=True)
class _UserCleaner:
    spec: str
    function: Callable[..., object]
    takes_document: bool

    def __call__(self, document: Document) -> str | None:
        where = f"document {document.id} ({document.source})"
        try:
            text = self.function(document if self.takes_document else document.text)
        except Exception as error:
            raise ValueError(f"--cleaner {self.spec} failed at {where}: {describe(error)}") from error
        if text is not None and not isinstance(text, str):
            raise ValueError(
                f"--cleaner {self.spec} returned a {type(text).__name__} for {where}; it must return text, or None to "
                "drop the document"
            )
        return text


def _first_parameter(function: Callable[..., object]) -> str | None:
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except ValueError:  # some built-in functions have no signature
        return None
