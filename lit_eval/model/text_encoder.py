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


def _split(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
