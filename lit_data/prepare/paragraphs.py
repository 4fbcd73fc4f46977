"""Paragraphs of a text, and hashes of them that find the same paragraph elsewhere.

A paragraph is a line with its newline and the blank lines that follow.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection

HASH_BYTES = 16  # 128 bits: two different ones of 10^12 paragraphs are alike with probability 1.5e-15

_PARAGRAPH = re.compile(r"[^\n]*\n(?:[^\S\n]*\n)*|[^\n]+")


def split_paragraphs(text: str) -> list[str]:
    """The paragraphs in order; joined they are the text."""
    return _PARAGRAPH.findall(text)


def paragraph_hash(paragraph: str) -> bytes:
    """BLAKE2b, 16 bytes, of the paragraph without white space around it and with one space for each run of it."""
    return hashlib.blake2b(" ".join(paragraph.split()).encode(), digest_size=HASH_BYTES).digest()


def hash_paragraphs(text: str, min_characters: int) -> list[bytes | None]:
    """The hash of each paragraph; None for those of fewer characters (as hashed), which are always kept.

    Blank paragraphs have none, whatever the limit.
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
    """The text without the paragraphs of these numbers (from 0)."""
    if not dropped:
        return text
    numbers = frozenset(dropped)
    return "".join(p for number, p in enumerate(split_paragraphs(text)) if number not in numbers)
