"""Splits text into paragraphs and hashes them for deduplication.

A paragraph is a line with its newline and the blank lines after it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

HASH_BYTES = 16  # 128 bits: any collision among 10^12 paragraphs has probability 1.5e-15

_PARAGRAPH = re.compile(r"[^\n]*\n(?:[^\S\n]*\n)*|[^\n]+")


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs in order; joined they give the text."""
    return _PARAGRAPH.findall(text)


def hash_paragraphs(text: str, min_characters: int) -> list[bytes | None]:
    """The hash of each paragraph, or None if it has fewer characters and is always kept, as blank ones are.

    A paragraph is hashed (BLAKE2b) and measured stripped, with each run of whitespace collapsed to one space.
    """
    hashes: list[bytes | None] = []
    for paragraph in split_paragraphs(text):
        collapsed = " ".join(paragraph.split())
        if len(collapsed) < max(min_characters, 1):
            hashes.append(None)
        else:
            hashes.append(hashlib.blake2b(collapsed.encode(), digest_size=HASH_BYTES).digest())
    return hashes


def drop_paragraphs(text: str, dropped: Collection[int]) -> str:
    """The text without the paragraphs with these 0-based indices."""
    if not dropped:
        return text
    numbers = frozenset(dropped)
    return "".join(p for number, p in enumerate(split_paragraphs(text)) if number not in numbers)
