"""Turns texts, and continuations of contexts, into token ids as lm-evaluation-harness does.

See `_encode_pair` and `loglikelihood` in its lm_eval/api/model.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lit_eval.model.likelihood import Span


@dataclass(frozen=True)
class TextEncoder:
    """How a model reads text.

    Attributes:
        encode: texts -> ids of each, without BOS; see `EvalModel.encode`.
        bos_id: precedes every context; None: none does.
        prefix_id: precedes a continuation that has no context; None: its first token is context only, and not scored.
    """

    encode: Callable[[Sequence[str]], list[list[int]]]
    bos_id: int | None = None
    prefix_id: int | None = None

    def spans(self, pairs: Sequence[tuple[str, str]]) -> list[Span | None]:
        """The tokens of each (context, continuation); None if the continuation has no token to score.

        Spaces at the end of a context belong to the continuation, and both are encoded together: the continuation's
        tokens are those behind as many as the context has alone.
        """
        split = [_split(context, continuation) for context, continuation in pairs]
        texts = dict.fromkeys(text for context, continuation in split for text in (context, context + continuation))
        ids = dict(zip(texts, self.encode(list(texts)), strict=True))
        begin = [] if self.bos_id is None else [self.bos_id]
        spans: list[Span | None] = []
        for context, continuation in split:
            if context:
                alone = ids[context]
                span = Span([*begin, *alone], ids[context + continuation][len(alone) :])
            elif self.prefix_id is None or ids[continuation][:1] == [self.prefix_id]:
                span = Span(ids[continuation][:1], ids[continuation][1:])
            else:
                span = Span([self.prefix_id], ids[continuation])
            spans.append(span if span.context and span.continuation else None)
        return spans


@dataclass(frozen=True)
class AlignedEncoder:
    """How a model reads texts of which only the part behind a character is scored.

    Attributes:
        encode: a text -> its ids without BOS, and the end of each token in the text, in characters.
        decode: ids -> text.
        bos_id: precedes every text; None: none does, and a text's first token is context only.
    """

    encode: Callable[[str], tuple[list[int], list[int]]]
    decode: Callable[[Sequence[int]], str]
    bos_id: int | None = None

    def ids(self, text: str) -> list[int]:
        """The ids of a text, with BOS."""
        return [*self._begin(), *self.encode(text)[0]]

    def split(self, text: str, start: int) -> tuple[list[int], int]:
        """The ids of a text, with BOS, and how many of them precede the first token that ends behind character
        `start`; at least one, since the first one is not predicted."""
        ids, ends = self.encode(text)
        begin = self._begin()
        first = next((i for i, end in enumerate(ends) if end > start), len(ids))
        return [*begin, *ids], max(len(begin) + first, 1)

    def _begin(self) -> list[int]:
        return [] if self.bos_id is None else [self.bos_id]


def _split(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
