"""Where a long text may be cut so that the pieces can be encoded one by one: before single spaces between words.

Whether the tokens then equal those of the uncut text depends on the tokenizer; `Tokenizer.continuation` tests it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

# Limit of text that can't be cut and is encoded at once; this takes gigabytes.
LIMIT_CHARACTERS = 1 << 24

SPACE_MARK = "▁"
# Texts are cut between characters whose role is the same in every normaliser: letters and digits, except those with a
# space once normalised (NFKC), ASCII punctuation, and some punctuation of European languages.
_WITH_SPACE = "\u037a\ufc5e-\ufc63\ufdfa\ufdfb\ufe70\ufe72\ufe74\ufe76\ufe78\ufe7a\ufe7c\ufe7e"
SAFE = rf"(?:[^\W{_WITH_SPACE}]|[!-/:-@\[-`{{-~„“”‚‘’–—…§€°«»·•])"
_CUT = re.compile(rf"(?<={SAFE}) (?={SAFE})")
_JOINED = re.compile(r"[^\s▁][ ▁]")
_JOINED_BYTES = re.compile(r"[^ĠĊĉčċČ]Ġ")


def cut(text: str, piece_characters: int) -> list[str]:
    """Cut a text before single spaces between words, at the first one after `piece_characters` each.

    The pieces concatenate to the text; all but the first start with a space.
    """
    pieces, start = [], 0
    while (end := _next_cut(text, start + piece_characters)) is not None:
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _next_cut(text: str, position: int) -> int | None:
    match = _CUT.search(text, position)
    return match.start() if match else None


def cut_samples(added: Sequence[str]) -> list[str]:
    """Texts that are hard to cut at spaces: pieces that could merge, be stripped, or get a prefix at their start."""
    ends = ["a", "A", "ZZ", "Wort", "Straße", "1", "12345", "3.", "x,", "(y)", "don't", "i’ll", "'s", "-", "_", "%"]
    ends += ["//", "é", "qü", "ﬁ", "½", "日本", "\U0001d54f", "<s>", "</s>", "<0x20>"]
    ends += ["„Wort“", "»x«", "–", "—x", "z…", "§", "12€", "°", "·", "•", "‚x‘", "”"]
    ends += added[:64]
    words = [f"{before} {after}" for before in ends for after in ends]
    return [
        *words,
        " ".join(ends),
        "  ".join(ends) + " end here ",
        "\n".join(words[:40]) + "\n\n a b  c\td e\r\n f g",
        *("\n".join(words[i : i + 60]) for i in range(40, len(words), 60)),
        " a b",
        "  a b  ",
        "die der das " * 20,
        "a a a a aa aa aaa aaa aaaa",
        "in the of and to the in der und die zu den",
        "Zeile eins \nzwei  drei \u00a0vier\u200bfünf ▁ sechs ▁▁sieben a\u0301 b",
    ]


def without_first_spaces(pieces: list[str]) -> list[str]:
    """Remove the leading space of each piece but the first."""
    return [pieces[0], *(piece[1:] for piece in pieces[1:])]


def joins(token: str, byte_level: bool = False) -> bool:
    """Whether a vocabulary entry has a space after a non-space, so that a cut could split it.

    byte_level: the entry is written in the byte alphabet, where the bytes of " \\n\\t\\r\\v\\f" are "ĠĊĉčċČ".
    """
    return (_JOINED_BYTES if byte_level else _JOINED).search(token) is not None


def too_long(stretch: str) -> ValueError:
    """The error for a too long text that can't be cut."""
    return ValueError(
        f"a document has {len(stretch)} characters in a row without a single space between two words, more than the "
        f"limit of {LIMIT_CHARACTERS}; split the document{beginning(stretch)}"
    )


def beginning(text: str) -> str:
    """The start of a text, for an error about it."""
    return f" (it begins: {text[:40]!r})"
