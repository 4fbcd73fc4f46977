"""Checks whether two tokenizers give the same ids, regardless of file format.

The same tokenizer may be a sentencepiece model, a tokenizer.json converted from it, or that file rewritten by a program
that spells out defaults or lists more special tokens: the fingerprints differ, the ids do not. Tokenizers with
different fingerprints are therefore compared by behaviour: the token of every id, and the ids of texts. The texts have
no names of special tokens, since their handling is a setting, not part of the tokenizer.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from itertools import zip_longest

from lit_data.tokenizers.cutting import SPACE_MARK
from lit_data.tokenizers.tokenizer import Tokenizer

# Digests are stored in files: changing a text here invalidates them.
_TEXTS = (
    "Ein Satz über Bäume, Straßen und Öl; „Zitat“ – 12,5 % (S. 3 ff.) …",
    "The quick brown fox doesn't jump over 12 lazy dogs.\n\nA new paragraph:  two spaces,\ttab.",
    " leading and trailing ",
    "def f(x):\n    return x ** 2  # 0x41\n",
    "A\u0308 ﬁ ½ ² ™ Ａ１ soft\u00adhyphen no\u00a0break",
    "日本語 한국어 العربية русский 😀 👩‍👧",
    "LOUD Words, miXed CASE, 1250 31.12.2024 https://example.org/a?b=c&d=%20#e",
    "aaaaaaaaaa ababababab ---------- ..........",
)
_SPECIAL = re.compile(r"[<\[].+[>\]]")
_TOGETHER = 8  # tokens per text made of tokens
_MAX_TEXTS = 4096


def ids_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 (hex) over the token of every id and the ids of texts. Equal digests: same ids for the same text."""
    digest = hashlib.sha256(json.dumps(_tokens(tokenizer)).encode())
    for ids in tokenizer.encode_plain(list(_texts(tokenizer))):
        digest.update(json.dumps([int(i) for i in ids]).encode())
    return digest.hexdigest()


def difference(one: Tokenizer, other: Tokenizer) -> str | None:
    """The first difference between two tokenizers, as a phrase; None if `ids_digest` is the same."""
    ours, theirs = _tokens(one), _tokens(other)
    for id, (token, their_token) in enumerate(zip(ours, theirs, strict=False)):
        if token != their_token:
            return f"id {id} is {token!r} in one, {their_token!r} in the other"
    if len(ours) != len(theirs):
        return f"{len(ours)} ids in one, {len(theirs)} in the other; the ids of both have the same tokens"
    texts = list(_texts(one))
    for text, ids, their_ids in zip(texts, one.encode_plain(texts), other.encode_plain(texts), strict=True):
        for id, their_id in zip_longest(ids, their_ids):
            if id != their_id:
                a, b = (repr(ours[i]) if i is not None else "no token" for i in (id, their_id))
                return f"all ids have the same tokens, but {text[:40]!r} gives {a} in one, {b} in the other"
    return None


def _tokens(tokenizer: Tokenizer) -> list[str | None]:
    return [tokenizer.id_to_token(id) for id in range(tokenizer.vocab_size)]


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    """Fixed texts, and texts made of the tokens themselves, which exercise every merge."""
    yield from _TEXTS
    words = [t.replace(SPACE_MARK, " ") for t in _tokens(tokenizer) if t is not None and not _SPECIAL.fullmatch(t)]
    step = _TOGETHER * -(-len(words) // (_TOGETHER * _MAX_TEXTS))
    yield from ("".join(words[i : i + _TOGETHER]) for i in range(0, len(words), max(step, _TOGETHER)))
