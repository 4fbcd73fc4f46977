"""The exact likelihood of a synthetic document or a prefix of one, by parsing the text with the grammar."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lit_data.corpus.synthetic import END, START, Level, Option, options_of


def _starts_with_word(text: str, word: str, at: int) -> bool:
    """Whether the complete `word` is at `at`: the text after it is known and does not continue the word."""
    end = at + len(word)
    return text.startswith(word, at) and not (word[-1].isalpha() and (end == len(text) or text[end].isalpha()))


def _taken(text: str, at: int, options: Sequence[Option]) -> Option | None:
    """The option that matches the text at `at`: the one with these words, else the empty one, else None."""
    empty = None
    for option in options:
        if not option.text:
            empty = option
        elif _starts_with_word(text, option.text, at):
            return option
    return empty


def document_nll(text: str, level: Level) -> float:
    """-log p(text) in nats, by parsing the text; ValueError names the position that the grammar does not allow."""
    whole, at, stack, nats = text + END, 0, [START], []
    while stack:
        option = _taken(whole, at, options_of(stack.pop(), level))
        if option is None:
            here = repr(text[at : at + 40]) if at < len(text) else "the end of the text"
            raise ValueError(f"not a {level} document: the grammar does not allow {here} at character {at}")
        at += len(option.text)
        nats.append(-math.log(option.probability))
        stack.extend(reversed(option.then))
    if at != len(whole):
        raise ValueError(f"not a {level} document: it contains the character NUL, at {text.index(END)}")
    return math.fsum(nats)


def prefix_nll(prefix: str, level: Level) -> float:
    """-log of the probability that a document's text starts with `prefix` (nats); ValueError if it is zero.

    Complete words are parsed. If only part of a word is left, the options that start with it are summed; an empty
    option passes it on to the next symbol.
    """
    if END in prefix:
        raise ValueError(f"no {level} document contains the character NUL")
    at, stack, nats, last = 0, [START], [], 0.0
    path = 1.0  # probability of the empty options passed since the last complete word
    while stack:
        options = options_of(stack.pop(), level)
        rest = prefix[at:]
        if not rest:
            last += path
            break
        option = _taken(prefix, at, options)
        if option is not None and option.text:
            nats.append(-math.log(path * option.probability))
            at, path = at + len(option.text), 1.0
        else:
            last += path * math.fsum(o.probability for o in options if o.text and o.text.startswith(rest))
            if option is None:
                break
            path *= option.probability
        stack.extend(reversed(option.then))
    if last == 0.0:
        raise ValueError(f"no {level} document begins with {prefix[:at]!r} and then {prefix[at : at + 40]!r}")
    return math.fsum([*nats, -math.log(min(last, 1.0))])


def conditional_nll(text: str, prefix: str, level: Level) -> float:
    """Exact -log p(text | the document starts with prefix) in nats; ValueError if `text` does not.

    A language model is scored from a document's second token on. With the first token's characters as `prefix`, this
    is the NLL of the rest, if every text that starts with those characters also starts with that token. That holds for
    each tokenizer that splits at spaces first: a document's first word is "The" at level simple, and at the other
    levels no two first words have the same first letter. For other tokenizers it is an upper bound.
    """
    if not text.startswith(prefix):
        raise ValueError(f"the text {text[:40]!r} does not begin with the prefix {prefix[:40]!r}")
    return max(document_nll(text, level) - prefix_nll(prefix, level), 0.0)
