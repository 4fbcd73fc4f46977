"""Checks that the separator of --split_documents occurs in the text: a mistyped one would leave each file whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lit_data.corpus.files import TEXT_SUFFIXES, TextFile
from lit_data.corpus.streams import DamagedError, chunks_of, lines_of
from lit_files.near_names import did_you_mean

SCANNED_BYTES = 1 << 28  # of text without the separator: about three seconds
LINE_BYTES = 1 << 10  # longer lines are no separators
MOST_LINES = 100_000  # short ones counted, to suggest those that repeat


@dataclass(frozen=True)
class _Missing:
    """Why a separator was not found. `certain`: all of the text was read."""

    message: str
    certain: bool


def check_separator(train: Sequence[TextFile], held_out: Sequence[TextFile], split_documents: str) -> list[str]:
    """Warnings for a separator, or blank lines, that the training text or the held-out text lacks.

    Reads the plain-text files up to the first separator, at most SCANNED_BYTES. Raises ValueError for a separator that
    is in no file; damage is left to the reader of the text.
    """
    warnings = []
    all_files = _look_for(split_documents, [*train, *held_out])
    if all_files is not None:
        if all_files.certain and split_documents != "blank_line":
            raise ValueError(all_files.message)
        warnings.append(all_files.message)
    elif (missing := _look_for(split_documents, held_out)) is not None:
        warnings.append(f"held-out text: {missing.message}")
    elif (missing := _look_for(split_documents, train)) is not None:
        warnings.append(f"training text: {missing.message}")
    return warnings


def _look_for(split_documents: str, files: Sequence[TextFile]) -> _Missing | None:
    """None if a plain-text file has the separator on a line of its own, or there is none to find."""
    plain = [file for file in files if file.hub is None and file.kind in TEXT_SUFFIXES]
    if split_documents in ("file", "line") or not plain:
        return None
    separator = "" if split_documents == "blank_line" else split_documents
    short: Counter[str] = Counter()
    left, inside, longest = SCANNED_BYTES, "", 2 * len(separator)
    for file in plain:
        try:
            for line in lines_of(chunks_of(file.path, file.compression), LINE_BYTES):
                text = "" if line is None else line.decode("utf-8", "replace").strip()
                if line is not None and text == separator:
                    return None
                if separator and not inside and separator in text:
                    inside = f"; {file.path} has it within a line, where it does not count"
                if 0 < len(text) <= longest and (len(short) < MOST_LINES or text in short):
                    short[text] += 1
                left -= LINE_BYTES if line is None else len(line) + 1
                if left < 0:
                    break
        except (DamagedError, OSError):
            continue
        if left < 0:
            break
    what = "there is no blank line" if not separator else "it is on no line of its own"
    where = f"in {plain[0].path}" if len(plain) == 1 else f"in the {len(plain)} plain-text files, {plain[0].path} first"
    part = f" in the first {SCANNED_BYTES >> 20} MB" if left < 0 else ""
    near = inside or did_you_mean(separator, [text for text, n in short.most_common() if n > 1] or short)
    return _Missing(
        f"--split_documents {split_documents}: {what} {where}{part}, so that each file would be one document{near}",
        left >= 0,
    )
